# Needs make (3.81 will do) and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
MAX_TOKENS ?= 64
WORKERS ?= 2

# From a file of the standard library that the embedded pair was not trained on.
define DEMO_PROMPT
def add_extension(module, name, code):
    """Register an extension code."""
    code = int(code)
endef
export DEMO_PROMPT

.PHONY: help demo test test-slow test-kernels check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    generate with the embedded pair: no download of weights, no GPU"
	@echo "make test    run the test suite"
	@echo "make test-kernels  the Metal kernels, on Metal or in the CPU emulator (g++); 5 minutes"
	@echo "make test-slow  thousands of schedules, cache histories and requests; about half an hour"
	@echo "make check   ruff, ruff format --check, pyright"
	@echo "make clean   remove .venv and what the tools left"
	@echo "PYTHON=...   the Python to build .venv with (3.11 or newer; now: $(PYTHON))"

demo: $(VENV)/.installed
	@if [ "$$(uname)" = Linux ]; then echo "on Linux the first run builds MLX's CPU kernels with g++: half a minute" >&2; fi
	@printf '%s' "$$DEMO_PROMPT"
	@HF_HUB_OFFLINE=1 $(BIN)/mlx-mtp generate --raw --max-tokens $(MAX_TOKENS) "$$DEMO_PROMPT"

test: $(VENV)/.installed-dev
	@if [ "$$(uname)" = Linux ] && [ -z "$$LD_PRELOAD" ]; then \
		echo "hint: MLX's Linux wheel has a slow reference BLAS; with OpenBLAS installed," \
			"LD_PRELOAD=libopenblas.so.0 make test is several times faster" >&2; fi
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-kernels: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "kernels and not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an edited pyproject.toml installs again, nothing else does (the install is editable).
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "mlx-mtp needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1);" \
			"install one, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@
