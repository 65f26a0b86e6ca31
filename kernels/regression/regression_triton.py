"""Mean squared error and binary cross-entropy in Triton. x and dx are float32 or bfloat16, targets float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _counted(t, inside, ignored, binary):
    return inside & ((t != ignored) | (binary == 0))


@triton.jit
def regression_forward(partial, x, targets, n, ignored, binary, BLOCK: tl.constexpr):
    """partial (pieces, 2): a sum of losses and a count for BLOCK numbers. A binary target outside [0, 1] gives nan."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    t = tl.load(targets + i, mask=i < n, other=0.0)
    if binary:
        e = tl.exp(-tl.abs(v))
        rest = tl.where(e < 1e-3, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))
        loss = tl.where((t >= 0) & (t <= 1), tl.where(v > 0, v, 0.0) - v * t + rest, float("nan"))
    else:
        loss = (v - t) * (v - t)
    counted = _counted(t, i < n, ignored, binary)
    tl.store(partial + 2 * tl.program_id(0), tl.sum(tl.where(counted, loss, 0.0), 0))
    tl.store(partial + 2 * tl.program_id(0) + 1, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def regression_total(total, count, partial, pieces, BLOCK: tl.constexpr):
    """total () = the sums over the counts, count (1,) = the counts, at least 1."""
    sums = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + 2 * i, mask=i < pieces, other=0.0)
        counts += tl.load(partial + 2 * i + 1, mask=i < pieces, other=0.0)
    number = tl.maximum(tl.sum(counts, 0), 1.0)
    tl.store(count, number)
    tl.store(total, tl.div_rn(tl.sum(sums, 0), number))


@triton.jit
def regression_backward(dx, dy, x, targets, count, n, ignored, binary, BLOCK: tl.constexpr):
    """dx (n,) for the gradient dy () of the mean."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    t = tl.load(targets + i, mask=i < n, other=0.0)
    each = tl.div_rn(tl.load(dy).to(tl.float32), tl.load(count))
    if binary:
        e = tl.exp(-tl.abs(v))
        slope = tl.where(v < 0, e, 1.0) / (1.0 + e) - t
    else:
        slope = 2.0 * (v - t)
    d = tl.where(_counted(t, i < n, ignored, binary), slope * each, 0.0)
    tl.store(dx + i, d.to(dx.dtype.element_ty), mask=i < n)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that regression_gpu.py may ask for: kernel, types, constants, options."""
    options, block = {"num_warps": 4, "num_stages": 3}, {"BLOCK": 1024}
    more: dict[str, str | None] = {"n": "i32", "ignored": "fp32", "binary": "i32"}
    for f in ("*fp32", "*bf16"):
        yield "regression_forward", {"partial": "*fp32", "x": f, "targets": "*fp32"} | more, block, options
        types = {"dx": f, "dy": "*fp32", "x": f, "targets": "*fp32", "count": "*fp32"}
        yield "regression_backward", types | more, block, options
    yield "regression_total", {"total": "*fp32", "count": "*fp32", "partial": "*fp32", "pieces": "i32"}, block, options
