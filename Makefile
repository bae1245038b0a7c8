# Two commands: `make demo` sets everything up and runs the main job, `make test` sets up and runs the tests.
# Both are idempotent: what is already there and still matches is kept.

PYTHON ?= python3
RECIPE ?= ml100k_demo
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test setup clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/rellax assets --recipe $(RECIPE)
	$(BIN)/rellax run --recipe $(RECIPE)

# Tests of one process share two workers; those that start several, or Ray, have the machine to themselves.
test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not (distributed or ray or slow_soak)"
	$(PYTEST) -m "(distributed or ray) and not slow_soak"

setup: .venv/ready

# torch first and by itself: on a machine without a GPU this takes the CPU build where one is offered, and nothing that
# follows asks for another. DeepSpeed's build step imports torch, hence no build isolation; its CPU
# collective is compiled once at the end, so that no training or test waits for a compiler.
.venv/ready: pyproject.toml setup.py requirements/constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; pass PYTHON=/path/to/python3.11")'
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: python3 has no venv module; install it first (Debian: apt-get install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint requirements/constraints.txt setuptools wheel packaging ninja
	$(PIP) install --quiet --constraint requirements/constraints.txt torch
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-build-isolation --constraint requirements/constraints.txt --editable '.[all,cpu,dev]'
	$(BIN)/python -m rellax_ds.engine.launch --warm
	touch $@

clean:
	rm -rf work .pytest_cache .mypy_cache .ruff_cache
