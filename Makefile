# `make demo` and `make test` need nothing but Python 3.11 or later, make and git.
VENV   ?= .venv
LOWEST ?= .venv-lowest
BUILD  ?= .venv-build
DOCS   ?= .venv-docs
# An interpreter of a tested version (3.11 to 3.13) if there is one, else a newer one; override with `make PYTHON=...`.
PYTHON ?= $(shell for v in 13 99; do for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $$v))" 2>/dev/null && echo $$p && exit; done; done)
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
BIN    := $(VENV)/bin
HEAD   ?= HEAD
# Of a release: `make build TAG=v1.2.3` fails for any other version.
TAG    ?=
# `make build WHEEL_CHECK=--no-platform-wheel` leaves out the wheel with compiled code, which takes minutes.
WHEEL_CHECK ?=
# Test files are shared out over as many processes as there are cores, with one thread each.
JOBS   ?= auto
PYTEST := python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile
MODEL  ?=
REPORT ?= perf-report.md
QUESTION ?= Ben fills 6 boxes with 12 pears each. 7 pears are bad. How many good pears are there?

.PHONY: demo chat test quick test-exhaustive test-lowest test-gpu lint docs check-docs build format perf-report clean

demo: $(VENV)/ready  ## answer a question with the bundled model
	@$(BIN)/thalweg generate --chat --prompt "$(QUESTION)"

chat: $(VENV)/ready  ## talk with the bundled model
	@$(BIN)/thalweg chat

test: $(VENV)/ready-dev  ## every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

quick: $(VENV)/ready-dev  ## leave out the slow tests
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m "not slow"

test-exhaustive: $(VENV)/ready-dev  ## what make test leaves out of matrices of faults and sizes
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m "exhaustive and not gpu"

# Ops, models and the scheduler know no other library than torch and Triton, which are the same in both environments.
test-lowest: $(LOWEST)/ready  ## the quick tests with the lowest version of everything that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/$(PYTEST) -m "not slow" --ignore=tests/ops --ignore=tests/models --ignore=tests/scheduler

test-gpu: $(VENV)/ready-dev  ## the tests of a CUDA device, one after the other
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint

docs: $(DOCS)/ready  ## the site of docs/, in site/
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

check-docs: $(VENV)/ready-dev  ## links, tables, options, code and tests in the pages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_docs.py tests/unit/test_security_page.py tests/unit/test_prefix_cache_page.py \
		tests/unit/test_extending_page.py tests/unit/test_result_tables.py tests/unit/test_long_description.py tests/unit/test_server_dialects.py

build: $(BUILD)/ready  ## sdist and wheels in dist/, checked, and used in a clean environment
	rm -rf dist
	$(BUILD)/bin/python -m build --outdir dist .
	@test -z "$(TAG)" || test -f "dist/thalweg-$(patsubst v%,%,$(TAG)).tar.gz" || { echo "error: the tag is $(TAG) and dist/ has" dist/*; exit 2; }
	$(BUILD)/bin/twine check --strict dist/*
	$(BUILD)/bin/python scripts/check_wheel.py dist/*-any.whl --torch "$(TORCH)" $(WHEEL_CHECK)
	$(BUILD)/bin/twine check --strict dist/*

perf-report: $(VENV)/ready  ## what each function costs in two commits: make perf-report BASE=commit
	@test -n "$(BASE)" || { echo "error: which commit to compare with? make perf-report BASE=commit [HEAD=commit] [MODEL=folder] [REPORT=file]"; exit 2; }
	@$(BIN)/thalweg bench functions $(MODEL) --base "$(BASE)" --head "$(HEAD)" --report "$(REPORT)"

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(BUILD) $(DOCS) dist site

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up $(VENV) ($(PYTHON))"
	@$(PYTHON) -m venv $(VENV)

# torch first and by itself: with it there, nothing pulls in another build.
$(VENV)/ready: pyproject.toml | $(VENV)/bin/python
	@echo "Installing packages (once; a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[all]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@# CPU builds of torch bring no Triton; the tests interpret and compile kernels without a GPU.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check $(TRITON) \
		|| echo "no Triton for this platform: its tests will be skipped"
	@touch $@

$(BUILD)/ready:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(BUILD)
	@$(BUILD)/bin/python -m pip install -q --disable-pip-version-check 'build>=1.2,<2' 'twine>=7,<8'
	@touch $@

# Without torch and the package. pip reads dependency groups from 25.1 on.
$(DOCS)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
	@$(DOCS)/bin/python -m pip install -q --disable-pip-version-check --group docs
	@touch $@

# All but torch, of which every version is a download of its own that may not be had: TORCH says which one, as above.
$(LOWEST)/ready: pyproject.toml scripts/lowest_versions.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up $(LOWEST) ($(PYTHON)) with the lowest versions of pyproject.toml"
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(LOWEST)/bin/python scripts/lowest_versions.py --leave-out torch > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check -r $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@
