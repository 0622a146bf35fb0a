# make run      consult the embedded model (first time: builds llama.cpp, some minutes)
# make test     install everything and run the whole suite
# make install  everything: terminal app, trainer, quantizer, test tools
# make lint     ruff and pyright

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# We need neither the vision library nor TLS inside llama.cpp; leaving them out saves a quarter of the build.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: run test install lint clean

run: $(VENV)/base.stamp
	@$(BIN)/pediatricsgpt

test: $(VENV)/all.stamp
	@$(BIN)/python scripts/llama_source.py || echo "Tests against llama.cpp's own vocabularies will be skipped."
	@$(BIN)/python -m pytest

install: $(VENV)/all.stamp

lint: $(VENV)/all.stamp
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/llama.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PediatricsGPT needs Python 3.11 or newer; this is %d.%d. Call: make run PYTHON=python3.11" % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -q -c constraints.txt numpy jinja2
	@$(BIN)/python scripts/build_llama.py
	@touch $@

$(VENV)/base.stamp: $(VENV)/llama.stamp pyproject.toml
	@echo "Installing the terminal app …"
	@PYTHONWARNINGS=ignore $(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/all.stamp: $(VENV)/llama.stamp pyproject.toml
	@echo "Installing the trainer, the quantizer and the test tools (torch is large) …"
	@PYTHONWARNINGS=ignore $(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/base.stamp

clean:
	rm -rf $(VENV) build *.egg-info
