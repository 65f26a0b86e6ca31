"""Drawing tokens from logits, argmax and the k largest values: what decoding does after the model. Nothing here is differentiable."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, kernels, on_device
from fastlm.ops import check
from fastlm.tensor import data

_WORD = (1 << 64) - 1
_WHY = {
    -1: "has nan",
    -2: "is all -inf: no token is possible",
    -3: "has +inf, or reaches it when divided by the temperature",
    -4: "has an id in previous that is not in the vocabulary (pad with -1)",
    -5: "has a uniform number that is not from 0 to below 1",
}


def sample(
    logits: Any,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous: Any = None,
    uniform: Any = None,
    seed: int | Sequence[int] | Array = 0,
    step: int | Sequence[int] | Array = 0,
    out: Array | None = None,
) -> Array:
    """One token for each row of logits, after the filters of transformers' generate, in its order:

    1. repetition_penalty r: the logits l of the ids in `previous` become l / r, or l * r where negative; an id counts once.
    2. temperature: logits / temperature. 0: the greatest logit, ties to the lowest index, and nothing below applies.
    3. top_k: what is below the k-th largest is dropped; ties with it stay. 0: off.
    4. top_p: in ascending order of (probability, index), tokens are dropped as long as the sum of their probabilities is at most
       1 - top_p; sums within a relative 1e-6 of it count as equal. The last token always stays. 1: off.
    5. min_p: tokens less probable than min_p times the most probable one are dropped. 0: off.

    The token is the first, in index order, whose cumulative probability exceeds the uniform number.

    logits: (B, V) or (V,) float32. previous: (B, N) int32 padded with -1, or a sequence of B integer arrays or lists; (N,) where
    logits is (V,). uniform: (B,) floats in [0, 1), at temperature 0 too. Without it, numbers come from Philox4x32-10 with `seed` as
    the key and (row, step) as the counter: count `step` up from token to token. seed and step may be sequences of B: then every row
    draws as row 0 with its own seed would, so that a sequence draws the same alone and in any batch; arrays of uint64 and int64 are
    read where they lie, by a recorded step anew in each run. out: (B,) int32, where the tokens go. Returns (B,) int32, (1,) where
    logits is (V,). The bits of a row depend neither on the instruction set, nor on the number of threads, nor on the other rows.

    On a device: the same tokens. logits may be bfloat16; previous, uniform, seed and step may be arrays on the host or there, and so
    may be the parts of a recorded step. Nothing is read back, so a row without a token is not refused: it gets the negative number
    that `refuse_negative` explains.
    Raises TypeError for a dtype; ValueError for a shape, a number out of range, and for logits that are nan, all -inf or, at a
    temperature above 0, +inf: at 0 that is the greatest, as for `argmax`.
    """
    xd = check.array("sample", "logits", data(logits), at_least=1)
    B, V = _two_axes("sample", "logits", xd)
    temperature, top_p, min_p, repetition_penalty = (
        check.real("sample", name, x)
        for name, x in (
            ("temperature", temperature),
            ("top_p", top_p),
            ("min_p", min_p),
            ("repetition_penalty", repetition_penalty),
        )
    )
    if not 0 <= temperature <= check.MOST:
        raise ValueError(f"[sample] temperature must be at least 0 (0: greedy) and finite in float32, got {temperature}.")
    if not 0 <= top_p <= 1:
        raise ValueError(f"[sample] top_p must be from 0 to 1 (1: off), got {top_p}.")
    if not 0 <= min_p <= 1:
        raise ValueError(f"[sample] min_p must be from 0 to 1 (0: off), got {min_p}.")
    top_k = check.integer("sample", "top_k", top_k, 0, what="an integer of at least 0 (0: off)", wrong=ValueError)
    top_k = min(top_k, V)  # a kernel's integers end
    if not check.LEAST <= repetition_penalty <= check.MOST:
        raise ValueError(
            f"[sample] repetition_penalty must be greater than 0 (1: off) and finite in float32, got {repetition_penalty}."
        )
    if on_device(xd):
        ids, begin = _previous_there(previous, B, xd) if repetition_penalty != 1 and previous is not None else (None, None)
        u = _uniform_there(uniform, seed, step, B, xd)
        token = _tokens("sample", out, (B,), xd)
        kernels(xd).sample(token, xd, u, ids, begin, top_k, top_p, temperature, min_p, repetition_penalty)
        return token
    ids = begin = None
    if repetition_penalty != 1 and previous is not None:
        ids, begin = _previous(previous, B, xd.ndim == 1)
    u = None
    key = at = 0
    if uniform is not None:
        u = _uniform(uniform, xd)
    elif isinstance(seed, (int, np.integer)) and isinstance(step, (int, np.integer)):
        key, at = int(seed) & _WORD, int(step) & _WORD
    else:
        steps = _one_each("step", step, B, np.int64)
        u = backend.empty((B,), np.float64)
        if isinstance(seed, (int, np.integer)):
            u[:] = [_C.philox_uniform(int(seed) & _WORD, b, int(t) & _WORD) for b, t in enumerate(steps)]
        else:
            _C.philox_uniforms(u, _one_each("seed", seed, B, np.uint64), steps)
    token = _tokens("sample", out, (B,))
    bad = _C.sample(token, xd, u, ids, begin, top_k, float(top_p), temperature, min_p, repetition_penalty, key, at)
    if bad >= 0:
        _refuse("sample", "logits", bad, int(token[bad]))
    return token


def argmax(logits: Any, out: Array | None = None, token: bool = False) -> Any:
    """The index of the greatest value over the last axis, ties to the lowest index: (..., V) float32 -> (...) int32, in `out` if given.

    token: what is chosen is a token, and a row that is all -inf has none; else its index is 0. Raises ValueError where a row has nan or,
    with `token`, is all -inf, and where V is 0; on a device such rows get -1 and -2.
    """
    xd = check.array("argmax", "logits", data(logits), at_least=1)
    _two_axes("argmax", "logits", xd)
    index = _tokens("argmax", out, xd.shape[:-1], xd)
    if on_device(xd):
        kernels(xd).argmax(index, xd, token)
        return index
    bad = _C.argmax(index, xd, token)
    if bad >= 0:
        _refuse("argmax", "logits", bad, int(index.reshape(-1)[bad]))
    return index


def top_k(values: Any, k: int) -> tuple[Array, Array]:
    """The k largest values over the last axis, in descending order, ties to the lowest index, and their indices.

    values: (..., N) float32, 1 <= k <= N. Returns (..., k) float32 and (..., k) int32. Raises ValueError for k, and where a row has nan;
    on a device such a row has the indices -1.
    """
    xd = check.array("top_k", "values", data(values), at_least=1)
    _, N = _two_axes("top_k", "values", xd)
    k = check.integer("top_k", "k", k, what=f"an integer from 1 to N = {N}")
    if not 1 <= k <= N:
        raise ValueError(f"[top_k] k must be from 1 to N = {N}, got {k}. values is {xd.shape}.")
    shape = *xd.shape[:-1], k
    if on_device(xd):
        found = backend.empty(shape, like=xd), backend.empty(shape, np.int32, like=xd)
        kernels(xd).top_k(*found, xd)
        return found
    top, indices = np.empty(shape, np.float32), np.empty(shape, np.int32)
    bad = _C.top_k(top, indices, xd)
    if bad >= 0:
        _refuse("top_k", "values", bad, -1)
    return top, indices


def _two_axes(op: str, name: str, x: Array) -> tuple[int, int]:
    """Rows and the length of the last axis, which must not be empty nor too long for int32 indices."""
    V = x.shape[-1]
    if not 0 < V < 1 << 31:
        raise ValueError(f"[{op}] {name} must have from 1 to 2**31 - 1 elements in the last axis, got shape {x.shape}.")
    if op == "sample" and x.ndim > 2:
        raise ValueError(f"[{op}] {name} must be (B, V) or (V,), got shape {x.shape}.")
    return x.size // V, V


def refuse_negative(tokens: Array, op: str = "sample") -> None:
    """Raises what is wrong with the logits where `sample` or `argmax` on a device gave no token. tokens: on the host."""
    for row in np.flatnonzero(tokens.reshape(-1) < 0)[:1]:
        _refuse(op, "logits", int(row), int(tokens.reshape(-1)[row]))


def _refuse(op: str, name: str, row: int, status: int) -> None:
    raise ValueError(f"[{op}] {name} row {row} {_WHY[status]}.")


def _one_each(name: str, x: Any, B: int, dtype: type) -> Array:
    """(B,) of dtype, int64 or uint64: x itself where it is that."""
    if isinstance(x, np.ndarray) and x.dtype == dtype and x.shape == (B,) and x.flags.c_contiguous:
        return x
    try:
        values = [operator.index(v) for v in ([x] * B if isinstance(x, (int, np.integer)) else x)]
    except TypeError:
        raise TypeError(f"[sample] {name} must be an int or one per row, (B,) = ({B},), got {x!r:.80}.") from None
    if len(values) != B:
        raise ValueError(f"[sample] {name} must be an int or one per row, (B,) = ({B},), got {len(values)}.")
    return np.array([v & _WORD for v in values], np.uint64).view(dtype)


def _tokens(op: str, out: Array | None, shape: tuple[int, ...], like: Any = None) -> Array:
    """Where the indices go: `out` if it is given and fits."""
    there = like is not None and on_device(like)
    if out is None:
        return backend.empty(shape, np.int32, like=like) if there else np.empty(shape, np.int32)
    if not isinstance(out, np.ndarray) and not on_device(out):
        raise TypeError(f"[{op}] out must be an array of int32, got {type(out).__name__}.")
    check.shape(op, "out", out, "(B,)", shape)
    if there:
        if not on_device(out) or out.dtype != np.int32 or not out.contiguous:  # type: ignore[attr-defined]
            raise TypeError(f"[{op}] out must be a contiguous array of int32 on the device, got {out!r:.80}.")
        return out
    if out.dtype != np.int32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise TypeError(f"[{op}] out must be a contiguous, writable array of int32, got {out.dtype}.")
    return out


def _uniform(uniform: Any, like: Array) -> Array:
    """(B,) float64 of the host, of numbers that were given."""
    try:
        u = np.ascontiguousarray(data(uniform), np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"[sample] uniform must be floats, (B,), got {uniform!r:.80}.") from None
    B = like.size // like.shape[-1]
    check.shape("sample", "uniform", u, "(B,)", (B,), f"logits is {like.shape}.")
    return u


def _uniform_there(uniform: Any, seed: Any, step: Any, B: int, like: Any) -> Any:
    """(B,) float64 on the device: given, or drawn as on the host."""
    device = like.device
    if uniform is not None:
        u = data(uniform)
        if not on_device(u):
            u = device.put(_uniform(u, like))
        check.shape("sample", "uniform", u, "(B,)", (B,), f"logits is {like.shape}.")
        if u.dtype != np.float64:
            raise TypeError(f"[sample] uniform must be float64 on a device, got {u.dtype}.")
        return u
    if isinstance(seed, (int, np.integer)):
        steps = [int(step)] * B if isinstance(step, (int, np.integer)) else _one_each("step", step, B, np.int64)
        drawn = [_C.philox_uniform(int(seed) & _WORD, b, int(t) & _WORD) for b, t in enumerate(steps)]
        return device.put(np.array(drawn, np.float64))
    numbers = []
    for name, x, dtype in (("seed", seed, np.uint64), ("step", step, np.int64)):
        if on_device(x):
            if x.dtype != dtype or x.shape != (B,):
                raise TypeError(f"[sample] {name} must be (B,) = ({B},) of {np.dtype(dtype)} on a device, got {x!r:.80}.")
            numbers.append(x)
        else:
            numbers.append(device.put(_one_each(name, x, B, dtype)))
    u = backend.empty((B,), np.float64, like=like)
    kernels(like).philox_uniforms(u, *numbers)
    return u


def _previous_there(previous: Any, B: int, like: Any) -> tuple[Array, Array]:
    """All ids in one array on the device, and where each row's begin."""
    if on_device(previous):
        if not previous.ndim or previous.dtype != np.int32 or not previous.contiguous or previous.size != B * previous.shape[-1]:
            raise TypeError(f"[sample] previous must be contiguous int32, (B, N), on a device, got {previous!r:.80}.")
        return previous, like.device.constant(np.arange(B + 1, dtype=np.int64) * previous.shape[-1])
    ids, begin = _previous(previous, B, like.ndim == 1)
    return like.device.put(ids), like.device.put(np.asarray(begin, np.int64))


