# Everything here is also a plain command; each target sets up what it needs. `make` alone lists the targets.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.installed

.PHONY: help setup train test test-slow test-wheel test-gpu bench bench-gpu gpu-kit lint format clean

help:                      ## this list
	@echo "make TARGET; with PYTHON=python3.12 another Python, with PYTEST_ARGS=\"-k nms -x\" arguments for the tests"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "    make %-11s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

setup: $(READY)            ## virtual environment with everything, and the pre-commit hooks
	$(BIN)/pre-commit install

train: $(READY)            ## generate the default data set, train, evaluate, leave pictures in runs/default
	$(BIN)/python train/main.py --out runs/default

test: $(READY)             ## the whole suite for a machine without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(READY)        ## what takes minutes: the whole golden training curves
	$(BIN)/python -m pytest -m slow --ignore tests/packaging $(PYTEST_ARGS)

test-wheel: $(READY)       ## wheel and sdist in empty environments; needs a package index
	$(BIN)/python -m pytest -m slow tests/packaging $(PYTEST_ARGS)

test-gpu: $(READY)         ## what needs a CUDA GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: $(READY)            ## kernels on this machine, side by side; under 5 minutes on 2 cores
	$(BIN)/python -m bench.deform_conv

bench-gpu: $(READY)        ## everything there is to measure on a GPU
	$(BIN)/python -m bench.gpu

gpu-kit: $(READY)          ## fill .gpu for a bare GPU machine: wheels, compiled kernels, scripts
	$(BIN)/python -m bench.gpu_kit.build

lint: $(READY)             ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)           ## let ruff correct and format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                     ## remove what can be made again: environment, caches, built files; data and runs stay
	rm -rf .venv .gpu build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find triton_dcn detector train bench tests examples -name __pycache__ -prune -exec rm -rf {} +
