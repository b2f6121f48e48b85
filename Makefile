# `make demo` pretrains a small model on real text; `make test` sets up what is missing and runs
# the tests; `make help` lists the rest. Packages go to .venv, results to runs/.

SHELL := /bin/bash -o pipefail
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKDIR ?= runs/demo
FILES ?=
ARGS ?=
export FILES

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --no-input --disable-pip-version-check -c constraints.txt
# pip without its narration: downloads, builds, warnings and errors are left.
QUIETLY := 2>&1 | awk '!/^ *(Collecting|Requirement already|Looking in|Obtaining|Using cached|Preparing|Checking|Getting|Installing build|Created|Stored|Attempting|Found existing|Uninstalling|Successfully|Processing|Building|━|WARNING: Location)/ \
	{ print substr($$0, 1, 120); fflush() }'

.PHONY: help setup compilers demo test test-all lint format notebooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/setup.stamp ## make .venv with the pinned packages (no torch)

demo: $(VENV)/setup.stamp ## pretrain on local text; FILES='dir/**/*.txt' WORKDIR=runs/demo ARGS='--config...'
	$(BIN)/python -m experiments.pretrain --config=demo --workdir='$(WORKDIR)' \
		$${FILES:+"--config.data.files=$$FILES"} $(ARGS)

test: lint $(VENV)/aot.stamp ## lint, check types and run the tests; ARGS='-k packing'
	$(BIN)/python -m pytest $(ARGS)

test-all: lint $(VENV)/aot.stamp ## the same with the slow tests
	$(BIN)/python -m pytest -m '' $(ARGS)

compilers: $(VENV)/aot.stamp ## what compiles ahead of time for TPUs and GPUs that are not here

lint: $(VENV)/test.stamp ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/test.stamp ## rewrite the code as ruff formats it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

NOTEBOOK_SCRIPTS := $(wildcard notebooks/*.py)
notebooks: $(NOTEBOOK_SCRIPTS:.py=.ipynb) ## generate notebooks/*.ipynb from the percent scripts

notebooks/%.ipynb: notebooks/%.py | $(VENV)/test.stamp
	$(BIN)/jupytext --quiet --update --to ipynb --output $@ $<

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/setup.stamp: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is" \
			"$$($(PYTHON) -V 2>/dev/null || echo not found);" \
			"name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing the packages into $(VENV) (once; about a gigabyte)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e '.[report]' $(QUIETLY)
	@touch $@

$(VENV)/test.stamp: $(VENV)/setup.stamp
	@echo "Installing the test tools and the PyTorch oracles into $(VENV) (once)"
	@$(PIP_INSTALL) -e '.[report,test,peers]' $(QUIETLY)
	@touch $@

# Compilers alone, in a folder of their own: in the environment they would be asked for devices.
$(VENV)/aot.stamp: $(VENV)/setup.stamp
	@echo "Installing the compilers for TPU and H200 into $(VENV)/aot (once; 300 MB)"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/aot libtpu jax-cuda12-plugin jax-cuda12-pjrt $(QUIETLY)
	@touch $@
