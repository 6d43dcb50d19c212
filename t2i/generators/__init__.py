"From a condition to tokens"
