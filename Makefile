# Everything this makes stays inside the checkout: .venv (the environment), .cache (downloads, settings
# of Jupyter and the like) and runs (results). Delete them to start afresh.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
EXTRAS := dev,itk,lab,nvflare,search,test,tracking

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fedlab-installed

# Programs that would write into the home directory write here instead. pip's own cache is used where
# PIP_CACHE_DIR names it: make install PIP_CACHE_DIR=~/.cache/pip
CACHE := $(CURDIR)/.cache
PIP_CACHE_DIR ?= $(CACHE)/pip
export PIP_CACHE_DIR
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export XDG_CACHE_HOME := $(CACHE)
export MPLCONFIGDIR := $(CACHE)/matplotlib
export IPYTHONDIR := $(CACHE)/ipython
export JUPYTER_CONFIG_DIR := $(CACHE)/jupyter/config
export JUPYTER_DATA_DIR := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHE)/jupyter/runtime
# The extension of itkwidgets asks a CDN for scripts at every start of JupyterLab, used or not: it starts switched off.
LABCONFIG := $(VENV)/etc/jupyter/labconfig
QUIET := {"disabledExtensions": {"imjoy-jupyterlab-extension": true}}
# jupyter nbconvert --to html writes pages that load scripts from a CDN: here it uses the template of fedlab, which loads
# nothing. The option --template lab chooses the usual one.
NBCONVERT := $(VENV)/etc/jupyter/jupyter_nbconvert_config.json
OFFLINE := {"HTMLExporter": {"template_name": "$(CURDIR)/fedlab/view/templates/notebook_html"}}
# JupyterLab looks for language servers with npm, which writes a log.
export npm_config_cache := $(CACHE)/npm
# Compiled files are kept, also where the user's settings say otherwise: a run of the tests starts a hundred processes.
export PYTHONDONTWRITEBYTECODE :=

# The programs in an environment know its place: one that was copied or moved is made anew.
MOVED := $(shell [ ! -f $(STAMP) ] || [ "$$(cat $(STAMP))" = "$$(pwd -P)" ] || echo moved)

.DEFAULT_GOAL := help
.PHONY: help install demo check test prepared collected lint lab gallery chromium mutants coverage constraints seeds FORCE

help:
	@echo 'fedlab: federated learning on brain-tumour MRI. Each command installs first what it needs.'
	@echo
	@echo '  make demo      train on generated patients of several sites, federated against each site'
	@echo '                 alone and all data pooled; writes runs/<name>/report.html'
	@echo '  make test      check style, types and import order, run every test and notebook'
	@echo '  make lab       open JupyterLab on notebooks/00_welcome.ipynb'
	@echo '  make gallery   run every notebook and write them, the pages and the reference as a site, runs/gallery/index.html'
	@echo '  make install   create $(VENV) and install the tested versions into it'
	@echo '  make check     the checks of make lint and the quick tests, while you work'
	@echo '  make lint      only the checks that need no running: style, types, import order'
	@echo '  make mutants BASE=main   change the lines that differ from main, and see whether a test notices'
	@echo '  make coverage  the branches that the quick tests reach'
	@echo '  make seeds     the tests of samplers with 50 other seeds (SEEDS=50)'
	@echo '  make constraints   renew the list of tested versions, constraints.txt'
	@echo
	@echo 'Settings: PYTHON=python3.12 (the Python to use, 3.11 or newer), ARGS="--seed 1" (for demo, lab, gallery),'
	@echo '          PYTEST_ARGS="-k metrics" (for test).'

install: $(STAMP)
	@echo "fedlab: installed in $(VENV) ($$($(PY) --version))"

demo: install
	@echo "fedlab: running the demo; it says how much time is left ('make demo ARGS=--quick' takes about a minute)"
	@$(VENV)/bin/fedlab demo $(ARGS)

# A choice in PYTEST_ARGS may leave no test, which is pytest's status 5.
test: prepared
	@echo "fedlab: running the tests and notebooks"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder --nbval-lax --durations=25 \
	  $(PYTEST_ARGS) tests $(wildcard notebooks) || { [ $$? = 5 ] && [ -n "$(PYTEST_ARGS)" ]; }

# Tests that take seconds per file, and those that hold the names in pages true. The others train, start processes or
# open a browser.
QUICK := tests/core tests/faults tests/packaging/test_guarantees.py tests/packaging/test_names.py tests/strategies \
         tests/topologies tests/training
check: lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile $(PYTEST_ARGS) $(QUICK)

