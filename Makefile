# Everything lives in .venv; nothing outside it is changed.
#   make install | demo | test | test-slow | lint | docs | clean
#   make install TORCH='torch==2.11.0'     another build of PyTorch
#   make install PYTHON=/opt/python3.12    another interpreter (3.11, 3.12 or 3.13)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: install demo test test-slow lint docs clean help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
TORCH ?=
WORKERS ?= 2
TESTS := not slow and not gpu and not multi_gpu and not launcher

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.venv-made:
	@fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
	found=''
	for python in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do
	    if "$$python" -c "$$fits" >/dev/null 2>&1; then found="$$python"; break; fi
	    if [ "$$python" = "$(PYTHON)" ]; then break; fi
	done
	if [ -z "$$found" ]; then
	    echo 'make: no Python 3.11, 3.12 or 3.13 with the venv module was found.' >&2
	    echo '      Debian, Ubuntu: apt install python3 python3-venv    any system: uv python install 3.12' >&2
	    echo '      or name one:    make install PYTHON=/path/to/python3.12' >&2
	    exit 1
	fi
	"$$found" -m venv $(VENV)
	touch $@

# PyPI's PyTorch for Linux brings several GB of CUDA libraries. A machine without a GPU is given the
# CPU build: from a local index if pip is set up with one, else from PyTorch's, else PyPI's after all.
$(VENV)/.torch: $(VENV)/.venv-made
	@want='$(TORCH)'
	index=''
	if [ -z "$$want" ] && nvidia-smi >/dev/null 2>&1; then
	    want='torch==2.11.0'
	elif [ -z "$$want" ]; then
	    want='torch==2.13.0'
	    cpu=https://download.pytorch.org/whl/cpu
	    probe="import urllib.request as u; u.urlopen('$$cpu/torch/', timeout=4)"
	    if [ "$$(uname -s)" = Linux ] && timeout 5 $(PY) -c "$$probe" >/dev/null 2>&1; then
	        index="--extra-index-url $$cpu"
	    fi
	fi
	echo "installing $$want"
	$(PIP) install -q $$index "$$want"
	touch $@

$(VENV)/.runtime: $(VENV)/.torch requirements/runtime.txt $(CONSTRAINTS) setup.py
	@echo 'installing what internlm_mm needs'
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/runtime.txt setuptools wheel
	$(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.tests: $(VENV)/.runtime requirements/tests.txt
	@echo 'installing what the tests need'
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/tests.txt
	touch $@

$(VENV)/.docs: $(VENV)/.runtime requirements/docs.txt
	@echo 'installing what the documentation needs'
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/docs.txt
	touch $@

install: $(VENV)/.runtime

demo: install
	@$(PY) tools/demo.py

test: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m '$(TESTS)'

test-slow: $(VENV)/.tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m 'slow or launcher'

lint: $(VENV)/.tests
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib

docs: $(VENV)/.docs
	@$(PY) -m mkdocs build --strict --quiet --site-dir site
	echo 'open site/index.html'

clean:
	rm -rf $(VENV) build dist site work_dirs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
