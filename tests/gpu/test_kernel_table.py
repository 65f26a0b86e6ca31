"""kernels/README.md: what it says of a GPU twin follows from the results of tools/gpu_check."""

from __future__ import annotations

import importlib.util
import json

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


def test_no_layer_is_skipped_where_the_toolkit_is():
    """Where nvcc is, the layers that need no GPU must all be there: `make dev` installs what they need."""
    if gpu_build().nvcc():
        assert not any(layers().values()), layers()
