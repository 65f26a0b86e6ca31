"""Matrix products: `matmul`. The order of summation is part of the contract (CONTRIBUTING.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import data, leaf, needs_grad, record, recording, wrap

# What b may be stored as, and the number of `Storage` in matmul.h.
STORAGE = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float16): 2}


def matmul(a: Any, b: Any) -> Any:
    """a @ b. Every element is one chain of fused multiply-adds over k = 0 .. K-1 that starts from zero.

    a: (..., M, K) float32. b: (K, N), or (..., K, N) with the leading axes of a. Returns (..., M, N) float32: a Tensor where an input
    is one. On a device a and b may both be bfloat16, and so is the product. Raises TypeError for a dtype, ValueError for a shape.
    """
    ad = check.array("matmul", "a", data(a), at_least=2)
    bd = check.array("matmul", "b", data(b), at_least=2)
    lead, (M, K), N = ad.shape[:-2], ad.shape[-2:], bd.shape[-1]
    if bd.ndim == 2:
        check.shape("matmul", "b", bd, "(K, N)", (K, N), f"a is {ad.shape}.")
    else:
        check.shape("matmul", "b", bd, "(..., K, N)", (*lead, K, N), f"a is {ad.shape}.")
    shared = bd.ndim == 2
    batch = 1 if shared else math.prod(lead)
    if shared:
        M = ad.size // K if K else math.prod(ad.shape[:-1])
    c = backend.empty_like(ad, (*ad.shape[:-1], N))
    product(c, ad, bd, M, N, K, batch=batch)
    if not recording(a, b):
        return wrap(c, a, b)

    def backward(dc: Array) -> Sequence[Array | None]:
        dc = contiguous(dc)
        da = db = None
        if needs_grad(a):
            da = backend.empty_like(ad)
            product(da, dc, bd, M, K, N, batch=batch, b_transposed=True)
        if needs_grad(b):
            target = leaf(b)
            total, add = target.grad_target() if target is not None else (backend.empty_like(bd), False)
            product(total, ad, dc, K, N, M, batch=batch, a_transposed=True, accumulate=add)
            db = None if target is not None else total
        return da, db

    return record(c, (a, b), backward)


def product(
    c: Array,
    a: Array,
    b: Array,
    M: int,
    N: int,
    K: int,
    *,
    batch: int = 1,
    a_transposed: bool = False,
    b_transposed: bool = False,
    accumulate: bool = False,
) -> None:
    """c (batch, M, N) = or += a b on checked, contiguous arrays. `accumulate`: the chain goes on from c."""
    storage = STORAGE[b.dtype]
    kernels(c).matmul(c, None, a, b, None, None, batch, M, N, K, M * K, K * N, a_transposed, b_transposed, storage, accumulate, 0)
