# Needs make and a Python ≥ 3.11 with venv; everything else is installed into .venv.
# Another Python: make PYTHON=/path/to/python3.12 up
PYTHON ?= python3
RUN := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help up down test test-stores nightly check bench engines chaos setup setup-dev

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

up: setup ## start the panel and stay in front; Ctrl-C stops it, engines go on
	@unset PYTHONDONTWRITEBYTECODE; exec $(RUN) manage.py up

down: setup ## stop the panel and every engine
	@exec $(RUN) manage.py down

# First what drives engines, browsers and whole panels, where one test waits while another computes; a third worker would
# starve real engines of the seconds that they have (30 s of draining). Then the rest. Which keep to one worker:
# tests/conftest.py.
PYTEST := $(RUN) -m pytest --dist loadgroup --no-loadscope-reorder
WHOLE := real or e2e or processes
test: setup-dev ## the whole test suite; ARGS="tests/jobs -x" for a part of it
ifdef ARGS
	@exec $(RUN) -m pytest $(ARGS)
else
	@failed=0; $(PYTEST) -n 2 -m "$(WHOLE)" || failed=1; $(PYTEST) -n 3 -m "not ($(WHOLE))" || failed=1; exit $$failed
endif

# Here much is waiting for the database and no engine computes. Left out: engines, browsers and whole panels, which do not
# depend on the database (one panel is started on both all the same), and plain Python that touches none.
test-stores: setup-dev ## what touches the stores, on those that RIGPANEL_TEST_DATABASE_URL and RIGPANEL_TEST_REDIS_URL name
	@exec $(PYTEST) -n 3 -m "external or not ($(WHOLE) or plain)"

nightly: setup-dev engines ## the tests that take minutes and gigabytes: installing vLLM, vLLM under Ray Serve, Open WebUI
	@RIGPANEL_NIGHTLY=1 RIGPANEL_REQUIRE_REAL=1 exec timeout 3600 $(RUN) -m pytest -m nightly $(ARGS)

check: setup-dev ## lint, types, import contracts, migrations, deployment checks, templates
	@set -e; data=$$(mktemp -d); trap 'rm -rf "$$data"' EXIT; export RIGPANEL_DATA_DIR="$$data"; \
	run() { echo "== $$*"; "$$@"; }; \
	run .venv/bin/ruff check .; \
	run .venv/bin/ruff format --check .; \
	run .venv/bin/mypy; \
	run .venv/bin/lint-imports; \
	run $(RUN) manage.py makemigrations --check --dry-run; \
	run env RIGPANEL_PUBLIC_URL=https://rig.example $(RUN) manage.py check --deploy --fail-level WARNING; \
	run .venv/bin/djade --check --target-version 5.2 $$(find templates -name '*.html')

bench: setup-dev ## the published figures, measured here
	@exec $(RUN) -m benchmarks $(ARGS)

chaos: setup-dev ## random clicks and accidents against a whole panel; ROUNDS=1000 SEED=7 WORLDS=3 KEEP_GOING=1, one round again: FIRST=12 ROUNDS=13
	@CHAOS_ROUNDS=$(ROUNDS) CHAOS_SEED=$(SEED) CHAOS_FIRST=$(FIRST) CHAOS_REAL_ROUNDS=$(REAL) \
	CHAOS_WORLDS=$(WORLDS) CHAOS_KEEP_GOING=$(KEEP_GOING) \
	exec $(RUN) -m pytest -s tests/chaos/test_chaos.py tests/chaos/test_real_engine.py

engines: ## the smallest real engine and its model for tests, into .engines
	@$(PYTHON) bootstrap.py --engines

setup:
	@$(PYTHON) bootstrap.py

setup-dev:
	@$(PYTHON) bootstrap.py --dev
