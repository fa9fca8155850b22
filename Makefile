# `make run` and `make test` do all the set-up on a machine that has python3, pip and make.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Some containers set it. Each of the hundreds of processes of a test run would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run install quickstart test test-fast test-slurm nightly cluster cluster-down lint drill checklist clean

run: $(INSTALLED) quickstart

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m latentwire.orchestrate --config configs/quickstart.yaml --runs-dir $(RUNS)

test: test-fast test-slurm

# Tests wait more than they work, so several files run side by side, those of long runs (tests/train) first.
test-fast: $(INSTALLED)
	@sh tests/faults/install.sh
	@sh tests/dashboard/install.sh
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --timeout 900 -m "not slow and not gpu and not slurm"

# Here each process has a Slurm of its own.
test-slurm: $(INSTALLED)
	@sh tests/slurm/install.sh
	$(BIN)/python -m pytest -n 4 --dist loadfile --timeout 900 -m "slurm and not slow" tests/slurm

# What is too slow for every run; 1,000 kills instead of 200; writes the fault matrix. For a night, or before a release.
nightly: $(INSTALLED)
	@sh tests/faults/install.sh
	$(BIN)/python -m pytest tests/crash tests/faults tests/unit/test_checkpoint_kill.py --kills 1000 --matrix docs/reliability.md
	$(BIN)/python -m pytest --timeout 1800 -m "slow and not gpu and not slurm" tests
	@sh tests/slurm/install.sh
	$(BIN)/python -m pytest --timeout 1800 -m "slow and slurm" tests/slurm

cluster: $(INSTALLED)
	@$(BIN)/python tests/slurm/cluster.py up build/cluster

cluster-down: $(INSTALLED)
	@$(BIN)/python tests/slurm/cluster.py down build/cluster

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

drill: $(INSTALLED)
	$(BIN)/latentwire drill

checklist: $(INSTALLED)
	$(BIN)/latentwire checklist run --write

clean:
	rm -rf $(VENV) build *.egg-info
