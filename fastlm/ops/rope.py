"""Rotary position embedding. Su et al. 2021, arXiv:2104.09864, eq. 34."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import data, record, recording, wrap

_F32 = np.dtype(np.float32)
_I32 = np.dtype(np.int32)


def rope(x: Any, cos: Any, sin: Any, positions: Any = None, interleaved: bool = False) -> Any:
    """Turns pairs of the first R elements of every head by the angles of its position; the rest is copied.

    x: (B, T, H, D) float32, a view with any stride over batch and time. cos, sin: (P, R / 2) float32 with R <= D (`rope_tables`).
    positions: (B, T) or (T,) int32 within [0, P), by default 0 .. T - 1. Pairs: (i, i + R / 2), as Hugging Face has it;
    interleaved: (2 i, 2 i + 1), as Meta's files and GPT-J have it. Returns (B, T, H, D) float32, a Tensor where x is one, with its
    gradient. On a device x may be bfloat16, and what has a position out of range becomes nan. Raises TypeError for a dtype, ValueError
    for a shape or a position out of range.
    """
    xd = _view(data(x))
    B, T, _, D = xd.shape
    cd, sd = check.array("rope", "cos", data(cos), ndim=2), check.array("rope", "sin", data(sin), ndim=2)
    P, half = cd.shape
    if sd.shape != (P, half):
        check.shape("rope", "sin", sd, "(P, R / 2)", (P, half), "It must have the shape of cos.")
    if 2 * half > D:
        raise ValueError(f"[rope] cos must be (P, R / 2) with R <= D = {D}, got {cd.shape}. x is {xd.shape}.")
    pd = None
    if positions is not None:
        pd = _positions(positions, B, T, P, xd)
    elif T > P:
        raise ValueError(f"[rope] cos must have a row for each of the {T} positions, got {cd.shape}. x is {xd.shape}.")

    y = backend.empty_like(xd)
    kernels(xd).rope_forward(y, xd, cd, sd, pd, interleaved, False)
    if not recording(x):
        return wrap(y, x)
    pd = None if pd is None else pd.copy()  # the caller's own array, which may move on

    def backward(dy: Array) -> Sequence[Array | None]:
        dx = backend.empty_like(xd)
        kernels(xd).rope_forward(dx, _view(dy), cd, sd, pd, interleaved, True)
        return (dx,)

    return record(y, (x,), backward)


def _view(x: Any) -> Array:
    """x as it lies if the kernel can walk it, else a copy."""
    if not isinstance(x, np.ndarray) or x.dtype != _F32 or x.ndim != 4:
        x = check.any_array("rope", "x", x, _F32)
        if x.ndim != 4:
            raise ValueError(f"[rope] x must have 4 axes, got shape {x.shape}.")
    batch, time, head, last = x.strides
    size, (_, _, heads, width) = x.dtype.itemsize, x.shape
    if (last == size or width == 1) and (head == size * width or heads == 1) and (batch | time) & (size - 1) == 0:
        array: Array = x
        return array
    return contiguous(x)


def _positions(x: Any, B: int, T: int, P: int, like: Array) -> Array:
    if backend.on_device(x):
        x = check.array("rope", "positions", x, dtype=np.int32)
        if x.shape != (T,) and x.shape != (B, T):
            raise ValueError(f"[rope] positions must be (B, T) = {(B, T)} or (T,) = {(T,)}, got {x.shape}.")
        there: Array = x
        return there
    if not isinstance(x, np.ndarray) or x.dtype != _I32 or not x.flags.c_contiguous:
        x = check.array("rope", "positions", x, dtype=np.int32)
    if x.shape != (T,) and x.shape != (B, T):
        raise ValueError(f"[rope] positions must be (B, T) = {(B, T)} or (T,) = {(T,)}, got {x.shape}.")
    if x.size:
        values = x.ravel().tolist() if x.size <= 64 else (int(x.min()), int(x.max()))
        if min(values) < 0 or max(values) >= P:
            raise ValueError(
                f"[rope] positions must be from 0 to P - 1 = {P - 1}, got {min(values)} to {max(values)}. "
                "Make longer tables with rope_tables, or shorten the sequence."
            )
    result: Array = x if isinstance(like, np.ndarray) else like.device.put(x)
    return result


def rope_tables(dim: int, n_positions: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> tuple[Array, Array]:
    """cos and sin, each (n_positions, dim / 2) float32, computed in float64: the angle is position * frequency_i.

    dim: R, even. scaling: as `rope_scaling` or `rope_parameters` in a Hugging Face config, by `rope_type` (or `type`): "default",
    "linear", "dynamic" (NTK, at the full length n_positions), "yarn" (Peng et al. 2023, arXiv:2309.00071), "llama3". "dynamic"
    needs "max_position_embeddings" among the keys, "yarn" and "llama3" "original_max_position_embeddings". yarn's attention
    factor is multiplied into both tables, as Hugging Face does.
    Raises ValueError for an odd dim, an unknown type or a missing key.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"[rope_tables] dim must be even and at least 2, got {dim}.")
    if n_positions < 0:
        raise ValueError(f"[rope_tables] n_positions must not be negative, got {n_positions}.")
    frequencies, factor = _frequencies(dim, n_positions, float(base), dict(scaling or {}))
    angles = np.arange(n_positions, dtype=np.float64)[:, None] * frequencies
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def _frequencies(dim: int, n_positions: int, base: float, scaling: dict[str, Any]) -> tuple[Array, float]:
    """Angle per position, (dim / 2,) float64, and what multiplies the tables."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"

    def need(name: str) -> float:
        if scaling.get(name) is None:
            raise ValueError(f"[rope_tables] scaling of type {kind!r} must have {name!r}, got the keys {sorted(scaling)}.")
        return float(scaling[name])

    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain = base**-exponents
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / need("factor"), 1.0
    if kind == "dynamic":
        factor, context = need("factor"), need("max_position_embeddings")
        length = max(float(n_positions), context)
        grown = base * ((factor * length / context) - (factor - 1)) ** (dim / (dim - 2)) if dim > 2 else base
        return grown**-exponents, 1.0
    if kind == "llama3":
        return _llama3(
            plain, need("factor"), need("low_freq_factor"), need("high_freq_factor"), need("original_max_position_embeddings")
        )
    if kind == "yarn":
        return _yarn(plain, dim, base, scaling, need("original_max_position_embeddings"))
    raise ValueError(f"[rope_tables] scaling type must be default, linear, dynamic, yarn or llama3, got {kind!r}.")


def _llama3(plain: Array, factor: float, low: float, high: float, context: float) -> tuple[Array, float]:
    """Long waves are stretched by `factor`, short ones kept, those between mixed."""
    wave = 2 * math.pi / plain
    mix = np.clip((context / wave - low) / (high - low), 0, 1)  # 0: a long wave, 1: a short one
    return (1 - mix) * plain / factor + mix * plain, 1.0


def _yarn(plain: Array, dim: int, base: float, scaling: dict[str, Any], context: float) -> tuple[Array, float]:
    factor = scaling.get("factor")
    if factor is None:
        if scaling.get("max_position_embeddings") is None:
            raise ValueError("[rope_tables] scaling of type 'yarn' must have 'factor' or 'max_position_embeddings'.")
        factor = scaling["max_position_embeddings"] / context

    def temperature(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(factor, mscale) / temperature(factor, all_dim) if mscale and all_dim else temperature(factor)

    def dimension(rotations: float) -> float:
        """The dimension that turns so often within the original context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)
