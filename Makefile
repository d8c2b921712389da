# Needs make (3.81 will do) and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
MAX_TOKENS ?= 60
WORKERS ?= 2

# Other people's programs, for test-clients.
include tests/clients/versions.mk
CLIENTS := .clients
REAL := .venv-real
LLAMA_VIM ?=
export LLAMA_VIM
AIDER_PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 $(PYTHON); do \
	$$p -c 'import sys; sys.exit(sys.version_info >= (3, 13))' >/dev/null 2>&1 && echo $$p && exit; done)

# From a file of the standard library that the embedded pair was not trained on.
define DEMO_PROMPT
class EnvBuilder:
    def _call_new_python(self, context, *py_args, **kwargs):
endef
export DEMO_PROMPT

.PHONY: help demo test test-slow test-kernels test-real-shapes test-clients client-needs check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    generate with the embedded pair: no download of weights, no GPU"
	@echo "make test    run the test suite"
	@echo "make test-kernels  the Metal kernels, on Metal or in the CPU emulator (g++); 5 minutes"
	@echo "make test-slow  thousands of schedules, cache histories and requests; about half an hour"
	@echo "make test-real-shapes  published widths with random weights, beside transformers, mlx-lm and mlx-vlm: 10 minutes,"
	@echo "                   8 GB of memory, 12 GB of disk for its time; installs them and torch into $(REAL) (2 GB;"
	@echo "                   on Linux PyPI's torch brings 5 GB of CUDA libraries along)"
	@echo "make test-clients  other people's editors and agents, which it installs into $(CLIENTS) (2 GB);"
	@echo "                   LLAMA_VIM=... takes a folder with llama.vim instead of cloning it"
	@echo "make check   ruff, ruff format --check, pyright"
	@echo "make clean   remove .venv, $(REAL), $(CLIENTS) and what the tools left"
	@echo "PYTHON=...   the Python to build .venv with (3.11 or newer; now: $(PYTHON))"

demo: $(VENV)/.installed
	@if [ "$$(uname)" = Linux ]; then echo "on Linux the first run builds MLX's CPU kernels with g++: half a minute" >&2; fi
	@printf '%s' "$$DEMO_PROMPT"
	@HF_HUB_OFFLINE=1 $(BIN)/mlx-mtp generate --raw --width 4 --max-tokens $(MAX_TOKENS) "$$DEMO_PROMPT"

define BLAS_HINT
	@if [ "$$(uname)" = Linux ] && [ -z "$$LD_PRELOAD" ]; then \
		echo "hint: MLX's Linux wheel has a slow reference BLAS; with OpenBLAS installed," \
			"LD_PRELOAD=libopenblas.so.0 make $@ is several times faster" >&2; fi
endef

test: $(VENV)/.installed-dev
	$(BLAS_HINT)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-kernels: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "kernels and not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-real-shapes: $(REAL)/.installed
	$(BLAS_HINT)
	HF_HUB_OFFLINE=1 $(REAL)/bin/python -m pytest -m real_shapes tests/real_shapes $(PYTEST_ARGS)

test-clients: client-needs $(VENV)/.installed-dev $(CLIENTS)/.npm $(CLIENTS)/.aider \
		$(if $(LLAMA_VIM),,$(CLIENTS)/.llama.vim)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(REAL) $(CLIENTS) build dist .pytest_cache .ruff_cache .hypothesis
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

$(REAL)/.installed: pyproject.toml tests/real_shapes/versions.txt $(VENV)/.created
	$(PYTHON) -m venv --clear $(REAL)
	$(REAL)/bin/python -m pip --disable-pip-version-check install --quiet -e '.[dev]' -r tests/real_shapes/versions.txt
	@touch $@

# Checked before anything is fetched; aider runs on no newer Python.
client-needs:
	@for p in node npm vim curl git; do command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	! command -v node >/dev/null || node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || \
		missing="$$missing node>=20"; \
	[ -n "$(AIDER_PYTHON)" ] || missing="$$missing Python-3.10..3.12(AIDER_PYTHON=)"; \
	[ -z "$$missing" ] || { echo "make test-clients also needs, and did not find:$$missing" >&2; exit 1; }

$(CLIENTS)/.npm: tests/clients/versions.mk | client-needs
	@mkdir -p $(CLIENTS)/npm && echo '{"private": true}' > $(CLIENTS)/npm/package.json
	npm install --prefix $(CLIENTS)/npm --no-audit --no-fund --loglevel=error $(NPM_CLIENTS)
	@touch $@

$(CLIENTS)/.aider: tests/clients/versions.mk | client-needs
	$(AIDER_PYTHON) -m venv --clear $(CLIENTS)/aider
	$(CLIENTS)/aider/bin/python -m pip --disable-pip-version-check install --quiet $(AIDER)
	@touch $@

$(CLIENTS)/.llama.vim: tests/clients/versions.mk | client-needs
	rm -rf $(CLIENTS)/llama.vim && git init --quiet $(CLIENTS)/llama.vim
	@cd $(CLIENTS)/llama.vim && git fetch --quiet --depth 1 $(LLAMA_VIM_URL) $(LLAMA_VIM_COMMIT) && \
		git checkout --quiet FETCH_HEAD || { echo "llama.vim cannot be fetched from $(LLAMA_VIM_URL);" \
		"LLAMA_VIM=/path/to/llama.vim takes a folder that has it" >&2; exit 1; }
	@touch $@
