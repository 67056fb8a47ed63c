# make demo     install, then teach the built-in model (minutes, no GPU, no network once installed)
# make check    lint, types and every test: what CI runs
# make real     real models by the real command line; it says what to bring
#
# Needs make and Python >= 3.11 (with venv). Another Python:  make demo PYTHON=python3.12
# Flags for the demo's training:                              make demo ARGS="--seed 1"

PYTHON  ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
             $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# pip unpacks PyTorch for a minute without a word: every ten seconds it is said how much is there.
# The one who says it ends with the recipe's shell, however that ends.
define install
@echo "Installing into $(VENV): some 1.7 GB, most of it PyTorch. That takes minutes where the" \
  "network or the disk is slow."
@( while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
     echo "  ... still installing, $$(du -sh $(VENV) 2>/dev/null | cut -f1) are there"; done ) & \
  ticker=$$!; trap 'kill $$ticker 2>/dev/null' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
  $(PIP) $(1)
endef
# One thread a worker: faster than two workers fighting over the cores, and deterministic.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
CODE    = $(wildcard src tests bench tools)

.PHONY: help install demo check lint types test test-quick ranges bench docs pictures soak real gpu tiny clean

help:
	@echo "make demo        install and teach the built-in model, start to verdict"
	@echo "make install     put Abacist into $(VENV)"
	@echo "make check       lint, types, tests"
	@echo "make test-quick  the unit and contract tests only"
	@echo "make ranges      the quick suite with the lowest and the newest core dependencies (ENDS=lowest ARGS=…)"
	@echo "make bench       speed and memory against stock TRL (hours; ARGS=\"--cells 'tiny/*'\" for less)"
	@echo "make soak        every promise of docs/reliability.md, at length (an hour; ARGS=\"kills\" for a part)"
	@echo "make gpu         what a GPU is to show, part by part, each under nine minutes; goes on where it was stopped"
	@echo "make real        real models, start to end: REAL_MODELS=FOLDER, without which it says what to bring"
	@echo "make docs        write what is generated of docs/: the command reference, the list of pages"
	@echo "make pictures    remake the README's pictures from RUN=runs/tiny-001"
	@echo "make tiny        remake the built-in model from nothing (see docs/lab.md)"
	@echo "make clean       remove $(VENV), .ranges and the tools' caches (runs/ is left alone)"

install: $(VENV)/.installed

demo: install
	$(BIN)/abacist train $(ARGS)

check: lint types test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

test: $(VENV)/.installed-dev
	$(PYTEST)

test-quick: $(VENV)/.installed-dev
	$(PYTEST) tests/unit tests/contract

# Each end has an environment of its own in .ranges/, kept for the next time.
ENDS ?= lowest newest

ranges: $(VENV)/.installed-dev
	$(BIN)/python tools/ranges.py --ends $(ENDS) -- $(ARGS)

bench: install
	$(BIN)/python bench/speed.py $(ARGS)

# Goes on where it was stopped; its result is written to docs/reliability.md.
soak: $(VENV)/.installed-dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m soak $(ARGS)

# One process: a real model at a time fits into the memory of a laptop.
real: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real --durations=0 $(ARGS)

gpu: $(VENV)/.installed-dev
	$(BIN)/python tools/gpu.py $(ARGS)

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/reference.py

RUN ?= runs/tiny-001

pictures: $(VENV)/.installed-dev
	$(BIN)/python tools/pictures.py $(RUN) docs

tiny: install
	$(BIN)/python tools/warmstart.py $(ARGS)

clean:
	rm -rf $(VENV) .ranges .pytest_cache .mypy_cache .ruff_cache .hypothesis build site src/*.egg-info

# The stamps below make a second `make` free; a change of either file installs again.

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
	  echo "Abacist needs Python 3.11 or newer, and none was found on PATH." >&2; \
	  echo "  Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,--editable .)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,--editable '.[dev]')
	@touch $@ $(VENV)/.installed
