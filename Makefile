# `make demo` and `make test` set up .venv by themselves; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A file of versions that pip has to take, and the factor on a rehearsal's limits.
PINS   ?=
STRETCH ?= 1

.PHONY: help setup demo test faults rehearse lint format clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv and install the package with all it needs

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "simmp_fast needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the rest into $(VENV): a few minutes and about 6 GB the first time ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(PINS),--constraint $(PINS)) --editable '.[dev]'
	@touch $@

demo: setup ## prepare, train, evaluate and predict on a real MRI template; pictures and a table in demo/
	$(BIN)/simmp-fast demo --out demo

test: setup ## run all tests
	$(BIN)/python -m pytest -m 'not alone' -n auto --maxprocesses 12 --dist worksteal
	$(BIN)/python -m pytest -m alone || [ $$? -eq 5 ]  # 5: there are none, where Triton is missing

faults: setup ## docs/reliability.md: kill, interrupt and fail the program at every call that touches a file (long)
	$(BIN)/python tests/faults

rehearse: setup ## docs/lease.md without a GPU: compile for it, run all calls, cut them and go on
	$(BIN)/python -m bench.warm make rehearsal/warm.tar.xz --cache rehearsal/cache
	$(BIN)/python -m bench.lease rehearse rehearsal --warm rehearsal/warm.tar.xz --stretch $(STRETCH)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the demo's results and caches, keep .venv
	rm -rf demo runs build .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
