# The commands of this repository. Every one of them works from a bare clone: the virtual environment is
# built when first needed and kept until the pins or setup.py change.
#
#   make demo         train a small MuLoCo model on real text, on a CPU, and look at the result
#   make test         the whole suite, without the tests marked slow
#   make test-312     unit and distributed tests on Python 3.12 and the newest Megatron-core
#   make test-matrix  every method x K x layout x precision: long
#   make unit|dist|e2e   one tier
#   make chaos        kill, freeze and starve runs, damage their files: CHAOS_TRIALS seeds of each
#   make gpu-check    check and measure a GPU in ten minutes; without one, what a CPU can check
#   make docs         build the documentation site into build/docs; warnings are errors
#   make fmt|lint|types  one check;   make check: what has to pass before a change is proposed
#   make clean        remove caches and build products; the environments stay

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
GPU_ARGS ?=
CHAOS_TRIALS ?= 20
# Results of `make chaos`. Seeds that they have are skipped.
CHAOS_DIR ?= build/chaos
# Where a GPU is, torch is often installed already, and the pins would replace it by a build without
# CUDA: GPU_PYTHON names the Python that has it.
GPU_PYTHON ?= $(PY)

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STAMP312 := .venv312/.installed
STAMP_DOCS := .venv-docs/.installed
PINS := setup.py requirements/make_venv.sh
# Run on 3.12 as well: everything that touches Megatron-core or depends on the Python version. The
# command line is left to 3.11; it reaches the same code.
SUBSET_312 := tests/unit tests/distributed

# The launcher would otherwise count this machine's accelerators, and threads that wait at a barrier
# would take the time of those that compute.
CPU := DS_ACCELERATOR=cpu OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive}
# The launcher's own default, 29500, collides with any other run on the machine.
FREE_PORT := $(PY) -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'

.PHONY: venv demo test test-312 test-matrix unit dist e2e chaos gpu-check docs fmt lint types check clean
.DEFAULT_GOAL := test

venv: $(STAMP)

$(STAMP): $(PINS) requirements/cpu-py311.txt requirements/cpu-py312.txt
	@requirements/make_venv.sh $(VENV) $(PYTHON)
	@touch $@

$(STAMP312): $(PINS) requirements/cpu-py312.txt
	@requirements/make_venv.sh .venv312 "$$(requirements/find_python312.sh)"
	@touch $@

# An environment of its own: the demo's corpus is made of what is installed in $(VENV).
$(STAMP_DOCS): requirements/make_venv.sh requirements/docs.txt
	@requirements/make_venv.sh .venv-docs $(PYTHON) requirements/docs.txt
	@touch $@

demo: $(STAMP)
	$(PY) -m tools.demo_corpus
	$(CPU) $(VENV)/bin/deepspeed -q --num_accelerators 2 --master_port $$($(FREE_PORT)) \
	    launch/pretrain.py --config configs/cpu_k2.yaml
	$(PY) -m tools.demo_summary

test: $(STAMP)
	$(PY) -m pytest -q -m "not slow" $(PYTEST_ARGS)

test-312:
	@if requirements/find_python312.sh > /dev/null; then \
	    $(MAKE) --no-print-directory $(STAMP312) && \
	    .venv312/bin/python -m pytest -q -m "not slow" $(SUBSET_312) $(PYTEST_ARGS); \
	else \
	    echo "make test-312: SKIPPED, no Python 3.12 on PATH or under pyenv"; \
	fi

test-matrix: $(STAMP)
	$(PY) -m tools.matrix
	$(PY) -m pytest -q -m slow $(PYTEST_ARGS)

unit: $(STAMP)
	$(PY) -m pytest -q tests/unit $(PYTEST_ARGS)

dist: $(STAMP)
	$(PY) -m pytest -q -m "not slow" tests/distributed $(PYTEST_ARGS)

e2e: $(STAMP)
	$(PY) -m pytest -q -m "not slow" tests/e2e $(PYTEST_ARGS)

chaos: $(STAMP)
	@mkdir -p $(CHAOS_DIR)
	@failed=0; for kind in run damage; do \
	    $(PY) -m tests.chaos $$kind --trials $(CHAOS_TRIALS) --out $(CHAOS_DIR)/$$kind.csv || failed=1; \
	done; exit $$failed

gpu-check: $(if $(filter $(PY),$(GPU_PYTHON)),$(STAMP))
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    [ -f data/demo/train.bin ] || $(GPU_PYTHON) -m tools.demo_corpus; \
	fi
	$(GPU_PYTHON) -m tools.gpu_check $(GPU_ARGS)

docs: $(STAMP_DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

fmt: $(STAMP)
	$(PY) -m ruff check --fix-only -q .
	$(PY) -m ruff format -q .

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .

types: $(STAMP)
	$(PY) -m mypy

check: lint types docs test test-312

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
