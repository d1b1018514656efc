# Every target makes what it needs: `make demo` and `make test` work on a fresh clone with Python >= 3.11, make and a C++ compiler.
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet
# More arguments for the command of a target, as in `make test ARGS='-k router'`.
ARGS ?=

TEXT_CONFORMANCE := $(addprefix tests/frontend/test_,templates.py tool_parser.py meta_tokenizers.py infilling.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve hosts simulate test chart chart-golden determinism layouts chaos mutants conformance test-full lint type fmt protos bench bench-roof bench-gpu bench-peers bench-recovery bench-pipeline bench-experts bench-models clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp-install $(VENV)/.stamp-wheels  ## make .venv with everything that the other targets need

demo: setup  ## start Ray, serve remuda-tiny with tp=2 ep=2, stream an answer over gRPC and one over HTTP, clean up
	$(PY) bench/demo.py $(ARGS)

serve: setup  ## serve remuda-tiny, or ARGS='MODEL --tp 2 ...'
	$(VENV)/bin/remuda serve $(ARGS)

# Hosts to make.
N ?= 3

hosts: setup  ## N=4 hosts (network namespaces) to try things on by hand; says how to enter them and how to break links
	@$(PY) -m tests.support.hosts.by_hand $(N)

# Files of tests that run at a time; much of each is waiting for processes to start.
JOBS ?= 2

test: setup  ## the whole test run: linters, types, import contracts, unit, integration
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

layouts: setup  ## every legal layout with at most 8 ranks, on one host and over three, against transformers; writes docs/layouts.md
	$(PY) -m tests.layouts $(ARGS)

chart: setup  ## the Helm chart: lint, refusals, renders against Kubernetes' schemas, policies, a life against a mock API server
	$(PY) -m pytest tests/chart $(ARGS)

chart-golden: setup  ## write what is made from the chart and kept: presets, its README.md, golden renders
	$(PY) -m tests.chart.regenerate

# Deployments to simulate.
SEEDS ?= 2000

simulate: setup  ## SEEDS=2000 simulated deployments with faults, then every single fault of a small one; a failing seed can be repeated
	$(PY) -m cluster.simulate --seeds $(SEEDS) $(ARGS)
	$(PY) -m cluster.simulate --explore

mutants: setup .venv-mutants/.stamp  ## small defects in journal, supervisor and block pool: which test or simulation sees each; writes docs/mutants.md
	$(PY) -m tests.mutants $(ARGS)

.venv-mutants/.stamp: tests/mutants/requirements.txt $(VENV)/.stamp-venv
	$(PY) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

chaos: setup  ## kill, stop and cut off every part of real clusters while every kind of request runs; writes docs/chaos.md
	$(PY) -m tests.chaos $(ARGS)

conformance: setup  ## every architecture, format and layout against independent implementations; prints the table
	$(PY) -m pytest -m '' tests/parity tests/layouts tests/quantization tests/gguf tests/lora $(TEXT_CONFORMANCE) --conformance-table $(ARGS)

determinism: setup  ## one request in all batches, chunks and layouts, compared bit by bit, and what that costs (wants make bench-models)
	$(PY) -m tests.determinism.table $(ARGS)

test-full: setup  ## the same with the heavy tests
	$(PY) -m pytest -m '' $(ARGS)

lint: setup  ## ruff, formatting and import contracts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports

type: setup  ## mypy --strict
	$(VENV)/bin/mypy

fmt: setup  ## let ruff sort imports, mend what it can and format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

protos: setup  ## generate cluster/rpc/generated from protos/
	$(PY) protos/generate.py

bench: setup  ## ratios of our host path to a reference measured in the same run, printed and written as JSON
	$(PY) -m bench.run $(ARGS)

bench-roof: setup  ## native kernels and whole steps as fractions of the same-run memory read or GEMM (wants make bench-models)
	$(PY) -m bench.roof $(ARGS)

bench-gpu: setup  ## on a CUDA machine: kernels checked against float64, remuda-tiny served against the CPU; then measured against the GPU's copy and GEMM
	$(PY) -m bench.gpu $(ARGS)

bench-peers: setup  ## us and every installed peer on one checkpoint with the same load, in turns (wants make bench-models)
	$(PY) -m bench.peers $(ARGS)

bench-recovery: setup  ## kill a rank of four while they serve: the gap of the streams, with a spare and without, fails where a promise is missed (wants make bench-models)
	$(PY) -m bench.recovery $(ARGS)

bench-pipeline: setup  ## two stages 5 ms apart: the throughput that is kept, fails below 0.8 (root, iproute2; wants make bench-models)
	$(PY) -m bench.pipeline_delay $(ARGS)

bench-experts: setup  ## skewed experts on ranks of 0.4 CPU, before and after they have moved, fails below 0.9 of an even load (root)
	$(PY) -m pytest -m full -s tests/engine/test_zipf_load.py $(ARGS)

bench-models: setup  ## build the benchmark checkpoints in REMUDA_BENCH_CACHE, or only ARGS='dense-1b'
	$(PY) bench/make_models.py $(ARGS)

clean:  ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist out .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find cluster engine protos tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once; it is brought up to date whenever what it should hold changes.
$(VENV)/.stamp-venv:
	@for python in python3.11 python3.12 python3; do \
	  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 || continue; \
	  suitable=$$python; \
	  if $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$suitable" ]; then \
	  echo "Remuda needs Python 3.11 or 3.12: none of python3.11, python3.12 and python3 on PATH is one. Install it and run make again." >&2; \
	  exit 1; \
	elif [ -z "$$found" ]; then \
	  echo "$$suitable cannot make virtual environments: install its venv module (Debian and Ubuntu: apt install $$suitable-venv) and run make again." >&2; \
	  exit 1; \
	fi; \
	[ -x $(PY) ] || $$found -m venv $(VENV)
	@touch $@

# torch comes first and alone, so that everything after it finds the build that this machine's pip prefers (CPU or CUDA).
$(VENV)/.stamp-install: $(VENV)/.stamp-venv pyproject.toml constraints.txt $(wildcard engine/kernels/native/*.cpp engine/kernels/native/*.h)
	@echo "installing into $(VENV) (torch first; a few minutes on a fresh machine)"
	$(PIP_INSTALL) torch -c constraints.txt
	$(PIP_INSTALL) -e '.[test]' -c constraints.txt
	@touch $@

# Only read by tests, for the tokenizers inside; installed it would put a package named `models` on the path.
$(VENV)/.stamp-wheels: $(VENV)/.stamp-venv
	$(PY) -m pip download --disable-pip-version-check --quiet --no-deps --dest $(VENV)/wheels llama-models==0.3.0
	@touch $@
