#!/usr/bin/env bash
# Builds the extension for AArch64 with a cross compiler and runs the kernel tests under qemu-user.
#   tools/aarch64.sh [pytest arguments, default: tests/kernels tests/runtime]
# Needs Debian packages: g++-aarch64-linux-gnu qemu-user, and `dpkg --add-architecture arm64 && apt-get update` for the target's Python.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
work=$here/build/aarch64
root=$work/root
mkdir -p "$work/debs" "$root" "$work/package"

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$tool" >/dev/null || { echo "aarch64: $tool is not installed; apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 3; }
done

if [ ! -e "$work/.root" ]; then
    (cd "$work/debs" && apt-get download -q $(printf '%s:arm64 ' python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
        libpython3.11-dev libc6 libexpat1 zlib1g libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libstdc++6 libgcc-s1 \
        libncursesw6 libtinfo6 libreadline8 libcrypt1))
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
    touch "$work/.root"
fi
if [ ! -e "$work/.site" ]; then
    .venv/bin/pip install -q --target "$work/site" --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 --python-version 3.11 --implementation cp --only-binary=:all: \
        numpy ml_dtypes safetensors tokenizers minijinja rich pytest hypothesis gguf
    touch "$work/.site"
fi

.venv/bin/cmake -S . -B "$work/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$here/.venv/bin/ninja" \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/package/fastlm" -DPython_EXECUTABLE="$here/.venv/bin/python" \
    -DPython_INCLUDE_DIR="$root/usr/include/python3.11" -DCMAKE_CXX_FLAGS="-isystem $root/usr/include" \
    -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so -Dpybind11_DIR="$(.venv/bin/pybind11-config --cmakedir)" >/dev/null
.venv/bin/ninja -C "$work/cmake"

# The package: links to the tree's Python, and the extension that was just built.
for entry in fastlm/*; do
    case $entry in *.so) ;; *) ln -sfn "$here/$entry" "$work/package/$entry" ;; esac
done
ln -sfn "$here/kernels" "$work/package/fastlm/kernels"
[ $# -gt 0 ] || set -- tests/kernels tests/runtime
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$work/package:$work/site" exec qemu-aarch64 -L "$root" "$root/usr/bin/python3.11" -P -m pytest --import-mode=importlib -p no:cacheprovider "$@"
