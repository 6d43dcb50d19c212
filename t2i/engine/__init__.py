"What a good engineer needs and a learner does not: weight files, runs, caches, processes"
