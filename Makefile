# Each target sets up what it needs in .venv (nothing outside this folder) and can be repeated; `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The reference stack: torch 2.11.0 (CUDA 13.0 build), torchvision 0.26.0, triton 3.6.0.
CONSTRAINTS ?= constraints.txt
STAMP  := $(VENV)/.installed
NATIVE := $(shell find csrc -type f)

.PHONY: help setup demo test lint bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with the reference stack and the package (editable, native code built)

$(VENV)/.python:
	@echo "==> $(VENV): a virtual environment of $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stack: $(VENV)/.python $(CONSTRAINTS)
	@echo "==> $(VENV): torch and the build tools (about 3 GB once)"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) setuptools wheel ninja pybind11 torch torchvision
	@touch $@

$(STAMP): $(VENV)/.stack setup.py pyproject.toml $(NATIVE)
	@echo "==> $(VENV): atop_fast with its native code"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[vision,demo,track,test,lint,bench]'
	@$(BIN)/python -m atop_fast.env
	@touch $@

demo: $(STAMP) ## AToP on MNIST digits, from training to runs/demo/report.html
	$(BIN)/atop-fast demo

test: $(STAMP) ## the whole test suite, with the number of tests of every backend checked
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --assert-counts --require-backends eager,cpp,triton

lint: $(STAMP) ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

bench: $(STAMP) ## atop_fast against other libraries, eager mode and torch.compile: runs/bench.json, .png
	$(BIN)/atop-fast bench --json runs/bench.json --plot runs/bench.png

clean: ## remove .venv and everything built
	rm -rf $(VENV) build *.egg-info atop_fast/*.so .pytest_cache .mypy_cache .ruff_cache
