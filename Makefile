# Everything from a bare checkout with Python 3.11 and make: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/uv
READY := $(VENV)/.ready

.PHONY: demo test lint setup clean

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

setup: $(READY)

# The lock file holds exact versions of everything; the project itself is installed in place.
$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(UV)/bin/uv || { $(PYTHON) -m venv $(UV) && $(UV)/bin/python -m pip install --quiet uv==0.13.9; }
	$(UV)/bin/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(UV)/bin/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . -C editable_mode=compat
	@touch $@

clean:
	rm -rf $(VENV)
