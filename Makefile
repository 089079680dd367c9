# Each target sets up what it needs in .venv (nothing outside this folder) and can be repeated; `make help` lists them.

# Without pipefail, a failed compiler would pass if the command that reads its output succeeds.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The reference stack: torch 2.11.0 (CUDA 13.0 build), torchvision 0.26.0, triton 3.6.0.
CONSTRAINTS ?= constraints.txt
# Without byte code, each of hundreds of processes would compile torch anew: the set-up leaves that to the first import.
unexport PYTHONDONTWRITEBYTECODE
STAMP  := $(VENV)/.installed
# The CUDA library only where a GPU is visible: it takes minutes, and nothing else loads it. The wheel holds it anyway.
BUILD  := $(or $(ATOP_FAST_BUILD),local)
NATIVE := $(shell find csrc -type f)

.PHONY: help setup demo test test-slow test-all lint bench fuzz faults sanitize docs dist wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

setup: $(STAMP) ## make .venv with the reference stack and the package (editable, native code built)

$(VENV)/.python:
	@echo "==> $(VENV): a virtual environment of $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stack: $(VENV)/.python $(CONSTRAINTS)
	@echo "==> $(VENV): torch and the build tools (about 3 GB once)"
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) setuptools wheel ninja pybind11 torch torchvision
	@touch $@

$(VENV)/.native: $(VENV)/.stack setup.py $(NATIVE)
	@echo "==> $(VENV): the native code of atop_fast"
	@mkdir -p build
	@PATH="$(abspath $(BIN)):$$PATH" ATOP_FAST_BUILD=$(BUILD) $(BIN)/python setup.py -q build_ext --inplace --force 2>&1 \
	    | tee build/native.log | grep --line-buffered '^atop_fast:' || { tail -n 60 build/native.log; false; }
	@touch $@

# It waits for the package index most of the time, so that `make -j2` has it beside the compiler.
$(VENV)/.packages: $(VENV)/.stack setup.py pyproject.toml
	@echo "==> $(VENV): atop_fast and what it and its tests need"
	ATOP_FAST_BUILD=none $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation -c $(CONSTRAINTS) -e '.[vision,demo,track,test,lint,bench]'
	@touch $@

$(STAMP): $(VENV)/.native $(VENV)/.packages
	@$(BIN)/python -m atop_fast.env
	@touch $@

demo: $(STAMP) ## AToP on MNIST digits, from training to runs/demo/report.html
	$(BIN)/atop-fast demo

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --require-backends eager,cpp,triton

test: $(STAMP) ## every op in every backend, every module, the main job from end to end; tests counted by backend
	$(PYTEST) --assert-counts fast

test-slow: $(STAMP) ## the second tier alone: processes, kills, random faults, compilers, examples, packaging
	$(PYTEST) --assert-counts slow -m slow

test-all: test test-slow ## both tiers

lint: $(STAMP) ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

bench: $(STAMP) ## atop_fast against other libraries, eager mode and torch.compile: runs/bench.json, .png
	$(BIN)/atop-fast bench --json runs/bench.json --plot runs/bench.png

# Inputs for each of about 60 targets; every run generates new inputs, and failing inputs are kept in .hypothesis.
FUZZ_INPUTS ?= 250

fuzz: $(STAMP) ## at least 10,000 random inputs for ops, transforms, attacks, options and files: about ten minutes
	ATOP_FAST_FUZZ=$(FUZZ_INPUTS) ATOP_FAST_FUZZ_FLOOR=10000 $(BIN)/python -m pytest tests/fuzz

faults: $(STAMP) ## 40 faults in trainings and evaluations; each must lose nothing that was saved and end equal
	$(BIN)/python benchmarks/faults.py

# The library under AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own. Python is not
# instrumented, so the sanitizer is loaded first, and its leaks, and torch's, are not looked for.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZE_TESTS ?= tests/fuzz/test_ops.py tests/ops

sanitize: $(STAMP) ## the op tests on a CPU library with sanitizers, and the kernels' loops on threads under ThreadSanitizer
	PATH="$(abspath $(BIN)):$$PATH" ATOP_FAST_BUILD=cpu ATOP_FAST_DEBUG=1 CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	    $(BIN)/python setup.py -q build --build-base build/sanitize >/dev/null
	PYTHONPATH="$$(echo build/sanitize/lib.*)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	    $(BIN)/pytest -p no:cacheprovider -m "not gpu and not slow" -k "not compile and not opcheck and not triton" $(SANITIZE_TESTS)
	CXX="$${CXX:-c++}" tests/fuzz/sanitize.sh thread 500

docs: $(VENV)-docs/.installed ## the documentation site, every warning an error: runs/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build

# A separate environment, because mkdocs-material and torchattacks need different versions of requests; the site needs
# neither torch nor the package.
$(VENV)-docs/.installed: constraints-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --no-compile -c constraints-docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

dist: $(VENV)/.stack ## a wheel in dist/, with CUDA for TORCH_CUDA_ARCH_LIST (all architectures if unset)
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

wheel: dist ## the same, installed into a clean environment and tried out from outside of this folder
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet -c $(CONSTRAINTS) dist/*.whl
	cd / && $(abspath $(VENV)-wheel)/bin/python $(abspath tests/smoke.py)

clean: ## remove the environments and everything built
	rm -rf $(VENV) $(VENV)-docs $(VENV)-wheel build dist *.egg-info atop_fast/*.so .pytest_cache .mypy_cache .ruff_cache
