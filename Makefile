# make run: set up and talk. make test: set up and run every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := core/engine/native/step.cpp
# Python compiles what it imports; to compile all that these packages hold takes half a minute.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile -c deploy/constraints.txt

.PHONY: run test check format clean

run: $(VENV)/run.done
	$(BIN)/palaver run

test: $(VENV)/test.done check

# Tests wait as long as they compute: three at a time keep two cores at work.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

format: $(VENV)/test.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Palaver needs Python 3.11 or newer; name one: make run PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "This Python makes no venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/run.done: $(VENV)/bin/python pyproject.toml deploy/constraints.txt $(NATIVE)
	@echo "Setting up (once, a minute or two) ..."
	$(PIP) -e '.[engine]'
	@touch $@

$(VENV)/test.done: $(VENV)/bin/python pyproject.toml deploy/constraints.txt $(NATIVE)
	@echo "Setting up (once, a few minutes) ..."
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/run.done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
