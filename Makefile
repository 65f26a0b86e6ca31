# Two commands matter: `make demo` and `make test`. Both work in a fresh clone with Python 3.11+, a C++17 compiler and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev

.PHONY: dev
dev: $(VENV)/.ready
	@ln -sfn ../kernels fastlm/kernels
	@ln -sfn ../benchmarks fastlm/benchmarks
	@$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) $(shell command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath fastlm) -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	@$(BIN)/ninja -C $(BUILD)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q pybind11 scikit-build-core ninja cmake
	$(BIN)/pip install -q numpy ml_dtypes safetensors tokenizers minijinja rich matplotlib pytest pytest-benchmark pytest-xdist hypothesis gguf ruff mypy import-linter clang-format
	touch $@
