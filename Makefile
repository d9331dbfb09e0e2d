# `make run` and `make test` do all the set-up themselves: the environment is made once and re-made when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/digits_resnet_sgd_ire.yaml
WORKERS ?= 2
# threads of torch in `make run`: on a busy machine two that wait for each other were 9 times slower than one
THREADS ?= 1

# bytecode is kept, inside .venv, even where the shell says not to write any: without it each process compiles torch and
# lightning anew (25 s), and the tests start many
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/$(VENV)/bytecode

.PHONY: help env run test fast format types test-all test-weekly bench claims notebooks lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.installed  ## make the environment in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Expected Python 3.10 or newer, got " + sys.version.split()[0] + ": call make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

run: env  ## train the embedded digits config with SGD-IRE (another one: make run CONFIG=configs/...)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python cli.py fit --config $(CONFIG)

# mypy's first run takes a minute on one core: the tests go on beside it with the other
test: env format  ## lint, types and the fast tests
	@$(MAKE) --no-print-directory -j 2 types fast

fast: env
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'not slow'

test-all: env  ## the long cells too
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m 'slow and not weekly'

test-weekly: env  ## 107 more optimizers, the wide networks with more flags
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m weekly

bench: env  ## measure what a step costs (20 to 60 minutes on one core) and write benchmarks/RESULTS.md and the README's table
	$(BIN)/python benchmarks/step_cost.py --output benchmarks/results/step_cost.json
	$(BIN)/python benchmarks/optimizer_step.py --output benchmarks/results/optimizer_step.json
	$(BIN)/python benchmarks/report.py

claims: env  ## test the paper's claims: makes the runs that benchmarks/claims/results lacks (CLAIMS_SIZE=full: more of them)
	PYTHONPATH=benchmarks $(BIN)/python -m claims
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mask_agreement.py

notebooks: env  ## execute the notebooks again and keep their outputs
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

lint: format types  ## ruff and mypy

format: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

clean:  ## remove caches (keeps logs and the environment)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
