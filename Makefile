# Every target works from a bare checkout: the first one run makes .venv and installs everything into it.
# TORCH is pinned because a newer PyTorch would be downloaded with gigabytes of CUDA packages on every change of
# the index. Another one, beside the first:
#   make VENV=.venv-211 TORCH=torch==2.11.0 TRITON=triton==3.6.0 NUMPY='numpy<2.4' test
# On a machine with its own PyTorch: make VENV= test (uses that python, which needs pyproject.toml's dev packages, and
# installs nothing).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
NUMPY ?= numpy
VENV ?= .venv
# Test files run in so many processes; one for each core, but no more than eight.
JOBS ?= auto

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
# Its name stands for what was asked for: with another PYTHON, TORCH, TRITON or NUMPY the environment is not ready.
READY := $(VENV)/ready-$(shell printf '%s' '$(PYTHON) $(TORCH) $(TRITON) $(NUMPY)' | cksum | cut -d ' ' -f 1)
endif

PYTEST := $(RUN) -m pytest -q -n $(JOBS) --maxprocesses 8 --dist loadgroup --timeout 600 --durations=8

.PHONY: demo test test-fast test-slow test-gpu bench lint clean distclean

demo: $(READY)
	$(RUN) -m mopro_fast demo

# Every test that needs no GPU but those marked slow.
test: $(READY)
	$(PYTEST) -m "not slow"

# Those that take a moment, for daily work.
test-fast: $(READY)
	$(PYTEST) -m "not medium and not slow"

# Those marked slow.
test-slow: $(READY)
	$(PYTEST) -m slow

# On a CUDA machine: every stage of tests/gpu.sh, which says how to run some. OUT receives logs and JSON results.
test-gpu: $(READY)
	PYTHON="$(RUN)" bash tests/gpu.sh

# The ops need a CUDA machine to be timed; on a CPU small shapes only are run and nothing is kept.
bench: $(READY)
	$(RUN) bench/ops.py
	$(RUN) bench/demo_accuracy.py
	$(RUN) bench/tables.py

# clang-format is the environment's package, as ruff is: whatever is on the PATH may format otherwise.
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -c "from clang_format import clang_format; clang_format()" --dry-run --Werror \
	  $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp tests/cuda_on_host/*.h)

# What builds and tests made. Trainings (runs/) and the environment stay.
clean:
	rm -rf build dist *.egg-info mopro_fast/_C*.so mopro_fast/_files*.so mopro_fast/_views*.so mopro_fast/_build_info.json
	rm -rf .pytest_cache .ruff_cache .benchmarks

# The environment, too, if it was made here.
distclean: clean
	@case "$(CURDIR)/" in "$(abspath $(or $(VENV),none))"/*) echo "VENV=$(VENV) holds this checkout: it stays" >&2; exit 1;; esac
	test ! -e "$(VENV)/made-by-make" || rm -rf "$(VENV)"

VERSION := -c 'import sys; print("Python", sys.version.split()[0], "of", sys.base_prefix)'

$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/python || { $(PYTHON) -m venv $(VENV) && touch $(VENV)/made-by-make; }
	@has=$$($(VENV)/bin/python $(VERSION)) && asked=$$($(PYTHON) $(VERSION)) && test "$$has" = "$$asked" || \
	  { echo "$(VENV) has $$has, PYTHON=$(PYTHON) is $$asked: name another folder in VENV" >&2; exit 1; }
	rm -f $(VENV)/ready $(VENV)/ready-*
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" "$(TRITON)" "$(NUMPY)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' "$(TORCH)" "$(TRITON)" "$(NUMPY)"
	touch $@
