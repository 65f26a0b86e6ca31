"""Sums and multiples of arrays in Triton: what NumPy does on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl


@triton.jit
def add(out, x, y, n, period, BLOCK: tl.constexpr):
    """out (n,) = x (n,) + y (period,), repeated."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) + tl.load(y + at % period, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=at < n)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that add_gpu.py may ask for: kernel, types, constants, options."""
    for out, y in product(("*fp32", "*bf16"), repeat=2):
        types = {"out": out, "x": out, "y": y, "n": "i32", "period": "i32"}
        yield "add", types, {"BLOCK": 1024}, {"num_warps": 4, "num_stages": 3}
