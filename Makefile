# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fuzz mutants faults hostile versions coverage test-slow check docs lint types format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,examples]"
	touch $(STAMP)

demo: $(STAMP)  ## compile real models, evaluate every backend, print one table
	$(BIN)/python -m examples.demo

test: $(STAMP)  ## everything that must hold, under 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not cuda"

fuzz: $(STAMP)  ## random models x pipelines x backends, resumable, at most an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.validation.fuzz

mutants: $(STAMP)  ## plant known bugs one by one; every one must be caught
	$(BIN)/python -m tests.mutation.run

faults: $(STAMP)  ## kill -9 at random moments, rerun, compare bytes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run

hostile: $(STAMP)  ## flipped bits, truncations, forgeries of a saved model, counted
	$(BIN)/python -m tests.hostile.run

versions: $(STAMP)  ## exported files on every onnxruntime from 1.20 on
	$(BIN)/python -m tests.versions.run

coverage: $(STAMP)  ## branches of formats, graph, passes and backends that no test takes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not cuda" --cov --cov-context=test --cov-report=term

test-slow: $(STAMP)  ## the long suites
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## the pages, warnings are errors; look at out/docs/index.html
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

check: lint types test  ## what a change must pass

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
