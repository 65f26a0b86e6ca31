"""kernels/README.md: what it says of a GPU twin follows from the results of tools/gpu_check."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

from fastlm.cuda.emulated import emulated
from tests.gpu.build import ROOT, gpu_build, layers


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verified_where_the_sources_are_those_that_passed(tmp_path):
    """A pass counts while the sources are the same; a later failure, a dry run or changed sources undo it."""
    tool = load("kernel_table")

    def row():
        return next(line for line in tool.table(tmp_path).splitlines() if "[layer_norm]" in line)

    def result(name, passed, sources=None, **more):
        twin = {"passed": passed, "sources": sources or tool.sources("layer_norm", "cuda")}
        data = {"card": "H200", "commit": "abc1234", "date": name, "kernels": {"layer_norm:cuda": twin}} | more
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(data))

    assert row().endswith("| yes | emulated only | emulated only |")
    result("1", True, dry_run=True)
    assert "gpu-verified" not in row()
    result("2", True, sources="other")
    assert "gpu-verified" not in row()
    result("3", True)
    assert row().endswith("| yes | gpu-verified (H200, abc1234) | emulated only |")
    result("4", False)
    assert "gpu-verified" not in row()


def test_a_header_counts(tmp_path, monkeypatch):
    """Every header that a twin includes is part of what passed, but those of the emulator are not; nor is another operation's."""
    tool = load("kernel_table")
    for part in ("csrc/cuda", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part)
    monkeypatch.setattr(tool, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(tool.gpu_sources, "ROOT", tmp_path)

    def changed(path):
        before = {key: tool.sources(*key) for key in twins}
        with (tmp_path / path).open("a") as file:
            file.write("\n")
        return {f"{op}:{twin}" for op, twin in twins if tool.sources(op, twin) != before[op, twin]}

    twins = [*((op, twin) for op in ("layer_norm", "matmul", "attention") for twin in ("cuda", "triton")), ("gated", "triton")]
    assert changed("csrc/cuda/device.h") == {"layer_norm:cuda", "matmul:cuda", "attention:cuda"}
    assert changed("csrc/cuda/rows.h") == {"layer_norm:cuda"}
    assert changed("csrc/cuda/ptx_hopper.h") == {"matmul:cuda", "attention:cuda"}
    assert changed("kernels/matmul/epilogue_cuda.h") == {"matmul:cuda"}
    assert changed("kernels/attention/attention_cuda_tile.h") == {"attention:cuda"}
    assert changed("kernels/activation/activation_triton.py") == {"matmul:triton", "gated:triton"}
    assert changed("kernels/matmul/matmul_tiles.py") == {"matmul:triton", "matmul:cuda"}
    assert changed("kernels/layer_norm/layer_norm_gpu.py") == {"layer_norm:triton", "layer_norm:cuda"}
    assert not changed("csrc/cuda/emulator.h") | changed("csrc/cuda/ptx_model.h") | changed("kernels/matmul/matmul_ref.py")


SOURCE = """#include "other.h"
FASTLM_GLOBAL void planted(float* y) { y[0] = VALUE; }
FASTLM_KERNEL(planted)
"""


def test_the_emulator_is_compiled_again(tmp_path):
    """Where a header that a header includes has changed, or a definition; else the library stays as it is."""
    (tmp_path / "planted_cuda.cu").write_text(SOURCE)
    (tmp_path / "other.h").write_text('#include "csrc/cuda/device.h"\n#include "value.h"\n')

    def made(*defines):
        library = gpu_build().emulate("planted", tmp_path / "made", defines, source=tmp_path / "planted_cuda.cu")
        copy = tmp_path / str(len(os.listdir(tmp_path)))  # one process loads a path once
        copy.mkdir()
        shutil.copy(library, copy)
        with emulated(twin="cuda", libraries=copy) as on:
            y = on.empty((1,))
            on.cuda("planted", "planted", "p", 1, 0, 1)((1, 1, 1), [y.pointer])
            return float(y.numpy()[0]), library.stat().st_ino

    (tmp_path / "value.h").write_text("#ifndef VALUE\n#define VALUE 1.0f\n#endif\n")
    first = made()
    assert first[0] == 1
    assert made() == first
    (tmp_path / "value.h").write_text("#ifndef VALUE\n#define VALUE 2.0f\n#endif\n")
    os.utime(tmp_path / "value.h", (0, 0))  # older than the library, as a file of another branch may be
    assert made()[0] == 2
    assert made("VALUE=3.0f")[0] == 3


def test_no_layer_is_skipped_where_the_toolkit_is():
    """Where nvcc is, the layers that need no GPU must all be there: `make dev` installs what they need."""
    if gpu_build().nvcc():
        assert not any(layers().values()), layers()
