# Every target works from a bare checkout: the first one run makes .venv and installs everything into it.
# TORCH is pinned because a newer PyTorch would be downloaded with gigabytes of CUDA packages on every change of
# the index. On a machine with its own PyTorch: make VENV= test (uses that python and installs nothing).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test test-gpu bench lint clean

demo: $(READY)
	$(RUN) -m mopro_fast demo

test: $(READY)
	$(RUN) -m pytest -q --durations=8

# On a CUDA machine: build, kernel tests, compute-sanitizer, then timings. OUT receives the JSON results.
test-gpu: $(READY)
	PYTHON="$(RUN)" bash tests/gpu.sh

# The ops need a CUDA machine to be timed; on a CPU small shapes only are run and nothing is kept.
bench: $(READY)
	$(RUN) bench/ops.py
	$(RUN) bench/demo_accuracy.py
	$(RUN) bench/tables.py

lint: $(READY)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp

clean:
	rm -rf .venv build dist *.egg-info mopro_fast/_C*.so mopro_fast/_views*.so mopro_fast/_build_info.json runs

$(VENV)/ready: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" "$(TRITON)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' "$(TORCH)" "$(TRITON)"
	touch $@
