# `make demo` and `make test` work from an empty clone with git, make and Python >= 3.11 (with venv).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

SAMPLE := benchmarks/sample.mp4
RESULT := out/sample_x4.mp4
SOURCES := $(shell find duovsr weights -type f -not -name '*.pyc')

# The editable install of `make test` serves the demo too; without it the demo installs the package as users do.
INSTALLED := $(or $(wildcard $(VENV)/.dev),$(VENV)/.run)

.PHONY: help demo test test-slow clean

help:
	@echo "make demo   install duovsr into $(VENV) and upscale $(SAMPLE) x4 with the embedded model"
	@echo "make test   install duovsr with its development tools into $(VENV) and run every check"
	@echo "make test-slow  the tests that take minutes, at full size"
	@echo "make clean  remove $(VENV), out/ and caches"
	@echo "PYTHON=...  another interpreter than python3"
	@echo "JOBS=2      so many tests at a time in make test"

demo: $(INSTALLED)
	@mkdir -p $(dir $(RESULT))
	$(BIN)/duovsr upscale $(SAMPLE) $(RESULT) --scale 4 --overwrite
	@echo "Before: $(SAMPLE)"
	@echo "After:  $(RESULT)"

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: duovsr needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "hint: name another interpreter, for example 'make $(MAKECMDGOALS) PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml constraints.txt $(SOURCES)
	@echo "Installing duovsr and what it needs into $(VENV); torch is large, so the first time takes minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt .
	@touch $@

# Editable, so that the checks always see the sources as they stand.
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing duovsr and what it needs into $(VENV); torch is large, so the first time takes minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
