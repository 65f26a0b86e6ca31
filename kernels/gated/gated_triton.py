"""Gated activation in Triton: act(gate) * up. The contract is gated.h; arrays are float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.activation.activation_triton import activate

BLOCK = 1024


@triton.jit
def gated_forward(y, gate, up, F, gate_first, gate_stride, up_first, up_stride, kind, BLOCK: tl.constexpr):
    """y (R, F). Row r of gate begins gate_first + r gate_stride elements behind its pointer. A program takes BLOCK columns of a row."""
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < F
    g = tl.load(gate + gate_first + row * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + up_first + row * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    a, _ = activate(g, kind)
    tl.store(y + row * F + c, (a * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    dgate,
    dup,
    dy,
    gate,
    up,
    F,
    dgate_first,
    dgate_stride,
    dup_first,
    dup_stride,
    gate_first,
    gate_stride,
    up_first,
    up_stride,
    kind,
    BLOCK: tl.constexpr,
):
    """Both gradients in one pass; they may lie in one array as gate and up do."""
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < F
    g = tl.load(gate + gate_first + row * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + up_first + row * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * F + c, mask=inside, other=0.0).to(tl.float32)
    a, derivative = activate(g, kind)
    tl.store(dgate + dgate_first + row * dgate_stride + c, (d * u * derivative).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + dup_first + row * dup_stride + c, (d * a).to(dup.dtype.element_ty), mask=inside)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that gated_gpu.py may ask for: kernel, types, constants, options. n: whether rows begin at whole vectors."""
    options = {"num_warps": 4, "num_stages": 3}
    for f, n in product(("*fp32", "*bf16"), ("i32:16", "i32")):
        strides = dict.fromkeys(("gate_first", "gate_stride", "up_first", "up_stride"), n)
        yield "gated_forward", {"y": f, "gate": f, "up": f, "F": n} | strides | {"kind": "i32"}, {"BLOCK": BLOCK}, options
        strides = dict.fromkeys(("dgate_first", "dgate_stride", "dup_first", "dup_stride"), n) | strides
        types = {"dgate": f, "dup": f, "dy": f, "gate": f, "up": f, "F": n} | strides | {"kind": "i32"}
        yield "gated_backward", types, {"BLOCK": BLOCK}, options
