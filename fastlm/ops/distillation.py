"""Losses against a teacher: Kullback-Leibler divergence at a temperature, and the cosine distance of states. By NumPy on the kernels.

Hinton et al. 2015, arXiv:1503.02531, section 2; Sanh et al. 2019, arXiv:1910.01108.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, kernels
from fastlm.ops import check
from fastlm.ops.cross_entropy import multiplied
from fastlm.tensor import data, record, recording, wrap

_ROWS = 1 << 20  # floats of logits at a time: what is in between stays in cache


def kl_divergence(logits: Any, teacher: Any, temperature: float = 1.0) -> Any:
    """temperature^2 * mean over rows of KL(softmax(teacher / temperature) || softmax(logits / temperature)), a float32 of shape ().

    logits, teacher: (..., V) float32; the teacher has no gradient. The factor keeps the gradient's size whatever the temperature. A
    token that the teacher rules out (-inf) adds nothing. Summed in float64, in row order; on a device in float32, and both may be
    bfloat16. Raises TypeError for a dtype, ValueError for
    a shape, no rows, or a temperature that is not positive.
    """
    xd = check.array("kl_divergence", "logits", data(logits), at_least=1)
    td = check.array("kl_divergence", "teacher", data(teacher), at_least=1)
    check.shape("kl_divergence", "teacher", td, "the shape of logits", xd.shape)
    t = check.number("kl_divergence", "temperature", temperature, above=0.0)
    V = xd.shape[-1]
    if xd.size == 0:
        raise ValueError(f"[kl_divergence] logits must have a row and a token, got {xd.shape}.")
    recorded = recording(logits)
    if not isinstance(xd, np.ndarray):
        return _there("kl_divergence", logits, xd, td, recorded, t)
    x, y, rows = xd.reshape(-1, V), td.reshape(-1, V), xd.size // V
    dx = backend.empty(x.shape) if recorded else None
    losses = np.empty(rows, np.float64)
    step = max(1, _ROWS // V)
    for i in range(0, rows, step):
        scaled = (x[i : i + step] / np.float32(t), y[i : i + step] / np.float32(t))
        ours, theirs = (np.empty_like(s) for s in scaled)
        _C.log_softmax(ours, scaled[0])
        _C.log_softmax(theirs, scaled[1])
        p = np.exp(theirs)
        losses[i : i + step] = np.multiply(p, theirs - ours, out=np.zeros_like(p), where=p > 0).sum(1, dtype=np.float64)
        if dx is not None:
            np.multiply(np.exp(ours) - p, np.float32(t / rows), out=dx[i : i + step])
    out = np.array(losses.sum() / rows * t * t, np.float32)
    if dx is None:
        return wrap(out, logits)
    return record(out, (logits,), lambda dy: (np.multiply(dx, np.float32(dy)).reshape(xd.shape),))


def cosine_distance(x: Any, target: Any) -> Any:
    """mean over rows of 1 - cos(x, target), a float32 of shape (). x, target: (..., C) float32; the target has no gradient.

    Squared lengths get 1e-12 added, as torch's cosine_embedding_loss does, so that a row of zeros has distance 1. Computed in float64.
    """
    xd = check.array("cosine_distance", "x", data(x), at_least=1)
    td = check.array("cosine_distance", "target", data(target), at_least=1)
    check.shape("cosine_distance", "target", td, "the shape of x", xd.shape)
    if xd.size == 0:
        raise ValueError(f"[cosine_distance] x must have a row and a column, got {xd.shape}.")
    if not isinstance(xd, np.ndarray):
        return _there("cosine_distance", x, xd, td, recording(x))
    a, b = (z.reshape(-1, z.shape[-1]).astype(np.float64) for z in (xd, td))
    aa, bb = np.square(a).sum(1, keepdims=True) + 1e-12, np.square(b).sum(1, keepdims=True) + 1e-12
    length = np.sqrt(aa * bb)
    cosine = (a * b).sum(1, keepdims=True) / length
    y = np.array((1 - cosine).mean(), np.float32)
    if not recording(x):
        return wrap(y, x)
    return record(
        y, (x,), lambda dy: (((cosine / aa * a - b / length) * (float(dy) / len(a))).astype(np.float32).reshape(xd.shape),)
    )


def _there(op: str, x: Any, xd: Array, td: Array, recorded: bool, *more: float) -> Any:
    """A loss on a device: its kernel writes the gradient for dy = 1."""
    check.together(op, "x", xd, target=td)
    if xd.dtype != td.dtype:
        raise TypeError(f"[{op}] the teacher's must be {xd.dtype} as ours, got {td.dtype}.")
    dx = backend.empty_like(xd) if recorded else None
    y = getattr(kernels(xd), op)(dx, xd, td, *more)
    if dx is None:
        return wrap(y, x)
    return record(y, (x,), lambda dy: (multiplied(dx, dy),))