# Tests that compare samples with a law, in the files below, with other seeds; see tests/chance.py.
SEEDS ?= 50
seeds: install
	@for k in $$(seq 1 $(SEEDS)); do OMP_NUM_THREADS=1 FEDLAB_TEST_SEEDS=$$k $(PY) -m pytest -q --no-header -m chance \
	  $(PYTEST_ARGS) $$(grep -rl "mark[.]chance" tests --include="test_*.py") || exit 1; done

# What the tests need first, two things at a time.
prepared:
	@$(MAKE) --no-print-directory --jobs=2 chromium lint collected

# Compiles the tests before the first run; else each process that runs a part of them would.
collected: install
	@mkdir -p $(CACHE)
	@ls tests/core/__pycache__/*pytest*.pyc >/dev/null 2>&1 || OMP_NUM_THREADS=1 $(PY) -m pytest -qq --collect-only tests \
	  >$(CACHE)/collected.log 2>&1 || cat $(CACHE)/collected.log

lint: install
	@echo "fedlab: checking style"
	@$(VENV)/bin/ruff check
	@echo "fedlab: checking types"
	@$(VENV)/bin/mypy
	@echo "fedlab: checking the order of imports"
	@$(VENV)/bin/lint-imports

gallery: install
	@echo "fedlab: building the documentation site"
	@$(PY) docs/gallery.py $(ARGS)

# For the tests in a browser: installed where the user may do so without a password. Elsewhere these tests are skipped,
# in CI they fail.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as="sudo -n"; else as=nobody; fi; \
	  if [ "$$as" = nobody ] || ! command -v apt-get >/dev/null; then \
	    echo "fedlab: no Chromium, and no right to install it: the tests in a browser are skipped"; \
	  else \
	    echo "fedlab: installing Chromium for the tests in a browser"; mkdir -p $(CACHE); \
	    get="$$as env DEBIAN_FRONTEND=noninteractive apt-get"; \
	    { $$get update; $$get install -y --no-install-recommends chromium; } >$(CACHE)/chromium.log 2>&1 \
	      || echo "fedlab: that failed ($(CACHE)/chromium.log says why): the tests in a browser are skipped"; \
	  fi; }

lab: install
	@$(VENV)/bin/fedlab lab -- $(ARGS)

# The newest versions that pyproject.toml allows, found in an environment of their own. torch stays where it is, or:
# make constraints TORCH=2.14.0.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
constraints:
	@echo "fedlab: installing the newest versions beside torch $(TORCH) (minutes)"
	@"$(PYTHON)" -m venv --clear $(CACHE)/newest
	@$(CACHE)/newest/bin/python -m pip install -q torch==$(TORCH) 'jsonschema<4.25' -e '.[$(EXTRAS)]'
	@$(CACHE)/newest/bin/python .ci/constraints.py
	@rm -r $(CACHE)/newest

# Wrong code, one change at a time, that tests should notice: tests/mutants/mutate.py says how. A night for everything,
# at most 10 minutes for the lines changed since a commit; a run that is stopped goes on where it was.
mutants: install
	@OMP_NUM_THREADS=1 $(PY) tests/mutants/mutate.py $(if $(BASE),--base $(BASE)) $(ARGS)

# Lines and branches that the quick tests reach, and those that they don't; other tests: make coverage TESTS="tests/view".
TESTS ?= $(QUICK)
coverage: install
	@OMP_NUM_THREADS=1 $(PY) -m coverage run --branch --source fedlab -m pytest -q $(PYTEST_ARGS) $(TESTS); \
	  $(PY) -m coverage report --sort=cover $(ARGS)

ifneq ($(MOVED),)
$(PY): FORCE
endif
$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "fedlab: no program '$(PYTHON)'. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedlab: needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { \
	  echo "fedlab: '$(PYTHON)' lacks the module above, which makes environments (on Debian and Ubuntu it is in the package python3-venv)" >&2; exit 1; }
	@[ -z "$(MOVED)" ] || echo "fedlab: $(VENV) was made for $$(cat $(STAMP)), not for this folder"
	@echo "fedlab: creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV)

$(STAMP): pyproject.toml constraints.txt $(PY)
	@echo "fedlab: installing the tested versions into $(VENV) (a few minutes the first time)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@$(PY) -m pip install --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@[ -e $(LABCONFIG)/page_config.json ] || { mkdir -p $(LABCONFIG); echo '$(QUIET)' > $(LABCONFIG)/page_config.json; }
	@echo '$(OFFLINE)' > $(NBCONVERT)
	@$(PY) -c 'import fedlab'
	@timeout 180 $(VENV)/bin/fedlab itk install || echo "fedlab: itkwidgets has no viewer yet; all else works without it"
	@pwd -P > $@
