# SPDX-License-Identifier: Apache-2.0
# The front door. Every target works from a fresh clone; `make` lists them.
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find CMakeLists.txt pyproject.toml README.md LICENSE cmake include kernels src python third_party tools \
             -type f -not -path '*/__pycache__/*')
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup demo test test-gpu kernels bench format clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "Options go through ARGS, as in: make demo ARGS=\"--steps 50 --attention dense\""

setup: $(VENV)/.project  ## Install what is missing into .venv (and, if needed, distribution packages)

$(VENV)/.packages: tools/setup.sh
	tools/setup.sh packages
	tools/setup.sh venv $(VENV)
	touch $@

$(VENV)/.tools: $(VENV)/.packages requirements-dev.txt
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.project: $(VENV)/.tools $(SOURCES)
	$(PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps .
	touch $@

# Threads of torch that wait for work by spinning hold up the library's: on a busy host of two cores a step took 1.25 times as long.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: setup  ## Train small language models on real text; writes runs/<name>/index.html
	$(PYTHON) examples/train_byte_lm.py $(ARGS)

test: setup  ## Run every check; ARGS names some of: format layers cpp symbols kernels consumer python asan
	$(PYTHON) tools/run_tests.py $(ARGS)

test-gpu:  ## On a Hopper GPU, with python3 as it is (torch, CUDA): tests, benchmark, tests/gpu/report.json
	python3 tests/gpu/run.py $(ARGS)

kernels: setup  ## Compile every GPU kernel, without a GPU; prints registers, spills, instructions
	$(PYTHON) tools/run_tests.py kernels

bench: setup  ## Measure against torch's own attention
	$(PYTHON) benchmarks/bench.py $(ARGS)

format: $(VENV)/.tools  ## Rewrite the sources in the project's style
	find include src python/bindings tests examples benchmarks tools -name '*.h' -o -name '*.cpp' | xargs clang-format -i
	ruff check --fix python tests examples benchmarks tools
	ruff format python tests examples benchmarks tools

clean:  ## Remove build outputs, keep .venv and runs
	rm -rf build dist results .pytest_cache .hypothesis .ruff_cache
	rm -f $(VENV)/.project
