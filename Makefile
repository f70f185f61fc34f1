# make install | train | test | lint | bench | clean.   Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
PRESET ?= digits-uvit
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install train test lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make install   create .venv and install scalelong_fast with everything it needs"
	@echo "make train     train a preset into runs/PRESET (PRESET=digits-uvit ARGS=\"--model.scaling cs\")"
	@echo "make test      run the tests (ARGS=\"-k scaling\")"
	@echo "make lint      check style"
	@echo "make format    mend style"
	@echo "make bench     time a training step against the authors' recipe"
	@echo "make clean     remove .venv and caches; runs/ stays"

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {v[0]}.{v[1]}. Give another one: make install PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV): install Python's venv module (Debian: apt install python3-venv)."; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: $(STAMP)
	$(BIN)/scalelong-fast train $(PRESET) --out runs/$(PRESET) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks step $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
