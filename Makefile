# Everything a fresh machine with Python 3.11 or newer needs: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
WORKDIR ?= runs/nano
# The versions that are known to work together; `make setup LOCK=` takes the newest instead.
LOCK ?= requirements.lock
# Processes for the tests; each holds about 2 GB.
JOBS ?= 2

.PHONY: help setup demo test test-slow check format lock

help:
	@echo "make demo       set up, train a nano Tanuki through every stage (about ten minutes), write $(WORKDIR)/report.html"
	@echo "make test       set up, run the tests on CPU"
	@echo "make test-slow  the tests that take minutes, too"
	@echo "make check      lint, format check, types"
	@echo "make format     rewrite the files in the project's format"
	@echo "make lock       write requirements.lock from a fresh install"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s; try make PYTHON=python3.12 ..." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),--constraint $(LOCK)) --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tanuki run --config=configs/nano.py --workdir=$(WORKDIR)
	@echo "open    $(WORKDIR)/report.html"
	@echo "talk    $(BIN)/tanuki chat --checkpoint=$(WORKDIR)/stages/dpo"

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck -x launch/*.sh

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Names and versions only.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable | sort -f > requirements.lock
	rm -rf $(VENV)-lock
