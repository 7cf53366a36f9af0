# make quickstart: from a clean clone to printed stories. make test: the whole suite. make check: lint, types, tests.
# make faults: every fault in full (kills, damage, full disks, odd input, a long run), with a tally; a quarter of an hour on
# two quiet cores, most of it for more than a hundred kills.
PYTHON ?= python3
VENV ?= .venv
# The CUDA 12 wheels where the driver shows a GPU, the CPU wheels elsewhere; override with REQUIREMENTS=requirements.txt.
REQUIREMENTS ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo requirements.txt; else echo requirements-cpu.txt; fi)
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: setup quickstart test faults lint check clean

# Each set of packages has its own mark, so that another one is installed over it.
SETUP := $(VENV)/.setup-$(basename $(notdir $(REQUIREMENTS)))

setup: $(SETUP)
	@echo "activate the environment with: . $(BIN)/activate"

$(SETUP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: Python {v[0]}.{v[1]} is too old; install 3.11 or newer, or run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of $(REQUIREMENTS), which takes minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@rm -f $(VENV)/.setup-requirements*
	@touch $@

$(VENV)/.setup-dev: $(SETUP) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(SETUP)
	$(BIN)/python scripts/train.py --config configs/quickstart.py --workdir $(WORKDIR)
	$(BIN)/python scripts/sample.py --checkpoint $(WORKDIR) --num_samples 3 --temperature 0.8
	@echo "before commands of your own: . $(BIN)/activate"

test: $(VENV)/.setup-dev
	@# Two at a time: more would take several gigabytes each, and disturb those that look at the clock.
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadscope

faults: $(VENV)/.setup-dev
	FAULTS=full JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/faults

lint: $(VENV)/.setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

clean:
	rm -rf $(VENV)
