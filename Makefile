# Everything works from a fresh clone with Python (3.10 to 3.13) and pip alone: the first target that needs the
# environment makes it, in .venv; later runs use it as it is.
#
#   make demo                       a real model, before and after, with proof
#   make test                       the tests; ARGS="tests/test_readme.py -x" passes pytest's own arguments
#   make lint types                 ruff; mypy --strict
#   make bench                      the BERT comparison (minutes); ARGS as for benchmarks/bert_tools.py
#   make tables                     the tables of README and docs/ again, from the code and benchmarks/results/
#   make clean                      remove the environment and every build output
#
# PYTHON=python3.12 picks the interpreter, TORCH=torch==2.9.1 the PyTorch (make clean first when changing either).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two test processes of one thread each: the suite is many small models, which more threads only slow down.
TEST_WORKERS ?= 2

.PHONY: demo test lint types bench tables clean env
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/accelkit demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/bert_tools.py $(ARGS)

tables: $(STAMP)
	$(BIN)/python docs/generate_tables.py

env: $(STAMP)

# PyTorch goes in first and alone, at a version that has CPU builds: where pip is configured to find one, it takes that,
# and the second command, which finds the requirement met, pulls in no CUDA packages.
# A Python without ensurepip (Debian's, without python3-venv) gets pip from the pip it has.
# The stamp depends on pyproject.toml because an editable install must be repeated before a new entry point is seen.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("accelkit needs Python 3.10 to 3.13, and $(PYTHON) is " + sys.version.split()[0] + "; pass PYTHON=python3.12, for example")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
