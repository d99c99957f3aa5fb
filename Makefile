# Every target works from a bare checkout: it creates .venv, installs the pinned requirements, builds
# the library and runs. A second run repeats none of that; the library is rebuilt where sources changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test bench lint format clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# CUDA code for the GPUs that are here, or for one architecture; the packages that pip builds have it for all.
ifndef TORCH_CUDA_ARCH_LIST
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9.]*' | sort -u)
build .venv/editable.stamp: export TORCH_CUDA_ARCH_LIST = $(or $(GPUS),9.0)
endif

help:
	@echo "make demo    fuse a ResNet-50 with CBAM, compare, time and train it (examples/demo.py)"
	@echo "make test    run the tests"
	@echo "make bench   measure against eager PyTorch and torch.compile; tables, and JSON in benchmarks/results"
	@echo "make lint    ruff and clang-format, nothing is changed"
	@echo "make format  the same, changing the files"
	@echo "make build   build the library (CXX, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, CBAM_FUSED_CPP=0, CBAM_FUSED_CUDA=0 are honoured)"
	@echo "make clean   remove what was built; .venv stays"

.venv/requirements.stamp: requirements.txt
	@echo "Installing requirements.txt into .venv (minutes, the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/editable.stamp: .venv/requirements.stamp pyproject.toml setup.py build_library.py build_cuda.py
	$(BIN)/python setup.py -q build_library --inplace
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

build: .venv/editable.stamp
	@$(BIN)/python setup.py -q build_library --inplace

demo: build
	$(BIN)/python -m examples.demo

# Small tests on many cores: parallel over tests, one thread each where a test does not ask for more.
# Then the Triton kernels in Triton's interpreter, and the CUDA kernels in the harness of tests/simt.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

test: build
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST)
	CBAM_FUSED_SIMT=1 $(PYTEST)

# BENCH_ARGS=--quick: a few configurations.
bench: build
	$(BIN)/python -m benchmarks --json $(BENCH_ARGS)

lint: .venv/requirements.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: .venv/requirements.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist cbam_fused/lib cbam_fused.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
