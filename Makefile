# make setup | demo | test | lint | clean. Each target makes what it needs in .venv and reuses it afterwards.

VENV := .venv
BIN := $(VENV)/bin

# The first interpreter that runs and is of a supported version; `make PYTHON=/path/to/python3.13 ...` names another.
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.13 python3.14; do \
	$$p -c '$(IS_SUPPORTED)' >/dev/null 2>&1 && { command -v $$p; break; }; done)

# Arguments of `lobra demo` and of pytest.
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

# PARITY=1 also installs torch, transformers and peft, and so runs the tests that compare with them (large).
PARITY ?= 0
TORCH ?= torch==2.13.0
ifeq ($(PARITY),1)
TEST_STAMP := $(VENV)/.installed-dev-notebooks-parity
else
TEST_STAMP := $(VENV)/.installed-dev-notebooks
endif

comma := ,
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   install into $(VENV), with what the tests and notebooks need"
	@echo "make demo    train six tasks on simulated devices; DEMO_ARGS=\"--out DIR --steps N\""
	@echo "make test    lint, import contracts and tests; PARITY=1 compares with torch, transformers and peft too"
	@echo "make lint    ruff and the import contracts alone"
	@echo "make clean   remove caches and build outputs ($(VENV) stays)"

setup: $(TEST_STAMP)

demo: $(VENV)/.installed
	$(BIN)/lobra demo $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo_out
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >=3.11,<3.15 found: name one, as in make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_SUPPORTED)' || { echo "$(PYTHON) is not a Python >=3.11,<3.15" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# A stamp's name lists the extras that were installed; a larger set stands for the smaller ones too.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(INSTALL) $(if $(findstring parity,$*),"$(TORCH)") --editable ".[$(subst -,$(comma),$*)]"
	@touch $(VENV)/.installed $(patsubst %-parity,%,$@) $@
