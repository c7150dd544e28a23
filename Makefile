# Everything lives in .venv; nothing outside it is changed.
#   make install | demo | test | test-parallel | test-slow | test-failed | test-gpu | lint | docs | clean
#   make install TORCH='torch==2.11.0'     another build of PyTorch
#   make install PYTHON=/opt/python3.12    another interpreter (3.11, 3.12 or 3.13)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help install demo test test-parallel test-slow test-failed test-gpu lint docs clean

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
CONSTRAINTS := requirements/constraints.txt
WORKERS ?= 2
FAST := not slow and not gpu and not multi_gpu and not launcher and not parallel

help:
	@sed -n 's/^#   //p' Makefile

FITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)

$(VENV)/.made:
	@for python in $(PYTHONS); do \
	    if "$$python" -c "$(FITS)" >/dev/null 2>&1; then \
	        "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	    fi; \
	done; \
	echo 'error: none of these is Python 3.11, 3.12 or 3.13 with venv: $(PYTHONS)' >&2; \
	echo '       Debian, Ubuntu: apt install python3 python3-venv' >&2; \
	echo '       or name one:    make install PYTHON=/path/to/python3.12' >&2; \
	exit 1

# PyPI's PyTorch for Linux brings several GB of CUDA libraries. A machine without a GPU takes the
# CPU build: one that pip is set up to find, else from PyTorch's own index, else PyPI's after all.
CPU_INDEX := https://download.pytorch.org/whl/cpu
PROBE := import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=4)

ifdef TORCH
.PHONY: $(VENV)/.torch
endif

$(VENV)/.torch: $(VENV)/.made
	@want='$(TORCH)'; index=''; \
	if [ -z "$$want" ] && nvidia-smi >/dev/null 2>&1; then \
	    want='torch==2.11.0'; \
	elif [ -z "$$want" ]; then \
	    want='torch==2.13.0'; \
	    if [ "$$(uname -s)" = Linux ] && timeout 5 $(PY) -c "$(PROBE)" >/dev/null 2>&1; then \
	        index='--extra-index-url $(CPU_INDEX)'; \
	    fi; \
	fi; \
	echo "installing $$want into $(VENV)"; \
	$(PIP) install $$index "$$want"
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch requirements/runtime.txt $(CONSTRAINTS) setup.py
	@echo 'installing what internlm_mm needs'
	@$(PIP) install -c $(CONSTRAINTS) -r requirements/runtime.txt setuptools wheel
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.tests: $(VENV)/.runtime requirements/tests.txt
	@echo 'installing what the tests need'
	@$(PIP) install -c $(CONSTRAINTS) -r requirements/tests.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime requirements/docs.txt
	@echo 'installing what the documentation needs'
	@$(PIP) install -c $(CONSTRAINTS) -r requirements/docs.txt
	@touch $@

install: $(VENV)/.runtime
	@echo 'internlm_mm is ready: $(PY) -m internlm_mm'

demo: $(VENV)/.runtime
	@$(PY) tools/demo.py

test: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m '$(FAST)'

# Its processes are as many as two cores can do with: one worker. (None would do, but where a worker
# crashes, a test has failed and the others go on.)
test-parallel: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 1 -m 'parallel and not gpu and not multi_gpu'

test-slow: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 1 -m 'slow or launcher'

# What failed last, by itself. It fails if nothing is known to have failed.
test-failed: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q --last-failed --last-failed-no-failures none

# Where there are one or two; skipped elsewhere, and the reasons printed.
test-gpu: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m 'gpu or multi_gpu'

lint: $(VENV)/.tests
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m codespell_lib $$(git ls-files)

# --quiet would hide the warnings that --strict is there for.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir site
	@echo 'open site/index.html'

clean:
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
