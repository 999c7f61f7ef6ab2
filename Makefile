# Needs Python 3.11+, make and pip. Everything else is installed into .venv/ by the first target that needs it.
PYTHON ?= python3
ENGINE ?= vllm
MODEL ?= hrm-text-nano
PORT ?= 8000
ARGS ?=

SETUP := $(PYTHON) tools/setup_env.py
BIN := .venv/vllm/bin
SERVE_vllm := vllm serve --model $(MODEL)
SERVE_sglang := python -m sglang.launch_server --model-path $(MODEL)

.PHONY: help serve test lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)
	@echo 'variables: PORT=$(PORT) MODEL=$(MODEL) ENGINE=$(ENGINE) PYTHON=$(PYTHON) ARGS="more arguments"'

# On a CPU, GiB of KV cache.
serve: export VLLM_CPU_KVCACHE_SPACE ?= 2
# On a GPU vLLM's command line would have the engine's process import everything once more.
serve: export VLLM_WORKER_MULTIPROC_METHOD ?= fork
serve:  ## start an OpenAI-compatible server on MODEL at PORT
	@$(SETUP) $(ENGINE)
	@PATH="$(CURDIR)/.venv/$(ENGINE)/bin:$$PATH" exec .venv/$(ENGINE)/bin/$(SERVE_$(ENGINE)) --port $(PORT) $(ARGS)

test:  ## run the tests, each engine's in its own environment, two at a time on a CPU; ARGS="-k spans", "-n0 -s" and the like go to pytest
	@exec $(PYTHON) tools/run_tests.py $(ARGS)

lint:  ## ruff and mypy
	@$(SETUP) vllm --dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: export VLLM_CPU_KVCACHE_SPACE ?= 2
bench:  ## measure the engines side by side on MODEL, by default a smoke run; ARGS="--size full --dummy" and the like
	@$(SETUP) vllm --dev
	@exec $(BIN)/hrm-text bench --model $(MODEL) $(ARGS)

clean:  ## remove the environments and all caches
	rm -rf .venv build dist *.egg-info shared/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
