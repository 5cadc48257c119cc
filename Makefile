# make run: set up and talk. make test: set up and run every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := core/engine/native/step.cpp

# pip would compile on one core what all can; some files are for other Pythons and do not compile.
define INSTALL
$(BIN)/python -m pip --disable-pip-version-check -q install --no-compile -c deploy/constraints.txt -e '.[$(1)]'
@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
endef

.PHONY: run test check format clean

run: $(VENV)/run.done
	$(BIN)/palaver run

test: $(VENV)/test.done check

# Tests wait as long as they compute: three at a time, and mypy beside them, keep two cores at work.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy & types=$$!; $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder && wait $$types

format: $(VENV)/test.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Palaver needs Python 3.11 or newer; name one: make run PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "This Python makes no venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/run.done: $(VENV)/bin/python pyproject.toml deploy/constraints.txt $(NATIVE)
	@echo "Setting up (once, a minute or two) ..."
	$(call INSTALL,engine)
	@touch $@

$(VENV)/test.done: $(VENV)/bin/python pyproject.toml deploy/constraints.txt $(NATIVE)
	@echo "Setting up (once, a few minutes) ..."
	$(call INSTALL,test)
	@touch $@ $(VENV)/run.done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
