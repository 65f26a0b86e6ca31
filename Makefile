# Two commands matter: `make demo` and `make test`. Both work in a fresh clone with Python 3.11+, a C++17 compiler and a package registry.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
ifeq ($(PYTHON),)
$(error fastlm needs Python 3.11 or newer: `make PYTHON=/path/to/python3.12 ...` names one)
endif
VENV := .venv
BIN := $(abspath $(VENV))/bin
BUILD := build/dev
RUN := PYTHONPATH=. $(BIN)/python
# The requirements are read from pyproject.toml; the sentinel carries their hash, so a changed list installs again and nothing else does.
READY := $(VENV)/.ready-$(shell $(PYTHON) tools/requirements.py --hash)
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu)

.PHONY: dev test learn lint format demo bench wheel sanitize stubs kernel-table gpu-images wheel-gpu gpu-check clean
.DEFAULT_GOAL := dev

dev: $(READY)
	@mkdir -p build
	@ln -sfn ../kernels fastlm/kernels
	@ln -sfn ../benchmarks fastlm/benchmarks
	@PATH="$(BIN):$$PATH" cmake -S . -B $(BUILD) -G Ninja $$(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) \
	  -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath fastlm) -Dpybind11_DIR="$$($(BIN)/pybind11-config --cmakedir)" \
	  -DPython_EXECUTABLE=$(BIN)/python >$(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@$(BIN)/ninja -C $(BUILD) --quiet

# A virtual environment that was interrupted before its first sentinel is thrown away; one with an older list is brought up to date.
$(READY): tools/requirements.py
	@mkdir -p build
	@ls $(VENV)/.ready* >/dev/null 2>&1 || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing what pyproject.toml asks for"
	@$(PYTHON) tools/requirements.py > build/requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --retries 5 -r build/requirements.txt
	@touch $@

test: dev
	@$(RUN) -m pytest $(TESTS)

# Every objective on real text, in minutes.
learn: dev
	@$(RUN) -m pytest -m learning -s tests/train/test_real_text.py

lint: dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-cache >build/imports.log || { cat build/imports.log; exit 1; }
	@$(RUN) tools/check_weak_symbols.py $(BUILD)
	@$(RUN) tools/stubs.py --check
	@$(RUN) tools/kernel_table.py --check

format: dev
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

# What reads foreign bytes, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(READY)
	@tools/sanitize.sh

stubs: dev
	@$(RUN) tools/stubs.py

kernel-table: $(READY)
	@$(RUN) tools/kernel_table.py

demo: dev
	@$(RUN) -m fastlm demo

# The table of targets: benchmarks/results/DATE-MACHINE.jsonl, .md and .png. `make bench MINUTES=3` does a part and goes on next time.
bench: dev
	@$(RUN) -m fastlm bench $(OPS) $(if $(MINUTES),--minutes $(MINUTES))

# Through ccache, where that is, with the name of the compiler that `make dev` uses: what has been compiled there is not compiled again.
PIP_WHEEL := $(if $(shell command -v ccache),CXX="$${CXX:-c++}" CMAKE_CXX_COMPILER_LAUNCHER=ccache) $(BIN)/python -m pip wheel
wheel: $(READY)
	@rm -rf dist
	@$(PIP_WHEEL) -q --no-deps --disable-pip-version-check -w dist .
	@$(BIN)/python tools/check_wheel.py dist/*.whl

# The GPU's kernels, compiled ahead of time, in the wheel: where nvcc and triton are. GPU_ARCHS=90 builds a part.
GPU_ARCHS := 80 90 100 ptx
gpu-images: dev
	@$(RUN) tools/gpu_build.py --check --archs $(GPU_ARCHS)

wheel-gpu: gpu-images
	@rm -rf dist
	@PATH="$(BIN):$$PATH" $(PIP_WHEEL) -q --no-deps --no-build-isolation --disable-pip-version-check -w dist .
	@$(RUN) tools/check_wheel.py dist/*.whl --gpu $(GPU_ARCHS)

# On a machine with a GPU: tests, sanitizer, measurements with peers, at most ten minutes.
gpu-check: dev
	@$(RUN) tools/gpu_check.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis fastlm/_C*.so fastlm/kernels fastlm/benchmarks
