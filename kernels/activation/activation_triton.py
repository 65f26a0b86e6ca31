"""Activation functions in Triton. The contract is activation.h; arrays are float32 or bfloat16.

`activate` is what `gated` and other kernels use too. Nothing cancels where a function is small, as in csrc/simd/activation.h, whose
polynomials these are; exp of what is not positive, so that nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def sigmoid_pair(x):
    """sigmoid(x) and 1 - sigmoid(x)."""
    e = tl.exp(-tl.abs(x))
    high = 1.0 / (1.0 + e)  # of |x|
    low = e * high
    return tl.where(x < 0, low, high), tl.where(x < 0, high, low)


@triton.jit
def normal(x):
    """The normal distribution function and its density at x."""
    z = 0.5 * x * x
    e = tl.exp(-z)
    a = tl.abs(x) * 0.70710678
    p = 7.853859671e-5 * z - 8.010193116e-4
    p = p * z + 5.188327628e-3
    p = p * z - 2.685381190e-2
    p = p * z + 1.128358515e-1
    p = p * z - 3.761262582e-1
    middle = 0.5 + (0.35355339 * x) * (p * z + 1.128379166)  # |a| < 1
    t = 1.0 / (0.4 * a + 1.0)
    q = -0.117370754 * t + 0.246633753
    q = q * t + 0.0049162521
    q = q * t + 0.214964151
    q = q * t + 0.19818607
    q = q * t + 0.226788446
    q = q * t + 0.225620806
    tail = 0.5 * (q * t) * e  # of -|x|
    return tl.where(a < 1, middle, tl.where(x < 0, tail, 1.0 - tail)), e * 0.39894228


@triton.jit
def gelu(x):
    """x Phi(x) and its derivative."""
    phi, density = normal(x)
    return x * phi, x * density + phi


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative."""
    xx = tl.minimum(x * x, 1e4)  # far out u only has to be large, and 0 * inf must not occur
    s, rest = sigmoid_pair(x * (0.071354813 * xx + 1.5957691))
    return x * s, s + x * s * rest * (0.21406444 * xx + 1.5957691)


@triton.jit
def silu(x):
    """x sigmoid(x) and its derivative."""
    s, rest = sigmoid_pair(x)
    return x * s, s + x * s * rest


@triton.jit
def relu(x):
    """max(x, 0), nan staying nan, and its derivative."""
    return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def activate(x, kind):
    """act(x) and act'(x), float32, for the number of fastlm._C.activation_kinds: constexpr, or a branch that all threads take."""
    y, derivative = x, x * 0.0 + 1.0
    if kind == 1:
        y, derivative = gelu(x)
    elif kind == 2:
        y, derivative = gelu_tanh(x)
    elif kind == 3:
        y, derivative = silu(x)
    elif kind == 4:
        y, derivative = relu(x)
    return y, derivative


@triton.jit
def activation_forward(y, x, tail, kind, BLOCK: tl.constexpr):
    """A program takes BLOCK elements, the last one `tail`: the others need no mask, so their loads are of whole vectors."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        a, _ = activate(tl.load(x + first + i).to(tl.float32), kind)
        tl.store(y + first + i, a.to(y.dtype.element_ty))
    else:
        a, _ = activate(tl.load(x + first + i, mask=i < tail, other=0.0).to(tl.float32), kind)
        tl.store(y + first + i, a.to(y.dtype.element_ty), mask=i < tail)


@triton.jit
def activation_backward(dx, dy, x, tail, kind, BLOCK: tl.constexpr):
    """dx may be dy."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        _, derivative = activate(tl.load(x + first + i).to(tl.float32), kind)
        d = tl.load(dy + first + i).to(tl.float32) * derivative
        tl.store(dx + first + i, d.to(dx.dtype.element_ty))
    else:
        _, derivative = activate(tl.load(x + first + i, mask=i < tail, other=0.0).to(tl.float32), kind)
        d = tl.load(dy + first + i, mask=i < tail, other=0.0).to(tl.float32) * derivative
        tl.store(dx + first + i, d.to(dx.dtype.element_ty), mask=i < tail)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that activation_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3}
    for f in ("*fp32", "*bf16"):
        yield "activation_forward", {"y": f, "x": f, "tail": "i32", "kind": "i32"}, {"BLOCK": BLOCK}, options
        types = {"dx": f, "dy": f, "x": f, "tail": "i32", "kind": "i32"}
        yield "activation_backward", types, {"BLOCK": BLOCK}, options
