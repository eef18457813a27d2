# `make demo` and `make test` need python3 ≥ 3.11, a C++17 compiler and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
MINUTES ?= 3
OUT ?= tinymoe/bench/records
CUDA ?= 13

.PHONY: demo test docs lint golden bench gpu gpu-here clean

demo: .venv/demo  ## set up, train a small Mixtral on Python's library, and let it write
	@if [ -f $(RUN)/manifest.json ]; then $(BIN)/tinymoe train --resume $(RUN); \
	else $(BIN)/tinymoe train --minutes $(MINUTES) --out $(RUN); fi

test: .venv/dev  ## every test that needs no GPU
	$(BIN)/python -m pytest

docs: .venv/docs docs/_mathjax/package-lock.json  ## execute the lessons and build the site in docs/_build/html
	MPLBACKEND=agg $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "The site is in docs/_build/html: $(PYTHON) -m http.server --directory docs/_build/html shows it."

docs/_mathjax/package-lock.json: docs/package-lock.json
	$(PYTHON) docs/fetch_mathjax.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: .venv/parity  ## write the golden files anew with transformers
	$(BIN)/python tests/golden/make_golden.py

bench: .venv/parity  ## measure speed beside transformers
	$(BIN)/tinymoe bench model

gpu: gpu-here  ## on an NVIDIA GPU: its tests, the sanitizer, repetitions and records; STEPS="tests moe" for some of them
	$(GPU_PYTHON) tests/gpu_steps.py --out $(OUT) $(STEPS)

ifdef NO_VENV  # nothing is installed: $(PYTHON) has what is needed
GPU_PYTHON := PYTHONPATH=$(CURDIR) $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu: .venv/gpu
.venv/gpu: | gpu-here
endif

gpu-here:
	@nvidia-smi -L 2> /dev/null | grep -q GPU || \
		{ echo "no GPU: nvidia-smi finds none here, and nothing was installed or run" >&2; exit 2; }

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist docs/_build docs/_mathjax docs/lessons

# A stamp per set of packages, remade when pyproject.toml changes.
.venv/demo: PACKAGES := .
.venv/dev: PACKAGES := .[dev]
.venv/docs: PACKAGES := .[dev,docs]
.venv/parity: PACKAGES := .[dev,parity]
.venv/gpu: PACKAGES := .[parity,jax,cuda$(CUDA)]
.venv/gpu: MORE := jax[cuda$(CUDA)] pytest>=8.3 hypothesis>=6.115
.venv/demo .venv/dev .venv/docs .venv/parity .venv/gpu: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tinymoe needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(PACKAGES)' $(MORE:%='%')
	@touch $@
