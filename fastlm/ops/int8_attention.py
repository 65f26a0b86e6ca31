"""Attention over all keys with queries, keys, values and weights in 8 bits: what models have whose weights are Q8_ROW."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.ops import check
from fastlm.ops.attention import lengths_of, offsets_of
from fastlm.ops.cache_append import head_view
from fastlm.tensor import data, recording, wrap


def int8_attention(q: Any, k: Any, v: Any, *, scale: float | None = None, lengths: Any = None, offsets: Any = None) -> Any:
    """softmax(scale q k^T) v over all keys of a sequence, rounded to 8 bits as kernels/int8_attention/int8_attention.h says.

    q: (B, T, H, D), k: (B, S, G, D), v: (B, S, G, E) float32 on the host, H a multiple of G: query head h reads key head h // (H // G).
    Views with any stride over batch and time are read in place. scale: 1 / sqrt(D) by default. lengths: (B,) int32, the valid keys of
    each sequence (default S); those beyond are never read, and queries of a sequence without keys give zeros.
    offsets: (N + 1,) int32 from 0 to R, growing: sequences of different lengths lie one behind the other, q is then (R, H, D), k and
    v are (R, G, .), and sequence n has the rows offsets[n] .. offsets[n + 1].
    A sequence has the same bits alone and in any batch, packed or not, on any number of threads and every instruction set.
    Returns (B, T, H, E) or (R, H, E) float32, a Tensor where an input is one. There is no gradient: `attention` has one.
    Raises TypeError for a dtype, ValueError for a shape, a length or offsets out of range, or where a gradient is wanted.
    """
    op = "int8_attention"
    if recording(q, k, v):
        raise ValueError(f"[{op}] q, k and v must want no gradient: attention has one.")
    packed = offsets is not None
    first, lead = ("(R", 1) if packed else ("(B, S", 2)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.on_host(op, name, data(x))
    qd, kd, vd = (_view(op, name, data(x), packed) for name, x in (("q", q), ("k", k), ("v", v)))
    (H, D), (G, _), E = qd.shape[lead:], kd.shape[lead:], vd.shape[-1]
    if D == 0 or G == 0 or H % G:
        raise ValueError(
            f"[{op}] q must be {first.replace('S', 'T')}, H, D) with D > 0 and H a multiple of k's {G} heads, got {qd.shape}."
        )
    rows = qd.shape[:1] if packed else (qd.shape[0], kd.shape[1])
    check.shape(op, "k", kd, f"{first}, G, D)", (*rows, G, D), f"q is {qd.shape}.")
    check.shape(op, "v", vd, f"{first}, G, E)", (*rows, G, E), f"k is {kd.shape}.")
    scale = D**-0.5 if scale is None else check.number(op, "scale", scale)
    longest = kd.shape[1] if not packed else 0
    if packed:
        if lengths is not None:
            raise ValueError(f"[{op}] lengths must be None with offsets, which say them.")
        offsets, longest = offsets_of(op, offsets, qd)
    elif lengths is not None:
        lengths = lengths_of(op, lengths, len(qd), longest, qd)
    most, deepest = _C.int8_attention_keys, _C.int8_attention_depth
    if longest > most or deepest < D:  # sums of products of bytes would not fit 32 bits
        raise ValueError(f"[{op}] a sequence must have at most {most} keys of at most {deepest} numbers, got {longest} of {D}.")
    y = backend.empty((*qd.shape[:-1], E))
    _C.int8_attention(y, qd, kd, vd, lengths, offsets, longest, scale)
    return wrap(y, q, k, v)


def _view(op: str, name: str, x: Any, packed: bool) -> Array:
    """x as it lies if the kernel can walk it, else a copy."""
    x = check.array(op, name, x) if not isinstance(x, np.ndarray) or x.dtype != np.float32 else x
    if x.ndim != (3 if packed else 4):
        raise ValueError(f"[{op}] {name} must have {3 if packed else 4} axes, got shape {x.shape}.")
    view: Array = head_view(op, name, x[None])[0] if packed else head_view(op, name, x)
    return view
