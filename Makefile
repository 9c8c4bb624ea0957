# `make help` lists the targets. Any of them works first in a fresh clone: the environment is built on demand.

PYTHON ?= python3
PIP_ARGS ?=
BENCH ?= all --out runs/bench.json
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?=
PYTEST_ALL := -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest test-newest test-harness slow gpu bench lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv/ with the package (editable) and the development tools

demo: $(STAMP)  ## solve a fresh map with the bundled model
	@$(BIN)/mirage demo
	@echo "The command is $(BIN)/mirage; 'source $(BIN)/activate' lets you say mirage. Next: mirage solve --help, mirage list."

test: $(STAMP)  ## run the tests, without the slow ones, on all cores (at most 8); TESTS=tests/rl says which
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ALL) $(TESTS)

test-oldest: $(VENV)-oldest/.installed  ## the same with the oldest versions of the declared ranges, in .venv-oldest/
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(PYTEST_ALL) $(TESTS)

test-newest: $(VENV)-newest/.installed  ## the same with the newest versions, in .venv-newest/
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest $(PYTEST_ALL) $(TESTS)

test-harness: $(VENV)-harness/.installed  ## run the bundled model in the real lmms-eval, in .venv-harness/
	OMP_NUM_THREADS=1 $(VENV)-harness/bin/python -m pytest -m harness tests/harness

slow: $(STAMP)  ## run the slow tests
	@$(BIN)/python -m pytest -m slow --timeout 1800 || { status=$$?; \
		[ $$status -eq 5 ] || exit $$status; echo "No slow tests yet."; }

gpu: $(STAMP)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

bench: $(STAMP)  ## measure speed, half an hour; BENCH='decode --quick' says what instead of everything
	@$(BIN)/mirage bench $(BENCH)

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments, builds and caches (the bundled model and your runs stay)
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-harness build dist .pytest_cache .ruff_cache .mypy_cache
	find src tests \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +

WHAT = -e '.[dev]'

define build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed; name one: make setup PYTHON=python3.12")'
	@echo "Building $(@D)/ (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $< $(WHAT)
	$(if $(BESIDE),@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r $(BESIDE))
	@touch $@
endef

$(STAMP): constraints.txt pyproject.toml
	$(build)

$(VENV)-%/.installed: constraints-%.txt pyproject.toml
	$(build)

$(VENV)-harness/.installed: WHAT := -e . pytest pytest-timeout
$(VENV)-harness/.installed: BESIDE := tests/harness/requirements.txt
$(VENV)-harness/.installed: constraints.txt pyproject.toml tests/harness/requirements.txt
	$(build)
