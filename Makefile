# Everything a fresh machine with Python 3.11 or newer needs: `make demo`, `make test`.
# The checkout, PYTHON, VENV and WORKDIR may lie anywhere, spaces in their paths included.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/nano
# The versions that are known to work together; `make setup LOCK=` takes the newest instead.
LOCK ?= requirements.lock
# Processes for the tests; each holds about 2 GB.
JOBS ?= 2

# $(call quoted,TEXT) is TEXT as one word of the shell; $(call escaped,PATH) is PATH as one word of make.
empty :=
space := $(empty) $(empty)
quoted = '$(subst ','\'',$1)'
escaped = $(subst $(space),\ ,$1)
BIN = $(call quoted,$(VENV)/bin)
INSTALLED = $(call escaped,$(VENV)/.installed)

.PHONY: help setup demo test test-slow check format lock

help:
	@echo "make demo       set up, train a nano Tanuki through every stage (ten to fifteen minutes), write a report"
	@echo "make test       set up, run the tests on CPU"
	@echo "make test-slow  the tests that take minutes, too"
	@echo "make check      lint, format check, types"
	@echo "make format     rewrite the files in the project's format"
	@echo "make lock       write requirements.lock from a fresh install"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(call escaped,$(LOCK))
	@$(call quoted,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s; try make PYTHON=python3.12 ..." % (sys.executable, sys.version.split()[0]))'
	$(call quoted,$(PYTHON)) -m venv $(call quoted,$(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),--constraint $(call quoted,$(LOCK))) --editable '.[dev]'
	@touch $(call quoted,$(VENV)/.installed)

# Its last lines say where the report is and how to talk to the result, in words that work in any directory.
demo: setup
	$(BIN)/tanuki run --config=configs/nano.py --workdir=$(call quoted,$(WORKDIR))

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck --exclude=SC2154 tanuki_jax/launch/*.sh

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Names and versions only.
lock:
	rm -rf $(call quoted,$(VENV)-lock)
	$(call quoted,$(PYTHON)) -m venv $(call quoted,$(VENV)-lock)
	$(call quoted,$(VENV)-lock/bin/python) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(call quoted,$(VENV)-lock/bin/python) -m pip freeze --exclude-editable | sort -f > requirements.lock
	rm -rf $(call quoted,$(VENV)-lock)
