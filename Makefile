# Everything from a bare checkout with Python 3.11 and make: `make demo`, `make test`.
# `make test` with two cores; WORKERS=8 on a machine with more. `make test-quick`: nothing that starts processes,
# compiles or takes long; `make test-all`: further cases of what `make test` checks once, too (tests/costs.py tells the marks).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/uv
READY := $(VENV)/.ready
WORKERS ?= 2
# Groups of tests are handed out in the order in which tests/costs.py has put them.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-quick test-all lint setup clean

# Of another paper: make demo PAPER=slot_walks
demo: $(READY)
	$(BIN)/python tools/demo.py $(if $(PAPER),paper=$(PAPER))

test: $(READY)
	$(PYTEST) -m "not slow"

test-quick: $(READY)
	$(PYTEST) -m "not child and not compile and not long and not slow"

test-all: $(READY)
	$(PYTEST)

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
