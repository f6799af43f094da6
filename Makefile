# Everything happens in .venv, with the versions of constraints.txt. `make help` lists what there is.
SHELL := /bin/sh
.SUFFIXES:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test lint types clean

BIN := .venv/bin
PYTHON_CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
DEMO_PROMPT := a red ball moves right on a black background

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [ARGS='-k flow']"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1  \2/p' Makefile

demo: .venv/ready-run ## set up, then write demo.mp4 from a prompt with the shipped mini model
	@echo 'demo: generating demo.mp4: "$(DEMO_PROMPT)"'
	@$(BIN)/python -m reelflow generate "$(DEMO_PROMPT)" --model mini --seed 0 -o demo.mp4
	@echo "demo: wrote demo.mp4"

test: .venv/ready-test ## set up, then run the tests; ARGS='…' goes to pytest
	@echo "test: running pytest -n auto --dist worksteal $(ARGS)"
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: .venv/ready-dev ## ruff
	@echo "lint: ruff check"
	@$(BIN)/python -m ruff check .

types: .venv/ready-dev ## mypy
	@echo "types: mypy src"
	@$(BIN)/python -m mypy src

clean: ## remove .venv, caches and demo.mp4
	@echo "clean: removing .venv, caches and demo.mp4"
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo.mp4

# The stamps: done once, and again when pyproject.toml or constraints.txt changes.
.venv/ready-run: PACKAGE := .
.venv/ready-test: PACKAGE := .[test]
.venv/ready-dev: PACKAGE := .[dev]
.venv/ready-run .venv/ready-test .venv/ready-dev: $(BIN)/pip pyproject.toml constraints.txt
	@echo "setup: installing reelflow '$(PACKAGE)' into .venv, pinned by constraints.txt (minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e "$(PACKAGE)"
	@touch $@

$(BIN)/pip:
	@found=; for candidate in $(if $(PYTHON),"$(PYTHON)",$(PYTHON_CANDIDATES)); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "setup: no Python 3.11 or newer among: $(or $(PYTHON),$(PYTHON_CANDIDATES)). Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2; \
	  exit 1; \
	fi; \
	echo "setup: making .venv with $$("$$found" -V) ($$found)"; \
	"$$found" -m venv .venv || { echo "setup: $$found cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
