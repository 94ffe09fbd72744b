# `make train` and `make test` need python3, make and git, and set up all the rest in .venv.
#
#   make train ARGS="--attention dense --steps 200"
#   make test  ARGS="tests/test_attention.py -k causal"
#   make lint, make format, make clean
#   PYTHON=python3.12 make test      another interpreter

.DEFAULT_GOAL := help
.PHONY: help train test lint format clean
SHELL := /bin/sh

ARGS ?=
PYTHON ?=
JOBS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The interpreter: $(PYTHON), or the first one found that is new enough and can make virtual environments.
# Prints its path, that of the base interpreter where it is one of a virtual environment (.venv itself may be active
# now and go away below), or on standard error one line with the remedy.
define find_python
best=; bare=; old=; \
for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
  version=$$($$candidate -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || continue; \
  if ! $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null; then \
    old="$${old:-$$candidate is Python $$version}"; continue; fi; \
  if ! $$candidate -c 'import venv, ensurepip' 2>/dev/null </dev/null; then \
    bare="$${bare:-$$version}"; continue; fi; \
  best=$$($$candidate -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable))' </dev/null); break; \
done; \
if [ -n "$$best" ]; then echo "$$best"; \
elif [ -n "$$bare" ]; then echo "error: Python $$bare lacks its venv or ensurepip module; install it (Debian, Ubuntu: apt install python$$bare-venv) and run make again." >&2; exit 2; \
elif [ -n "$$old" ]; then echo "error: $$old, and 3.11 or later is needed; install one (Debian, Ubuntu: apt install python3.12 python3.12-venv), or name it: PYTHON=/path/to/python3 make." >&2; exit 2; \
else echo "error: no Python found$(if $(PYTHON), as $(PYTHON)); install Python 3.11 or later with its venv module (Debian, Ubuntu: apt install python3 python3-venv)." >&2; exit 2; fi
endef

# The CUDA extra that the driver's version asks for, or nothing: then JAX computes on the CPU.
define find_cuda
said=$$(nvidia-smi 2>/dev/null </dev/null) || said=; \
version=$$(printf '%s\n' "$$said" | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1); \
if [ -z "$$said" ]; then :; \
elif [ -z "$$version" ]; then echo "note: nvidia-smi answers but names no CUDA version: using the CPU." >&2; \
elif [ "$$version" -ge 13 ]; then echo ,cuda13; \
elif [ "$$version" -eq 12 ]; then echo ,cuda12; \
else echo "note: this NVIDIA driver is too old for JAX (CUDA $$version, needs 12): using the CPU." >&2; fi
endef

# $(call install,EXTRAS,STAMP): an environment with these extras. It is made anew where the interpreter, its
# version or the folder changed, filled again where pyproject.toml or the CUDA version did, and else left alone.
define install
@set -e; python=$$($(find_python)); cuda=$$($(find_cuda)); \
made="$$python $$($$python --version) $(CURDIR)"; \
if [ "$$(cat $(VENV)/made-by 2>/dev/null)" != "$$made" ] || ! $(BIN)/python -c '' 2>/dev/null; then \
  echo "making $(VENV) with $$python ($$($$python --version))"; \
  rm -rf $(VENV); "$$python" -m venv $(VENV); echo "$$made" >$(VENV)/made-by; fi; \
wanted="$(1)$$cuda $$(cksum <pyproject.toml)"; \
if [ "$$(cat $(VENV)/$(2) 2>/dev/null)" != "$$wanted" ]; then \
  echo "installing .[$(1)$$cuda] into $(VENV)"; \
  $(PIP) install --quiet -e ".[$(1)$$cuda]"; echo "$$wanted" >$(VENV)/$(2); fi
endef

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

train:
	$(call install,train,installed-train)
	$(BIN)/python -m train $(ARGS)

# Tests that find a GPU share it, so no process may take all of its memory.
test:
	$(call install,train$(,)test,installed-test)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

lint:
	$(call install,train$(,)test,installed-test)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format:
	$(call install,train$(,)test,installed-test)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# A comma that does not separate arguments of $(call).
, := ,
