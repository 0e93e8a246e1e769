# make help lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
CHAOS_ARGS ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test chaos simulate bench cluster-up cluster-status cluster-down \
  nightly annotate evaluate plan verify status preflight clean

# What `make nightly` and its like run: make annotate CONFIG=mine.yaml ARGS="--set seed=1"
CONFIGS := jobs/configs
nightly plan verify preflight: CONFIG ?= $(CONFIGS)/quickstart.yaml
annotate: CONFIG ?= $(CONFIGS)/annotate-digits.yaml
evaluate: CONFIG ?= $(CONFIGS)/evaluate-digits.yaml
ARGS ?=

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-38s %s\n", $$1, $$2}'

setup:  ## install into .venv (instant where nothing changed)
	@$(PYTHON) cluster/install.py

quickstart: setup  ## the whole pipeline on a mini-cluster, from nothing to out/quickstart/
	@$(BIN)/python -m cluster.quickstart

check: setup  ## ruff, format, mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: setup  ## 30 kills over a run of 2,000 rows, and a verdict: about 40 minutes (CHAOS_ARGS=--help)
	$(BIN)/python -m tests.chaos.run $(CHAOS_ARGS)

simulate: setup  ## 1 to 512 replicas, simulated, and a check against real runs: docs/simulation.md
	$(BIN)/python -m cluster.simulation --validate

bench: setup  ## measure beside vLLM and ray.data.llm: some hours, can be cut short (BENCH_ARGS=--help)
	@$(BIN)/python -m jobs.bench $(BENCH_ARGS)

cluster-up: setup  ## start a mini-cluster that stays up (S3, Ray head, 2 nodes)
	@$(BIN)/python -m cluster.local up

cluster-status:  ## what of the mini-cluster is alive, and its URLs
	@$(BIN)/python -m cluster.local status

cluster-down:  ## stop the mini-cluster
	@$(BIN)/python -m cluster.local down

nightly annotate evaluate plan verify: up  ## submit that job to the mini-cluster (CONFIG=, ARGS=)
	@. .cluster/env && $(BIN)/python -m cluster.sample && \
	  $(BIN)/ray job submit --working-dir . -- $(abspath $(BIN))/python -m jobs.$@ --config $(CONFIG) $(ARGS)

preflight: up  ## look at the mini-cluster as before a first run on it (CONFIG=, ARGS=)
	@. .cluster/env && $(BIN)/python -m cluster.sample && \
	  $(BIN)/python -m cluster.preflight --config $(CONFIG) $(ARGS)

status: up  ## how the runs in the mini-cluster's bucket stand (ARGS="s3://batch/runs/quickstart --watch")
	@. .cluster/env && $(BIN)/python -m jobs.status $(or $(ARGS),s3://batch/runs/)

.PHONY: up
up:
	@test -f .cluster/env || { echo "no mini-cluster is up: run make cluster-up first" >&2; exit 2; }

clean:  ## remove caches and outputs; .venv stays
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pipeline jobs cluster tests -name __pycache__ -type d -prune -exec rm -rf {} +
