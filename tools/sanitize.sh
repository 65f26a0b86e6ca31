#!/bin/bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan and runs what reads foreign bytes under
# both: the mutated files, the hostile replicas, and the kernel that decodes quantised blocks. Arguments name other tests.
#     tools/sanitize.sh [tests/...]
set -eu -o pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin build=$PWD/build/asan package=$PWD/build/asan/fastlm-package
mkdir -p "$package/fastlm"

PATH="$bin:$PATH" cmake -S . -B "$build" -G Ninja -DFASTLM_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 \
  $(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package/fastlm" -Dpybind11_DIR="$("$bin/pybind11-config" --cmakedir)" \
  -DPython_EXECUTABLE="$bin/python" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
"$bin/ninja" -C "$build" --quiet

# The package is the tree's own, but for the extension module: links, so that nothing is stale.
for entry in fastlm/*; do
  case $entry in *.so | *__pycache__) continue ;; esac
  ln -sfn "$PWD/$entry" "$package/$entry"
done
ln -sfn "$PWD/kernels" "$package/fastlm/kernels"
for entry in tests tools pyproject.toml; do ln -sfn "$PWD/$entry" "$package/$entry"; done

# Python itself is not instrumented: the runtimes come first by LD_PRELOAD (libstdc++ too, or exceptions thrown before it loads are not
# intercepted), and Python's own arenas, which hide overflows, give way to malloc. A leak at exit is Python's, not ours.
compiler=${CXX:-c++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libubsan.so):$($compiler -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=300
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc PYTHONPATH=$package FASTLM_SANITIZED=1 FASTLM_FUZZ_SECONDS=${FASTLM_FUZZ_SECONDS:-10}
cd "$package"
"$bin/python" -c "import fastlm._C as c; assert 'build/asan' in c.__file__, c.__file__"
if [ $# = 0 ]; then set -- tests/checkpoint tests/kernels/test_dequantize.py; fi
exec "$bin/python" -m pytest -p no:cacheprovider "$@"
