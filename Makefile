# Everything on a fresh machine with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg
CODE := t2i tests nbs docs

# What the bundled models draw right; `make demo PROMPT="…"` draws your own prompt instead.
PROMPTS := "a large red circle left of a small blue star" "two black triangles" \
	"a small green heart above a large orange triangle" "a purple square on a teal background" \
	"a yellow ring and a black diamond on a pink background" "a blue cross below a red circle"
export PROMPT

# Bundled models whose own scores.json, of many images, is on the leaderboard.
SCORED := shapes-var shapes-var-bag shapes-parti shapes-clip-var

.PHONY: demo leaderboard budget speedrun test test-slow lessons notebooks site style clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: .venv/.runtime  ## shapes and emoji from the bundled models (PROMPT="…": four of your own)
	@$(BIN)/t2i generate $(if $(PROMPT),"$$PROMPT",$(PROMPTS)) -n 4 --seed 0 -o t2i-demo.png >/dev/null
	@echo "The images are in $(CURDIR)/t2i-demo.png"
ifndef PROMPT
	@$(BIN)/t2i generate --prompts docs/emoji-prompts.txt -m emoji-var -n 1 --seed 0 \
		-o t2i-demo-emoji.png >/dev/null
	@echo "and, as emoji, in $(CURDIR)/t2i-demo-emoji.png"
endif

speedrun: .venv/.runtime  ## hours: from nothing to a scored generator, in runs/speedrun (goes on after a stop)
	$(BIN)/t2i bench speedrun -o runs/speedrun

leaderboard: .venv/.runtime  ## minutes: score what docs/leaderboard lacks, write table and samples
	$(QUIET) $(BIN)/t2i leaderboard $(SCORED) --measure docs/leaderboard --brief -o README.md \
		--images docs/leaderboard/board.png

budget: .venv/.runtime  ## an hour: train what docs/leaderboard/budget lacks, all on the same images
	$(QUIET) $(BIN)/t2i bench budget -o runs/budget --scores docs/leaderboard/budget --page README.md

test: .venv/.dev  ## every notebook and every test
	$(BIN)/python tests/run.py

test-slow: .venv/.dev  ## tests of many minutes: every lesson with the built wheel alone
	$(QUIET) $(BIN)/python -m pytest -m slow -n 2

lessons: .venv/.dev  ## run the lessons and store their outputs (LESSON=13_multiscale: one)
	$(BIN)/python tests/lessons.py $(LESSON)

notebooks: .venv/.dev  ## open the lessons
	$(BIN)/jupyter lab nbs/index.ipynb

site: .venv/.dev  ## the web site, in _site/: lessons, how-to pages, reference, search
	$(BIN)/python docs/build_site.py

style: .venv/.dev  ## order of imports and rules of style, by ruff
	$(BIN)/ruff check --select I --diff $(CODE)
	$(BIN)/ruff check $(CODE)

clean:  ## remove what can be rebuilt (not data/ and runs/)
	rm -rf .venv build dist _site *.egg-info .pytest_cache .ruff_cache t2i-*.png
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "t2i needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/.dev: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch .venv/.runtime $@
