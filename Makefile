# make demo: the whole main job on the packaged checkpoint. make test: the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,tasks

JOBS ?= 3
FAULTS ?= 200
SEED ?= 0

.PHONY: demo test lint docs chaos clean

demo: $(VENV)/.installed
	$(BIN)/was-search demo

# Compiled files are kept, whatever the environment says: each process would compile all tests anew.
test: $(VENV)/.installed
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The page of all options, from the table that they are made of.
docs: $(VENV)/.installed
	$(BIN)/python -m was_search.service.cli.options_page docs/options.md

# The long chaos run; a short one is among the tests.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
