# Each target makes the environment it needs; `make demo` and `make test` work on a fresh clone. The demo needs no EXTRAS.
#   PYTHON=python3.12 make test     another interpreter for the environment
#   EXTRAS=dev,deepspeed make setup more optional packages

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
BASE_STAMP := $(VENV)/.installed-base
STAMP := $(VENV)/.installed
# Compiled at its first import, by whoever needs it, and kept: half of what pip would compile of torch never is. Where
# Python may not keep it (PYTHONDONTWRITEBYTECODE), pip does so once.
PIP := $(BIN)/python -m pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
BENCH_STAMP := $(VENV)/.installed-bench

.PHONY: setup demo demo-full test check check-slow check-slurm bench clean

setup: $(STAMP)

# Without an NVIDIA GPU torch is pinned: where the package index serves a CPU build under this version pip takes it,
# while an unpinned torch is the newest one, with gigabytes of CUDA libraries that such a machine cannot use.
$(BASE_STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Works: PYTHON=python3.12 make ..." >&2; exit 1; }
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; \
	  then $(PIP) 'torch>=2.11' -e .; \
	  else $(PIP) 'torch==2.13.0' -e .; fi
	touch $@

$(STAMP): $(BASE_STAMP)
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps 'dalle-pytorch==1.6.6'
	touch $@

demo: $(BASE_STAMP)
	VILG=$(BIN)/vilg PYTHON=$(BIN)/python examples/quickstart.sh

demo-full: $(BASE_STAMP)
	VILG=$(BIN)/vilg PYTHON=$(BIN)/python FULL=1 examples/quickstart.sh

# One process per core, up to four: each test file stays in one of them, so what its tests share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Needs SLURM and root; on Debian: apt-get install munge slurmctld slurmd slurm-client
check-slurm: $(STAMP)
	$(BIN)/python -m pytest -m slurm tests/slurm

bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/run.py --suite cpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
