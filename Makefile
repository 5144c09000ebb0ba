# `make help` lists what there is. Everything runs in .venv, which the first target that needs it sets up.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
FLAGS ?=
OUT ?= miram-demo

# The Python that makes the environment: PYTHON=… on the command line, or the first of these that is new enough.
OLDEST := 3.10
IS_NEW := import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$(OLDEST)'.split('.'))))
ifeq ($(origin PYTHON),undefined)
NAMES := python3 python python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON := $(shell for p in $(NAMES); do $$p -c "$(IS_NEW)" 2>/dev/null && echo $$p && break; done)
endif

.PHONY: help venv demo test mutate docs export notebooks readme lock clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo "Settings: PYTHON=python3.11  OUT=folder of the demo  FLAGS=\"slow cuda real\" (flagged cells that test and notebooks run too)"

venv: $(STAMP)  ## set up .venv with the tested versions (again when they change)
	@echo "$(VENV) is ready: $$($(BIN)/python --version)"

OTHER := name one with 'make PYTHON=/path/to/python3.11'
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "miram needs Python $(OLDEST) or newer and found none: install it, or $(OTHER)"; exit 1; }
	@"$(PYTHON)" -c '' 2>/dev/null || { echo "cannot run '$(PYTHON)' as Python $(OLDEST) or newer: $(OTHER)"; exit 1; }
	@"$(PYTHON)" -c "$(IS_NEW)" || \
	  { echo "miram needs Python $(OLDEST) or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): $(OTHER)"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "'$(PYTHON)' lacks the module venv: 'apt install python3-venv' brings it on Debian and Ubuntu; or $(OTHER)"; exit 1; }
	@$(BIN)/python -c "$(IS_NEW)" 2>/dev/null || \
	  { echo "making $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing the tested versions into $(VENV): some 6 GB, minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## run the main job on made-up mammograms, some 6 minutes; the report is in OUT
	$(BIN)/miram_demo --out $(OUT)

test: $(STAMP)  ## test every notebook
	$(BIN)/python .ci/test.py --flags "$(FLAGS)"

mutate: $(STAMP)  ## break the attentions on purpose: does a cell notice?
	$(BIN)/python .ci/mutate.py

notebooks: $(STAMP)  ## run every notebook in a Jupyter kernel and keep what it prints and draws
	$(BIN)/python .ci/kernel.py --store --flags "$(FLAGS)"

export: $(STAMP)  ## write miram/ from the notebooks, and clean them
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: $(STAMP)  ## build the documentation into _docs, without Quarto
	$(BIN)/python .ci/docs.py --out _docs

lock: $(STAMP)  ## resolve settings.ini anew and write constraints.txt
	$(BIN)/python .ci/lock.py

clean:  ## remove what was built; the environment and the demo's results stay
	rm -rf _proc _docs build dist *.egg-info nbs/sidebar.yml nbs/nbdev.yml
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
