# From a fresh clone to a result with one command: `make demo` shows the defence, `make test` proves it.
#
# Everything lives in .venv, which needs nothing but Python 3.10 or later, a C++ compiler and a package index.
# Each step leaves a stamp in .venv, so a second run installs nothing, and a change below csrc/ only recompiles
# what it touches.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
PRESETS ?= release asan ubsan tsan
# Compilers at once; without a number all sources would be compiled together, and need more memory than there is.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
DATASETS ?= digits mnist fashion_mnist
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# torch compiles with $CXX or c++; make's own default for CXX is no wish of the user
COMPILER := $(if $(filter environment command,$(firstword $(origin CXX))),$(CXX),c++)
# Another TORCH or another PYTHON is another installation
KEY := $(shell printf '%s' '$(TORCH) $(PYTHON)' | cksum | cut -d' ' -f1)
TORCH_STAMP := $(VENV)/.torch-$(KEY)
INSTALLED := $(VENV)/.installed-$(KEY)
BUILT := $(VENV)/.built-$(KEY)
TOOLS := $(VENV)/.tools-$(KEY)
SOURCES := $(shell find csrc \( -name tests -o -name execution \) -prune -o -type f -print)
CUDA_VENV := .venv-cuda
CUDA_STAMP := $(CUDA_VENV)/.torch-$(shell printf '%s' '$(CUDA_TORCH) $(PYTHON)' | cksum | cut -d' ' -f1)
CMAKE = $(shell command -v cmake || echo $(BIN)/cmake)
CTEST = $(shell command -v ctest || echo $(BIN)/ctest)

.PHONY: help install demo test test-slow lint format weights bench cpp-test cuda-check cuda-build clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(BUILT) ## defend 100 handwritten digits and show the result (out/demo)
	$(PY) -m defgan_fast demo $(ARGS)

test: $(BUILT) ## prove the product: every promise, in minutes; ARGS="python_tests/plan" for one folder
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(BUILT) ## run the other tests: new installations, CUDA sources executed on the CPU, planted bugs
	$(PY) -m pytest -m slow $(ARGS)

install: $(BUILT) ## create .venv, install torch and the package, compile the extension

lint: $(TOOLS) $(BUILT) ## ruff, mypy, import-linter and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(TOOLS) ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

weights: $(BUILT) ## train the shipped networks anew (hours), measure and pack them; DATASETS="mnist" for one
	for dataset in $(DATASETS); do \
	  $(PY) -m defgan_fast train weights --dataset $$dataset --out defgan_fast/weights $(ARGS) || exit 1; \
	done

bench: $(BUILT) $(TOOLS) ## measure the kernels against their peers (minutes; on a quiet machine)
	$(PY) -m defgan_fast bench $(ARGS)

cpp-test: $(TOOLS) ## the kernels' C++ tests, plain and under three sanitizers; PRESETS="release" for one
	@for preset in $(PRESETS); do \
	  echo "== $$preset" && \
	  $(CMAKE) --preset $$preset && \
	  $(CMAKE) --build --preset $$preset --parallel $(JOBS) && \
	  $(CTEST) --preset $$preset $(ARGS) || exit 1; \
	done

cuda-check: ## compile the CUDA kernels for every architecture and judge registers and spills; nvcc, no GPU
	$(PYTHON) tools/cuda_check.py $(ARGS)

# Not editable: its module would take the place of the one in .venv. pytest, unlike python -m pytest, imports the
# installed package and not the checkout.
cuda-build: $(CUDA_STAMP) ## build and import the extension against a CUDA torch in .venv-cuda; nvcc, no GPU
	@mkdir -p build
	$(CUDA_VENV)/bin/python -m pip install --no-deps --no-build-isolation --force-reinstall -v . > build/cuda-build.log 2>&1 \
	  || { tail -50 build/cuda-build.log; exit 1; }
	grep 'defgan_fast: ' build/cuda-build.log
	DEFGAN_EXPECT_CUDA=1 $(CUDA_VENV)/bin/pytest -p no:cacheprovider python_tests/kernels_cuda/test_cuda.py python_tests/commands/test_info.py $(ARGS)

clean: ## remove what was compiled
	rm -rf build dist *.egg-info defgan_fast/*.so defgan_fast/_C.json .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
	rm -f $(VENV)/.built-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environments
	rm -rf $(VENV) $(CUDA_VENV)

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or later is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@command -v $(firstword $(COMPILER)) >/dev/null || { \
	  echo "A C++ compiler is needed, and '$(firstword $(COMPILER))' was not found; on Debian and Ubuntu:" \
	       "apt install g++. Another one: CXX=clang++ make" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel pybind11 ninja
	$(PY) -m pip install $(TORCH) numpy
	@touch $@

$(INSTALLED): $(TORCH_STAMP) pyproject.toml setup.py MANIFEST.in defgan_fast/kernels/build.py defgan_fast/_version.py
	@echo 'Installing the package and compiling its kernels, once (one to three minutes)'
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable '.[test]'
	@touch $@

$(CUDA_STAMP):
	$(PYTHON) -m venv --clear $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --upgrade pip setuptools wheel pybind11 ninja
	$(CUDA_VENV)/bin/pip install $(CUDA_TORCH) numpy safetensors scikit-learn pillow tqdm pytest pytest-benchmark expecttest
	@touch $@

# The installation has compiled everything; afterwards only what changed is compiled again.
$(BUILT): $(INSTALLED) $(SOURCES)
	$(PY) -W ignore setup.py --quiet build_ext --inplace
	@touch $@

$(TOOLS): $(INSTALLED)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@