def _previous(previous: Any, B: int, single: bool) -> tuple[Array, Array]:
    """All ids in one array, and where each row's begin."""
    if not (previous.ndim if isinstance(previous, np.ndarray) else isinstance(previous, Sequence)):
        raise TypeError(f"[sample] previous must hold ids for each row, (B, N), got {previous!r:.80}.")
    if isinstance(previous, np.ndarray) and previous.dtype == np.int32 and previous.size == B * previous.shape[-1]:
        return np.ascontiguousarray(previous), np.arange(B + 1) * previous.shape[-1]  # the kernel checks the ids
    rows: Any = previous
    if single and not (isinstance(previous, np.ndarray) and previous.ndim == 2) and not _nested(previous):
        rows = [previous]
    if len(rows) != B:
        raise ValueError(f"[sample] previous must hold ids for each row, (B, N) with B = {B}, got {len(rows)} rows.")
    arrays = [np.asarray(r) for r in rows]
    for i, a in enumerate(arrays):
        if a.size and (a.ndim != 1 or a.dtype.kind not in "iu"):
            raise TypeError(f"[sample] previous must hold integers, (B, N), got {a.dtype} of shape {a.shape} in row {i}.")
        if a.size and (a.min() < -1 or a.max() >= 1 << 31):
            raise ValueError(f"[sample] previous must be ids, or -1 as padding, got {int(a.min())} to {int(a.max())} in row {i}.")
    begin = np.zeros(B + 1, np.int64)
    np.cumsum([a.size for a in arrays], out=begin[1:])
    ids = np.concatenate([a.reshape(-1).astype(np.int32) for a in arrays]) if B else np.empty(0, np.int32)
    return ids, begin


def _nested(previous: Any) -> bool:
    return len(previous) > 0 and isinstance(previous[0], (list, tuple, np.ndarray))
