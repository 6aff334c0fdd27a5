# make demo and make test each set everything up on first use; later runs start in seconds.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-all check bench docs build clean

help:
	@echo "make demo      set up, then run the whole loop on the built-in lab"
	@echo "make test      set up, then run the tests (under 10 minutes on two cores)"
	@echo "make check     ruff, mypy, import contracts, lengths, cycles"
	@echo "make test-all  make test plus the slow and engine tests"
	@echo "make bench     the benchmarks, which rewrite their RESULT.md"
	@echo "make docs      the documentation site"

setup:
	@PYTHON=$(PYTHON) scripts/setup.sh

demo: setup
	@$(BIN)/honeloom demo $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not browser and not flower and not llama_cpp and not gpu" $(ARGS)

test-all: setup
	@$(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check src tests scripts benchmarks
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_structure.py

bench: setup
	@for run in benchmarks/*/run.py; do $(BIN)/python $$run || exit 1; done

docs: setup
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

build: setup
	@$(BIN)/python -m build

clean:
	rm -rf $(VENV) docs/_build dist demo-run
