# `make quickstart` and `make test` set up what they need: python3 (3.10 or newer, with venv) and make are enough.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := runs/quickstart

.PHONY: help setup test lint format quickstart clean

help:
	@echo "make quickstart  small ReGLA, hybrid and softmax models side by side, and a pretrained one linearized (minutes)"
	@echo "make test        linters, types, layering and tests"
	@echo "make lint        linters, types and layering alone"
	@echo "make format      rewrite the sources in the house format"
	@echo "make clean       remove the environment, caches and quickstart's runs"

setup: $(STAMP)

# The stamp makes a second call free; a changed dependency renews it. The constraints keep every version, torch's
# included, at what was tested.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing regla and its development tools into $(VENV)"
	@$(BIN)/python -m pip install -qq --progress-bar off --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@

# One thread per worker: more workers than cores slow each other down. What measures time runs after them, alone.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m timing $(PYTEST_ARGS) $$(grep -rl --include='test_*.py' 'mark\.timing' tests)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

quickstart: $(STAMP)
	$(BIN)/regla quickstart --out $(RUNS)

clean:
	rm -rf $(VENV) $(RUNS) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
