"""AdamW and the global norm on the GPU, the host's side: the functions of csrc/bind/adamw.cpp, launching either twin.

One launch takes all tensors: a table of their pointers lies on the device, and is made anew only where the tensors are others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PIECE = 4096  # elements that a block takes
_KEPT = 8  # tables
_tables: dict[Any, tuple[Any, Any, int]] = {}  # what they were made of -> table, pieces, their number


def adamw_step(
    gpu: Any,
    parameters: Sequence[Any],
    gradients: Sequence[Any],
    ms: Sequence[Any],
    vs: Sequence[Any],
    weight_decays: Sequence[float],
    step: Any,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    scale: Any,
    copies: Sequence[Any] | None = None,
) -> None:
    """step, lr and scale: numbers, or (1,) on the device, int32, float32, float32. copies: bfloat16, each gets its new parameter."""
    table, pieces, count = _table(gpu, [parameters, ms, vs, gradients, copies], weight_decays)
    if count == 0:
        return
    rest1, rest2 = 1 - beta1, 1 - beta2
    numbers = gpu.empty((4,))
    if all(isinstance(x, (int, float)) for x in (step, lr, scale)):
        known = [lr / (1 - beta1**step), math.sqrt(1 - beta2**step), lr, scale]
        numbers = gpu.device.put(np.array(known, np.float32))
    else:
        scale = None if isinstance(scale, (int, float)) and scale == 1 else _there(gpu, scale, np.float32)
        named = {"numbers": numbers, "step": _there(gpu, step, np.int32), "lr": _there(gpu, lr, np.float32), "scale": scale}
        named |= {"rest1": rest1, "rest2": rest2}
        if gpu.twin == "cuda":
            gpu.cuda("adamw_numbers", (1,), 32, list(named.values()))
        else:
            gpu.triton("adamw_numbers", (1,), named, warps=1)
    named = {"table": table, "pieces": pieces, "numbers": numbers, "rest1": rest1, "rest2": rest2, "beta2": float(beta2)}
    named["eps"] = float(eps)
    if gpu.twin == "cuda":
        gpu.cuda("adamw_step", (count,), 256, list(named.values()))
        return
    gpu.triton("adamw_step", (count,), named, warps=8, BLOCK=PIECE, COPY=copies is not None)


def global_norm(gpu: Any, norm: Any, arrays: Sequence[Any]) -> None:
    """norm () = the square root of the sum of squares over all float32 arrays, summed in float64 by pieces, in their order."""
    table, pieces, count = _table(gpu, [None, None, None, arrays, None], [0.0] * len(arrays))
    partial = gpu.empty((count,), np.float64)
    named = {"partial": partial, "table": table, "pieces": pieces}
    last = {"norm": norm, "partial": partial, "n": count}
    if gpu.twin == "cuda":
        gpu.cuda("adamw_square_sum", (count,), 256, list(named.values()))
        gpu.cuda("adamw_norm", (1,), 256, list(last.values()))
        return
    gpu.triton("adamw_square_sum", (count,), named, BLOCK=PIECE, warps=8)
    gpu.triton("adamw_norm", (1,), last, plain=("n",), BLOCK=1024)


def clip_scale(gpu: Any, scale: Any, norm: Any, clip: float) -> None:
    """scale (1,) = min(1, clip / (norm + 1e-6)); nan where the norm is not finite."""
    named = {"scale": scale, "norm": norm, "clip": float(clip)}
    if gpu.twin == "cuda":
        gpu.cuda("adamw_clip", (1,), 32, list(named.values()))
        return
    gpu.triton("adamw_clip", (1,), named, warps=1)


def _there(gpu: Any, x: Any, dtype: Any) -> Any:
    return gpu.device.put(np.array([x], dtype)) if isinstance(x, (int, float)) else x


def _table(gpu: Any, groups: Sequence[Sequence[Any] | None], decays: Sequence[float]) -> tuple[Any, Any, int]:
    """table (T, 8) int64: pointers of parameter, m, v, gradient, copy; elements; the weight decay's bits. pieces (N, 2) int32."""
    gradients = groups[3]
    assert gradients is not None
    pointers = tuple(tuple(a.pointer for a in group) if group is not None else None for group in groups)
    sizes = tuple(a.size for a in gradients)
    key = gpu.device, pointers, sizes, tuple(decays)
    found = _tables.pop(key, None)
    if found is None:
        for group in pointers:
            if group is not None and any(p % 16 for p, n in zip(group, sizes, strict=True) if n):
                raise ValueError("[adamw] arrays must begin at multiples of 16 bytes: pass copies.")
        table = np.zeros((len(sizes), 8), np.int64)
        for i, group in enumerate(pointers):
            if group is not None:
                table[:, i] = group
        table[:, 5] = sizes
        table[:, 6] = np.array(decays, np.float32).view(np.int32)
        blocks = [-(-n // PIECE) for n in sizes]
        pieces = np.empty((sum(blocks), 2), np.int32)
        pieces[:, 0] = np.repeat(np.arange(len(sizes)), blocks)
        pieces[:, 1] = np.concatenate([np.arange(n) for n in blocks]) if blocks else 0
        found = gpu.device.constant(table), gpu.device.constant(pieces), len(pieces)
    gpu.device.keep(*found[:2])
    _tables[key] = found
    while len(_tables) > _KEPT:
        _tables.pop(next(iter(_tables)))
    return found
