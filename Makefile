# Five verbs. Each installs what it needs into .venv first; nothing else has to be done by hand.
PORT ?= 8000
BIN = .venv/bin
WORKERS ?= $(shell expr $$(nproc) + 2)  # tests wait for other processes nearly half of their time
MONEY = money estimates pricing metering ledger  # every line and branch of these is tested

unexport PYTHONDONTWRITEBYTECODE  # set in many containers; here each process would compile all that it imports anew

.PHONY: run test check bench clean installed servers compiled
.DEFAULT_GOAL := run

run: ## Serve fal if FAL_KEY is set (here or in .env), else the built-in simulator with an account to try it with.
	@tools/bootstrap requirements.txt
	@if [ -n "$$FAL_KEY" ] || grep -qsE '^(export )?FAL_KEY=.' .env; then exec $(BIN)/abhiapi serve --bind 127.0.0.1:$(PORT); \
	else exec $(BIN)/abhiapi serve --sandbox --demo --bind 127.0.0.1:$(PORT); fi

test: ## Everything that has to be true, with coverage of the money modules.
	@$(MAKE) --no-print-directory --jobs check servers compiled
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(MONEY:%=--cov=abhiapi.%) --cov-report=
	$(BIN)/python -m coverage report --fail-under=100

installed:
	@tools/bootstrap requirements-dev.txt

servers:
	@tools/browser
	@tools/servers

compiled: installed  # once, and not by each of the processes that the tests run in
	@$(BIN)/python -m pytest --collect-only -qq >/dev/null || true  # what is wrong the tests will say

check: installed ## Formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: ## This proxy, nginx, the official fal proxy and LiteLLM side by side, then jobs and streams (see bench/RESULTS.md).
	@tools/bootstrap requirements-dev.txt
	$(BIN)/python bench/run.py
	$(BIN)/python bench/run_queue.py

clean: ## Remove what the other verbs made, but never the databases in instance/.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
