"""Every GPU kernel is compiled ahead of time, as users get it, and held to its budget: tools/gpu_build.py --check.

All forms for sm_90; the CUDA C++ kernels and one form of each Triton kernel for sm_80 and sm_100. conftest.py compiles them.
"""

from __future__ import annotations

import pytest

from tests.gpu.build import gpu_build, layers

pytestmark = pytest.mark.skipif(bool(layers()["ahead-of-time compilation"]), reason=layers()["ahead-of-time compilation"])


@pytest.mark.parametrize(
    "arguments", [("--archs", "90"), ("--archs", "80", "100", "--one-each")], ids=["sm_90", "sm_80 and sm_100, one form each"]
)
def test_budget(compiled):
    """No stack, no spilled registers, and the tensor core instructions that EXPECTS names."""
    status, said = compiled
    assert status == 0, said


PLANTED = """
#include "csrc/cuda/device.h"
FASTLM_GLOBAL void planted(float* y, const int* i, int n) {
    float room[64];
    for (int k = 0; k < 64; ++k) room[k] = y[k];
    for (int k = 0; k < n; ++k) room[i[k] & 63] += 1.0f;
    y[0] = room[i[n] & 63];
}
FASTLM_KERNEL(planted)
"""


def test_the_check_can_fail(tmp_path, monkeypatch):
    """A kernel that indexes an array of its own has a stack; one without the instruction it should have is found too."""
    tool = gpu_build()
    source = tmp_path / "planted_cuda.cu"
    source.write_text(PLANTED)
    _, (entry,) = tool.compile_cuda("planted", "90", source)
    assert any("256 bytes of stack" in p for p in tool.over_budget("planted", {"key": "cuda planted"} | entry, "90"))
    clean = {"key": "triton matmul x:*bf16", "HGMMA": 4, "stack": 0}
    monkeypatch.setattr(tool, "expects", lambda op: {"matmul*": {"90": "HGMMA", "80": "HMMA"}})
    assert tool.over_budget("matmul", clean, "90") == []
    assert tool.over_budget("matmul", clean | {"HGMMA": 0}, "90") == ["matmul: triton matmul x:*bf16: no HGMMA on sm_90"]
    assert tool.over_budget("matmul", clean, "80") == ["matmul: triton matmul x:*bf16: no HMMA on sm_80"]
    assert tool.over_budget("matmul", clean, "100") == []
    assert tool.over_budget("matmul", clean | {"products": 1, "HMMA": 2}, "100") == []
    (problem,) = tool.over_budget("matmul", clean | {"products": 1, "HGMMA": 0}, "100")
    assert problem == "matmul: triton matmul x:*bf16: products of bfloat16 without tensor cores on sm_100"
    assert tool.unmatched("matmul", {"matmul x:*bf16", "other"}) == []
    assert tool.unmatched("matmul", {"grouped x:*bf16"}) == ["matmul: EXPECTS has 'matmul*', but no kernel is called so"]


def test_instructions_of_an_entry_point(tmp_path):
    """They are counted in the disassembly of the kernel itself."""
    tool = gpu_build()
    source = tmp_path / "spilled_cuda.cu"
    source.write_text(PLANTED)
    image, entries = tool.compile_cuda("planted", "90", source)
    tool.count_instructions(image, entries)
    assert entries[0]["LDL"] > 0
    assert entries[0]["HGMMA"] == 0
