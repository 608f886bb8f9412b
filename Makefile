# `make help` lists the targets. Each sets up what it needs in .venv first, once, and again only when the locks change.
# To choose the interpreter: make PYTHON=python3.12 quickstart
#
# What is installed comes from the locks: requirements*.lock name every package at one version, with the hashes that
# PyPI has for its files, and pip refuses any other file. `make lock` makes them from the requirements in pyproject.toml.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
    $$python -c '$(SUPPORTED)' 2> /dev/null && echo $$python && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --require-hashes --requirement
UV := uv==0.13.9
UPGRADE := --upgrade # make lock UPGRADE= keeps the versions that are locked
# uv repeats the platform of pyproject.toml in every line. `make lock` takes that out: elsewhere pip would skip such lines
# without a word; now it finds no file and says so.
PLATFORM := s/ and (platform_machine == 'x86_64'|sys_platform == 'linux')//g; \
    s/(;|and) python_full_version < '3.14' and /\1 /; s/ (;|and) python_full_version < '3.14' / /

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint serve bench openapi docs dist lock clean
MAKEFLAGS += --no-print-directory

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(VENV)/.runtime ## set up .venv with what rec runs on

quickstart: $(VENV)/.runtime ## make data, train both stages on it, print recommendations
	$(BIN)/python -m rec.data_prep.dummy --output-dir data/dummy
	$(BIN)/python -m rec.train --stage all --config config/dummy/dummy_small.yaml

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rec tests bench

serve: $(VENV)/.runtime ## answer HTTP requests with the newest bundles
	$(BIN)/python -m rec.serve

bench: $(VENV)/.bench ## the quick benchmarks, at small sizes, some 5 minutes; each ends with a line of JSON
	$(BIN)/python -m bench.step_scale --sizes 10000 100000 1000000 --steps 50 --adam-steps 5
	$(BIN)/python -m bench.index --items 20000
	$(BIN)/python -m bench.prep --rows 1000000
	$(BIN)/python -m bench.growth --interactions 30000 100000 300000 --users 1000 10000

openapi: $(VENV)/.runtime ## write docs/openapi.json, the schema of the API
	$(BIN)/python -m rec.serve --openapi | $(BIN)/python -m json.tool --indent 1 > docs/openapi.json

docs: $(VENV)/docs/.installed ## build the site of docs/ into site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

dist: $(VENV)/.uv ## build the wheel and the source archive of the package, into dist/
	$(BIN)/uv build --quiet

# NAME=EXTRAS: requirements-NAME.lock is for the package with these extras. The first is requirements.lock.
LOCKS := =serve,wandb,redis -spark=serve,wandb,redis,spark -dev=dev -bench=serve,wandb,redis,bench

lock: $(VENV)/.uv ## resolve the requirements of pyproject.toml anew, into requirements*.lock
	@for lock in $(LOCKS); do \
	    name=$${lock%%=*}; shared=$${name:+--constraint requirements.lock}; \
	    extras=$$(echo $${lock#*=} | sed 's/^/--extra /; s/,/ --extra /g'); \
	    $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $(UPGRADE) \
	        --custom-compile-command 'make lock' $$shared $$extras \
	        pyproject.toml --output-file requirements$$name.lock && \
	    sed -i -E "$(PLATFORM)" requirements$$name.lock || exit 1; \
	done

clean: ## remove caches; keeps .venv, data, checkpoints and savedmodels
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so that an interrupted installation is taken up again.

$(VENV)/.created:
	@$(PYTHON) -c '$(SUPPORTED)' 2> /dev/null || { \
	    echo 'error: rec needs Python 3.11, 3.12 or 3.13, and "$(PYTHON)" is none of them: install one,' \
	        'or name it as in make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	    echo 'error: "$(PYTHON)" comes without the venv module: install it with' \
	        'apt install python3-venv (or python3.11-venv, for python3.11), then run make again' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: requirements.lock | $(VENV)/.created
	@echo 'installing requirements.lock into $(VENV) (2.5 GB, a minute or two)' >&2
	@$(INSTALL) requirements.lock
	@touch $@

# Without build isolation pyspark, which comes as source only, is built by the setuptools of requirements.lock.
$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo 'installing requirements-dev.lock into $(VENV)' >&2
	@$(INSTALL) requirements-dev.lock --no-build-isolation
	@touch $@

# Only here does pip fetch build tools that no lock names: hnswlib is compiled with pybind11.
$(VENV)/.bench: requirements-bench.lock $(VENV)/.runtime
	@echo 'installing requirements-bench.lock into $(VENV)' >&2
	@$(INSTALL) requirements-bench.lock
	@touch $@

# An environment of its own, because the site's packages would move pins of the locks. They have no lock themselves:
# nothing that runs or is tested depends on them.
DOCS := import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
$(VENV)/docs/.installed: pyproject.toml | $(VENV)/.created
	@$(PYTHON) -m venv $(VENV)/docs
	@$(PYTHON) -c '$(DOCS); print(*extras["docs"], sep="\n")' > $(VENV)/docs/requirements.txt
	@$(VENV)/docs/bin/python -m pip --quiet --disable-pip-version-check install --requirement $(VENV)/docs/requirements.txt
	@touch $@

$(VENV)/.uv: | $(VENV)/.created
	@$(PIP) install $(UV)
	@touch $@
