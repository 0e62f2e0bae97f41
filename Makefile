# Everything a developer runs. Each target sets up what it needs, starting from python3 and make alone.

PYTHON ?= python3
EXTRAS ?= bench,dev
VENV   := .venv
BIN    := $(VENV)/bin

# A process a core, and so a thread a process, also of those that tests begin. The plugin that measures warns beside the
# one that runs processes, and has nothing to do here.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal -p no:benchmark
ONE_THREAD := OMP_NUM_THREADS=1

# What a caller's shell says about Python, Triton or the backend must not change what a target does.
CLEAN := env -u PYTHONPATH -u PYTHONHOME -u PYTHONWARNINGS -u TRITON_INTERPRET -u SEQCORE_BACKEND -u SEQCORE_NIGHTLY

# `make aot TRITON=3.6.0` compiles with another Triton, from an environment of its own.
ifdef TRITON
AOT_VENV := .venv-triton-$(TRITON)
AOT_TAG  := -triton-$(TRITON)
else
AOT_VENV := $(VENV)
endif

.DEFAULT_GOAL := help
.PHONY: help venv test nightly bench study aot aot-full gpu ledger lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.ready  ## make .venv, with every package pinned

test: $(VENV)/.ready  ## the ordinary suite, the interpreted suite, and every kernel compiled ahead of time
	$(CLEAN) $(ONE_THREAD) $(BIN)/pytest tests $(PARALLEL)
	$(CLEAN) $(ONE_THREAD) TRITON_INTERPRET=1 $(BIN)/pytest tests $(PARALLEL)
	$(CLEAN) $(BIN)/python -m seqcore.testing.aot --out build/aot.json

nightly: $(VENV)/.ready  ## what docs/trust.md promises, with many cases, and the mutants that its tests must kill
	$(CLEAN) $(BIN)/python -m tests.trust $(ARGS)

bench: $(VENV)/.ready  ## measure what this machine can, and write the report (ARGS=... is passed on)
	$(CLEAN) $(BIN)/python -m benchmarks $(ARGS)

study: $(VENV)/.ready  ## measure what is taught about recurrence and attention, and write study/report.html
	$(CLEAN) $(BIN)/python -m benchmarks.study $(ARGS)

aot: $(AOT_VENV)/.ready  ## compile a covering subset of the kernels for every target, no GPU needed (TRITON=3.6.0)
	$(CLEAN) $(AOT_VENV)/bin/python -m seqcore.testing.aot --out build/aot$(AOT_TAG).json $(ARGS)

aot-full: $(AOT_VENV)/.ready  ## compile every kernel in every configuration
	$(CLEAN) $(AOT_VENV)/bin/python -m seqcore.testing.aot --full --out build/aot-full$(AOT_TAG).json $(ARGS)

# On a GPU machine the system's own torch and Triton are the ones to measure, and there may be no network: so
# no environment, and nothing is installed but, if pip can, a link to this checkout, which pip uninstall removes.
gpu:  ## tests, numerics and benchmarks on this machine's GPU, with the system's python3 (OUT=build/gpu)
	$(PYTHON) -m benchmarks.campaign --out $(or $(OUT),build/gpu) $(ARGS)

ledger: $(VENV)/.ready  ## which kernels wait for a GPU; fails if README says other than the results
	$(CLEAN) $(BIN)/python -m benchmarks.ledger --check

lint: $(VENV)/.ready  ## ruff: the rules and the format of imports
	$(BIN)/ruff check .

clean:  ## remove environments, builds and caches
	rm -rf .venv .venv-triton-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments --------------------------------------------------------------------------------------------

define new_environment
@$(CLEAN) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
    { echo "seqcore needs Python 3.10 or newer, and $(PYTHON) is older or missing: try make PYTHON=python3.12" >&2; exit 1; }
@$(CLEAN) $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
    { echo "$(PYTHON) cannot make environments: it lacks venv or ensurepip. On Debian and Ubuntu, install" \
           "python3-venv; or name another interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
$(CLEAN) $(PYTHON) -m venv $(1)
$(CLEAN) $(1)/bin/python -m pip install --quiet -c constraints.txt pip setuptools wheel
endef

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	$(call new_environment,$(VENV))
	$(CLEAN) $(BIN)/python -m pip install -c constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# Triton goes in last and by itself, since torch's CUDA wheel insists on the version it was built with. The
# interpreter of Triton 3.6 does not know NumPy 2.4.
.venv-triton-%/.ready: setup.py pyproject.toml constraints.txt
	$(call new_environment,.venv-triton-$*)
	sed -e '/^triton==/d' -e 's/^numpy==2\.4\.[0-9]*/numpy==2.3.5/' constraints.txt > .venv-triton-$*/constraints.txt
	$(CLEAN) .venv-triton-$*/bin/python -m pip install -c .venv-triton-$*/constraints.txt torch numpy
	$(CLEAN) .venv-triton-$*/bin/python -m pip install --quiet --no-deps triton==$*
	$(CLEAN) .venv-triton-$*/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
