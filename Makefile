# Each target sets up what it needs: a virtual environment in .venv, refreshed when
# pyproject.toml has changed. Another Python: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test test-pgbouncer lint types clean

help:
	@echo "make demo   the main job, against a PostgreSQL of its own"
	@echo "make test   the tests, with branch coverage"
	@echo "make test-pgbouncer   those that need PgBouncer"
	@echo "make lint   ruff"
	@echo "make types  mypy --strict"

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --cov --cov-report=term

# PgBouncer is not on PyPI: install it first, with the system's package manager.
test-pgbouncer: $(VENV)/installed
	$(BIN)/python -m pytest -m pgbouncer

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Some distributions ship Python without ensurepip; then their own pip fills the environment.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	if [ -x $(BIN)/pip ]; then pip="$(BIN)/python -m pip"; \
	else pip="$(PYTHON) -m pip --python $(BIN)/python"; fi; \
	$$pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
