# `make train` and `make test` do all of the set-up themselves.  PIP_ARGS goes to pip: docs/installation.md says when you need it.
PYTHON ?= python3
PIP_ARGS ?=
BENCH_ARGS ?=
FULL_ARGS ?=
GPU_ARGS ?=
SOAK_ARGS ?=
GPU_PYTHON ?=
# how many processes run tests; each starts ranks beside it
TEST_PROCESSES ?= 2
PARALLEL = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
BIN = .venv/bin
MARK = .venv/.installed

# tests start hundreds of processes, which would each compile the package anew where bytecode is not written
test test-long test-full: export PYTHONDONTWRITEBYTECODE =

.PHONY: help train test test-long test-full lint docs bench bench-exchange bench-strategy bench-callbacks gpu clean

help:
	@echo "make setup      the environment .venv, which the other targets make where it is missing"
	@echo "make train      set up, then train a small byte-level model on this machine's CPU"
	@echo "make test       set up, then run the quick tests"
	@echo "make test-long  the long tests, and the property tests with more cases"
	@echo "make test-full  all tests, the matrices and soaks among them; goes on where it was stopped; FULL_ARGS and SOAK_ARGS, see --help"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the docs site, into build/docs; first its pictures and notebooks"
	@echo "make bench      attention against its peers, then one screen of ratios; results in benchmarks/results; BENCH_ARGS, see --help"
	@echo "make bench-exchange   the exchanges between ranks, likewise"
	@echo "make bench-strategy   a training step beside Lightning's own strategies"
	@echo "make bench-callbacks  what the callbacks cost of a step"
	@echo "make gpu        tests and measures on a CUDA device; goes on where it was stopped; GPU_ARGS, see --help;"
	@echo "                GPU_PYTHON=python3 uses what is installed"

$(MARK): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v.major}.{v.minor}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: setup
setup: $(MARK)

train: $(MARK)
	$(BIN)/longnet fit --config configs/quickstart.yaml

test: $(MARK)
	$(BIN)/python -m pytest $(PARALLEL) -m "not long and not full" --draws few --no-skips

test-long: $(MARK)
	$(BIN)/python -m pytest $(PARALLEL) -m "(long or hypothesis) and not full" --draws half --no-skips

test-full: $(MARK)
	$(BIN)/python tests/full.py $(FULL_ARGS)
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

lint: $(MARK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(MARK)
	$(BIN)/python docs/draw.py
	$(BIN)/python docs/pages.py
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

bench: $(MARK)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/attention.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/ratios.py

bench-exchange: $(MARK)
	$(BIN)/python benchmarks/exchange.py $(BENCH_ARGS)

bench-strategy: $(MARK)
	$(BIN)/python benchmarks/strategy.py $(BENCH_ARGS)

bench-callbacks: $(MARK)
	$(BIN)/python benchmarks/callbacks.py $(BENCH_ARGS)

gpu: $(if $(GPU_PYTHON),,$(MARK))
	PYTHONPATH=. $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py $(GPU_ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
