# Two commands do all the set-up: `make run` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin

# Images of containers often forbid bytecode: each process that a test starts would compile 3,000 files anew, which takes
# it twice as long as all its imports. It lies apart, so that none appears where tests look at what a run leaves.
unexport PYTHONDONTWRITEBYTECODE
test test-all test-cluster: export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/bytecode

.PHONY: run test test-all test-cluster lint bench

run: $(VENV)/installed
	$(BIN)/python -m dppo

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not cluster"

test-all: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not cluster"

# Ray, Slurm and PostgreSQL are not installed by this: docs/clusters.md.
test-cluster: $(VENV)/installed
	DPPO_OPT_IN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(JOBS)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
