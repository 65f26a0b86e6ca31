"""Scaled dot-product attention with grouped heads. Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.ops.cache_append import CACHE_KINDS, SCALE, check_pages, head_view, page_table
from fastlm.ops.shape import gradients_like
from fastlm.tensor import data, leaf, needs_grad, record, recording, wrap

_F32 = np.dtype(np.float32)
_I32 = np.dtype(np.int32)


def attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    bias: Any = None,
    lengths: Any = None,
    window: int | None = None,
    table: Any = None,
) -> Any:
    """softmax(scale q k^T + bias) v over the keys that each query sees.

    q: (B, T, H, D), k: (B, S, G, D), v: (B, S, G, E) float32, H a multiple of G: query head h reads key head h // (H // G).
    k and v may both be bfloat16, or int8 with 4 bytes more for each vector's scale (`cache_append`): the bits are those of the float32
    numbers that they stand for; no gradient then. A row's bits depend on what it sees alone: not on T, S, the batch or the threads.
    Views with any stride over batch and time are read in place (a piece of a fused projection, a cache's slice); others are copied.
    scale: 1 / sqrt(D) by default. bias: (1 or B, 1 or H, T, S) float32, added to the scores; -inf hides a key.
    lengths: (B,) int32, the valid keys of each sequence (default S); those beyond are never read. Query t stands at
    lengths[b] - T + t. causal: a query sees the keys up to itself, else all valid ones; window: only the last `window` of these.
    A query that sees nothing gives zeros, and has zero gradient.
    table: (B, blocks) int32, where keys and values lie in pages: k is then (pages, page, G, D), v (pages, page, G, E), and key i of
    sequence b is number i % page of page table[b, i // page]; S is blocks * page, page a multiple of 64. The bits are those of keys
    that lie together. Numbers of blocks beyond a sequence's length may be anything. `cache_append` writes into pages. No gradient.
    Returns (B, T, H, E) float32, a Tensor where an input is one. Gradients for q, k, v and bias.
    On a device q, k, v and the result may be bfloat16, bias in either, and a row's bits may depend on T and S, but not on the batch;
    there the values of `lengths` and `table` are not checked, since they would have to be waited for; nothing outside of the pages is
    read whatever they are.
    Raises TypeError for a dtype, ValueError for a shape or a value out of range.
    """
    qd = head_view("attention", "q", data(q))
    kd, vd, extra = _keys_values(data(k), data(v))
    B, T, H, D = qd.shape
    S, G, E = kd.shape[1], kd.shape[2], vd.shape[3] - extra
    N, rows, first = B, S, "(B, S"  # of the arrays of keys and values
    if table is not None:
        if recording(q, k, v, bias):
            raise ValueError("[attention] table must be None where a gradient is wanted: keys in pages have none.")
        table = page_table("attention", table, B, kd)
        N, S, first = kd.shape[0], table.shape[1] * rows, "(pages, page"
    if D == 0 or G == 0 or H % G:
        raise ValueError(f"[attention] q must be (B, T, H, D) with D > 0 and H a multiple of k's {G} heads, got {qd.shape}.")
    if kd.shape != (N, rows, G, D + extra):
        check.shape("attention", "k", kd, f"{first}, G, D{_EXTRA[extra]})", (N, rows, G, D + extra), f"q is {qd.shape}.")
    if vd.shape[:3] != (N, rows, G) or E <= 0:
        wanted = (N, rows, G, extra + (E if E > 0 else D))
        check.shape("attention", "v", vd, f"{first}, G, E{_EXTRA[extra]})", wanted, f"k is {kd.shape}.")
    scale = D**-0.5 if scale is None else check.number("attention", "scale", scale)
    bd = None if bias is None else _bias(data(bias), B, T, S, H)
    ld = None if lengths is None else lengths_of("attention", lengths, B, S, qd)
    reach = _window("attention", window)
    if table is not None:
        if isinstance(table, np.ndarray):
            used = np.full(B, S, np.int32) if ld is None else ld
            if isinstance(used, np.ndarray):
                check_pages("attention", table[np.arange(table.shape[1]) * rows < used[:, None]], kd)
        table = _beside(qd, table)

    y = backend.empty((B, T, H, E), qd.dtype, like=qd)
    if not recording(q, k, v, bias):
        kernels(qd).attention_forward(y, None, qd, kd, vd, bd, ld, reach, scale, causal, table)
        return wrap(y, q, k, v, bias)
    if kd.dtype != qd.dtype:
        raise TypeError(f"[attention] k and v must be {qd.dtype} where a gradient is wanted, got {kd.dtype}: a cache has none.")
    stats = backend.empty((B, T, H, 2), like=qd)
    ld = None if ld is None else ld.copy()  # a cache's own array, which moves on
    kernels(qd).attention_forward(y, stats, qd, kd, vd, bd, ld, reach, scale, causal, None)

    def backward(dy: Array) -> Sequence[Array | None]:
        dq, dk, dv = _gradients(qd, kd, vd)
        target = leaf(bias)
        dbias = target.grad_buffer() if target is not None else backend.zeros(bias.shape, like=qd) if needs_grad(bias) else None
        dy = contiguous(dy)
        kernels(qd).attention_backward(dq, dk, dv, dbias, dy, y, stats, qd, kd, vd, bd, ld, reach, scale, causal)
        return dq, dk, dv, None if target is not None else dbias

    return record(y, (q, k, v, bias), backward)


def _keys_values(k: Any, v: Any) -> tuple[Array, Array, int]:
    """k and v as the kernel walks them, and how many numbers more than D their last axis has."""
    kind = CACHE_KINDS.get(getattr(k, "dtype", None), 0)
    if kind == 0:
        return head_view("attention", "k", k), head_view("attention", "v", v), 0
    if getattr(v, "dtype", None) != k.dtype:
        raise TypeError(f"[attention] v must be {k.dtype} as k is, got {getattr(v, 'dtype', type(v).__name__)}.")
    return head_view("attention", "k", k, k.dtype), head_view("attention", "v", v, k.dtype), SCALE if kind == 2 else 0


_EXTRA = {0: "", SCALE: f" + {SCALE}"}


def _gradients(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """Memory for the gradients: pieces of one array where q, k and v are pieces of one projection, so that `split` copies nothing."""
    if not isinstance(q, np.ndarray):
        return tuple(backend.empty_like(x) for x in (q, k, v))
    parts = gradients_like(*(x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (q, k, v)))
    return tuple(part.reshape(x.shape) for part, x in zip(parts, (q, k, v), strict=True))


def attention_packed(
    q: Any, k: Any, v: Any, offsets: Any, causal: bool = False, *, scale: float | None = None, window: int | None = None
) -> Any:
    """`attention` over sequences of different lengths that lie one behind the other, without padding.

    q: (R, H, D), k: (R, G, D), v: (R, G, E) float32, any stride over rows. offsets: (N + 1,) int32 from 0 to R, growing: sequence n
    has the rows offsets[n] .. offsets[n + 1] and sees no other; one may be empty. scale, causal, window: as in `attention`.
    Returns (R, H, E) float32, a Tensor where an input is one, with the bits that `attention` gives each sequence alone. Gradients
    for q, k and v. On a device all may be bfloat16, and offsets may be on the host or there, where they are waited for.
    Raises TypeError for a dtype, ValueError for a shape or offsets that do not run from 0 to R.
    """
    op = "attention_packed"
    qd, kd, vd = (_packed_view(n, data(x)) for n, x in (("q", q), ("k", k), ("v", v)))
    (R, H, D), G, E = qd.shape, kd.shape[1], vd.shape[2]
    if D == 0 or G == 0 or H % G:
        raise ValueError(f"[{op}] q must be (R, H, D) with D > 0 and H a multiple of k's {G} heads, got {qd.shape}.")
    if kd.shape != (R, G, D):
        check.shape(op, "k", kd, "(R, G, D)", (R, G, D), f"q is {qd.shape}.")
    if vd.shape[:2] != (R, G) or E == 0:
        check.shape(op, "v", vd, "(R, G, E)", (R, G, E or D), f"k is {kd.shape}.")
    scale = D**-0.5 if scale is None else check.number(op, "scale", scale)
    reach = _window(op, window)
    offsets, longest = offsets_of(op, offsets, qd)

    y = backend.empty((R, H, E), qd.dtype, like=qd)
    if not recording(q, k, v):
        kernels(qd).attention_packed_forward(y, None, qd, kd, vd, offsets, longest, reach, scale, causal)
        return wrap(y, q, k, v)
    stats, offsets = backend.empty((R, H, 2), like=qd), offsets.copy()
    kernels(qd).attention_packed_forward(y, stats, qd, kd, vd, offsets, longest, reach, scale, causal)

    def backward(dy: Array) -> Sequence[Array | None]:
        dq, dk, dv = (backend.empty_like(x) for x in (qd, kd, vd))
        dy = contiguous(dy)
        kernels(qd).attention_packed_backward(dq, dk, dv, dy, y, stats, qd, kd, vd, offsets, longest, reach, scale, causal)
        return dq, dk, dv

    return record(y, (q, k, v), backward)


def _packed_view(name: str, x: Any) -> Array:
    """x (R, H, D) as it lies if the kernel can walk it, else a copy."""
    x = check.any_array("attention_packed", name, x)
    if x.ndim != 3:
        raise ValueError(f"[attention_packed] {name} must have 3 axes, got shape {x.shape}.")
    view: Array = head_view("attention_packed", name, x[None])[0]
    return view


def offsets_of(op: str, offsets: Any, q: Array) -> tuple[Array, int]:
    """Offsets of sequences among q's rows, where q is, and the longest sequence's length."""
    offsets = check.array(op, "offsets", offsets, dtype=np.int32, ndim=1)
    host = offsets if isinstance(offsets, np.ndarray) else offsets.numpy()
    lengths = np.diff(host)
    if len(host) == 0 or host[0] != 0 or host[-1] != q.shape[0] or lengths.min(initial=0) < 0:
        shown = np.array2string(host, threshold=8, edgeitems=3)
        raise ValueError(f"[{op}] offsets must grow from 0 to R = {q.shape[0]}, got {shown}. q is {q.shape}.")
    return _beside(q, offsets), int(lengths.max(initial=0))


def _window(op: str, window: int | None) -> int:
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
        raise ValueError(f"[{op}] window must be a whole number of keys, at least 1, or None, got {window!r}.")
    return int(window)


def _bias(x: Any, B: int, T: int, S: int, H: int) -> Array:
    if not isinstance(x, np.ndarray) or x.dtype != _F32 or x.ndim != 4:
        x = check.any_array("attention", "bias", x, _F32)
        if x.ndim != 4:
            raise ValueError(f"[attention] bias must have 4 axes, got shape {x.shape}.")
    b, h = x.shape[:2]
    if b not in (1, B) or h not in (1, H) or x.shape[2:] != (T, S):
        raise ValueError(
            f"[attention] bias must be (1 or B, 1 or H, T, S) with (B, H, T, S) = {(B, H, T, S)}, got {x.shape}. "
            "Give every axis; only batch and heads may be 1."
        )
    size = x.dtype.itemsize
    fits = x.strides[3] == size or S == 1
    result: Array = x if fits and all(s & (size - 1) == 0 for s in x.strides) else contiguous(x)
    return result


def lengths_of(op: str, x: Any, B: int, S: int, q: Array) -> Array:
    """Valid keys of each of B sequences, where q is."""
    if not isinstance(x, np.ndarray) or x.dtype != _I32 or x.shape != (B,) or not x.flags.c_contiguous:
        x = check.array(op, "lengths", x, dtype=np.int32, ndim=1)
        check.shape(op, "lengths", x, "(B,)", (B,))
    if isinstance(x, np.ndarray):
        values = x.tolist()
        if values and (min(values) < 0 or max(values) > S):
            raise ValueError(f"[{op}] lengths must be from 0 to S = {S}, got {min(values)} to {max(values)}.")
    return _beside(q, x)


def _beside(q: Any, x: Any) -> Array:
    """x where q is."""
    there: Array = q.device.put(x) if isinstance(x, np.ndarray) and not isinstance(q, np.ndarray) else x
    return there
