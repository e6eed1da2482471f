# `make quickstart` and `make test` set up everything they need in .venv; only Python 3.11 or later, pip and make are assumed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits_mlp

# Packages are installed without byte code. It is kept from the first import on, where an environment says otherwise too:
# every program would spend half of its start on compiling what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart pictures test test-slow lint format benchmark results results-more results-quick clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: $(VENV)/installed  ## Make .venv with pinned versions of everything.

quickstart: setup  ## Train on real digits in four ways and write a report (five to fifteen minutes).
	$(BIN)/python -m experiments.compare --config=configs/digits_mlp.py --workdir=$(WORKDIR)

pictures: quickstart  ## Renew the pictures and figures the README shows from the quickstart's run.
	$(BIN)/python -m experiments.report --workdir=$(WORKDIR)
	cp $(addprefix $(WORKDIR)/,figures/learning_curves.png figures/loss_shapes.gif summary.json) docs/images/

test: setup  ## Lint, and run all tests but the slow ones.
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

test-slow: setup  ## Run the slow tests; installs PyTorch, higher and TorchOpt to compare with, Weights & Biases and gymnax.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,bench,wandb,rl]"
	$(BIN)/python -m pytest -m slow

lint: setup  ## Check style, types and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: setup  ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup  ## Measure the cost of a step and of several seeds (two minutes).
	$(BIN)/python -m experiments.benchmark --suite=step --suite=seeds --config=configs/digits_mlp.py --steps=20 --rounds=5

STUDY := $(BIN)/python -m experiments.study
JOBS ?= 2

results: setup  ## Make every table of docs/results.md anew, by the command above it: a long night on two cores; goes on where it was stopped.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[rl]"
	$(call anew,docs/results.md)

results-more: setup  ## Make every table of docs/results_more.md anew: about a day on two cores.
	$(call anew,docs/results_more.md)

# Runs the commands that write into a page, each once.
anew = sed -n 's|^\.venv/bin/\(python -m experiments\..* --write=$(1)\)$$|$(BIN)/\1|p' $(1) | sed '/experiments\.study/s/$$/ --jobs=$(JOBS)/' | awk '!seen[$$0]++ { print $$0 " </dev/null" }' | sh -ex

results-quick: setup  ## Make a reduced form of half of the studies on digits, in seven minutes: that they work, not what comes out.
	$(STUDY) --study=clean_labels --comparison=mnist_mlp --quick
	$(STUDY) --study=behaviour --comparison=behaviour_mnist_mlp --quick
	$(STUDY) --study=noisy_labels --comparison=mnist_mlp_80 --arm=decayed --arm=fine_tuned --arm=generalized --arm=reweighting --quick
	$(STUDY) --study=thrift --comparison=thrift_mnist_mlp --arm=quarter --quick
	$(STUDY) --study=transfer --comparison=transfer_mnist_mlp --quick
	$(STUDY) --study=past_the_paper --comparison=past_digits_mlp --arm=shape_linear --quick

clean:  ## Remove the environment and caches; runs/ stays.
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache *.egg-info
