# Everything on a fresh machine with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a large red circle left of a small blue star on a gray background

.PHONY: demo test notebooks clean help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: .venv/.runtime  ## generate a grid of pictures from a prompt (PROMPT="…") with the bundled model
	$(BIN)/t2i generate "$(PROMPT)" -n 8 -o t2i-demo.png
	@echo "The pictures are in $(CURDIR)/t2i-demo.png"

test: .venv/.dev  ## every notebook and every test
	$(BIN)/python tests/run.py

notebooks: .venv/.dev  ## open the lessons
	$(BIN)/jupyter lab nbs/index.ipynb

clean:  ## remove what can be rebuilt (not data/ and runs/)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache t2i-*.png
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
