# What people do with a checkout. Every target but help and clean sets up what it needs first.
BIN := .venv/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## system libraries, .venv with pinned versions, this package in it
	@tools/setup.sh

demo: setup ## five trials on the twin of the policy that reinforcement learning made, with a report
	$(BIN)/simplevla trial --rig twin_single --task click_bell --trials 5

test: lint ## linters, types, import walls and the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

lint: setup ## ruff, mypy and the import walls alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

lock: setup ## resolve requirements/lock-py3*.txt anew from setup.cfg and requirements/pins.in
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python tools/lock.py

clean: ## remove .venv, caches and build leftovers (runs/ and compiled engines stay)
	rm -rf .venv build install log *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
