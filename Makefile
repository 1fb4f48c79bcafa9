# make demo   train HyperFedZero and its controls on real images, show the result
# make test   install and run the tests
# make docs   build the documentation, docs/_build/html/index.html
# make test-newest   the same, with the newest packages: PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test docs test-slow test-newest lint lock clean

demo: $(STAMP)
	$(BIN)/python -m experiments.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The default suite with the newest versions that setup.cfg admits, in an environment of
# its own: `make test-newest PYTHON=python3.13`.
NEWEST := $(VENV)-newest
test-newest:
	rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --editable ".[test]"
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Notebooks are run anew; a warning, or an error in a cell, fails.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# The tested lock. Installing is repeated when it, or the package's own list, changes.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# Renews constraints.txt from the newest versions that setup.cfg admits.
lock:
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --editable ".[dev]"
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable > constraints.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(NEWEST) docs/_build build dist *.egg-info .cache
