# Each target sets up what it needs: a virtual environment in .venv, refreshed when
# pyproject.toml has changed. Another Python: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help bench fleet docs check-docs linkcheck inventories demo recording test test-core test-lowest \
	test-pgbouncer mutants lint types fuzz hooks release clean

help:
	@echo "make demo   the main job, against a PostgreSQL of its own"
	@echo "make test   the tests, with branch coverage"
	@echo "make test-core   those that need no PostgreSQL"
	@echo "make test-lowest   the tests, with the oldest releases that the package allows"
	@echo "make test-pgbouncer   those that need PgBouncer"
	@echo "make fuzz   a hundred thousand seeds against a mad server, and Ctrl-C at 25,000 instants: an hour"
	@echo "make mutants   break the core in 300 small ways, and see whether a test goes red: six minutes"
	@echo "make lint   ruff, spelling, and the workflows"
	@echo "make types  mypy --strict"
	@echo "make bench  the benchmarks, in fifteen minutes, in an environment of their own"
	@echo "make fleet  what many pools do to a server that they share, most of it simulated: three minutes"
	@echo "make docs   the documentation, in docs/_build; a warning is an error"
	@echo "make check-docs   the same, looked at in a browser; it needs Chromium"
	@echo "make linkcheck   whether the pages that it links to are there; it needs the network"
	@echo "make inventories   fetch what other projects' pages are called; it needs the network"
	@echo "make recording   what make demo shows, as a picture: docs/pictures/demo.svg"
	@echo "make hooks  have git run lint and types before each commit"
	@echo "make release   check, build and test a release; its commit must have the tag"

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

recording: $(VENV)/installed
	$(BIN)/python docs/recording.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

test-core: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not postgres and not pgbouncer and not browser"

# PgBouncer is not on PyPI: install it first, with the system's package manager.
test-pgbouncer: $(VENV)/installed
	$(BIN)/python -m pytest -m pgbouncer

# CI runs both with fewer. Other seeds: make fuzz FUZZ_FIRST=100000
fuzz: $(VENV)/installed
	FUZZ_SEEDS=$${FUZZ_SEEDS:-100000} CTRL_C_INSTANTS=$${CTRL_C_INSTANTS:-2000} \
	$(BIN)/python -m pytest -q -n 2 tests/postgres/test_fuzz.py tests/postgres/test_ctrl_c.py

# Every one of them: make mutants ARGS=--all. Those of one room: make mutants ARGS='--only _sizing'
mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py $(ARGS)

# The oldest releases that the package allows; of psycopg, the oldest binary that the extra allows. The
# types are those of the newest releases, and the newest AnyIO needs a newer Trio.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pip install $(PIP_FLAGS) --requirement tests/lowest.txt
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile --ignore tests/test_typing.py \
		--ignore tests/postgres/test_anyio.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(BIN)/zizmor --quiet --offline .github

types: $(VENV)/installed
	$(BIN)/mypy

# The other pools are not for .venv: they would be there when the tests and mypy run.
bench: .venv-bench/installed
	.venv-bench/bin/python -m benchmarks $(ARGS)

# Only a part: make fleet ARGS='--only restart'
fleet: $(VENV)/installed
	$(BIN)/python -m benchmarks.fleet $(ARGS)

docs: $(VENV)/installed
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build

# Chromium is not on PyPI: install it first, with the system's package manager.
check-docs: docs
	$(BIN)/python -m pytest -q -n 2 -m browser tests/test_pages.py

linkcheck: $(VENV)/installed
	$(BIN)/sphinx-build --builder linkcheck --quiet docs docs/_build/links

inventories: $(VENV)/installed
	$(BIN)/python docs/inventories.py

hooks: $(VENV)/installed
	$(BIN)/pre-commit install

release:
	.ci/release

clean:
	rm -rf $(VENV) .venv-bench .venv-lowest

GROUP = dev
.venv-bench/installed: GROUP = bench

# The groups of dependencies need a pip of 2025. Some distributions ship Python without ensurepip; then
# their own pip installs it.
PIP_FLAGS = --quiet --disable-pip-version-check
%/installed: pyproject.toml
	$(PYTHON) -m venv $* || $(PYTHON) -m venv --without-pip $*
	if [ -x $*/bin/pip ]; then $*/bin/python -m pip install $(PIP_FLAGS) 'pip>=25.1'; \
	else $(PYTHON) -m pip --python $*/bin/python install $(PIP_FLAGS) 'pip>=25.1'; fi
	$*/bin/python -m pip install $(PIP_FLAGS) --editable . --group $(GROUP)
	touch $@
