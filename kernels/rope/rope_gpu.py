"""Rotary position embedding on the GPU, the host's side: the functions of csrc/bind/rope.cpp."""

from __future__ import annotations

from typing import Any

from fastlm.cuda.array import floor16 as _floor16
from fastlm.cuda.array import retyped as _retyped


def rope_forward(gpu: Any, y: Any, x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool, inverse: bool) -> None:
    (B, T, H, D), (P, half), size = x.shape, cos.shape, x.dtype.itemsize
    if y.size == 0:
        return
    x, first = _floor16(x)
    whole = {"D": D, "half": half, "x_first": first, "x_batch": x.strides[0] // size, "x_time": x.strides[1] // size}
    placed = positions is not None
    arguments = {"y": y, "x": x, "cos": cos, "sin": sin, "positions": positions if placed else _retyped(cos, "int32")}
    arguments |= {"T": T, "H": H, "D": D, "half": half, "P": P} | whole
    arguments |= {"positions_batch": T if placed and positions.ndim == 2 else 0, "placed": int(placed)}
    plain = ("T", "H", "P", "positions_batch", "placed") + (() if all(n % 16 == 0 for n in whole.values()) else tuple(whole))
    constants = {"INTERLEAVED": bool(interleaved), "HEADS": 8, "PAIRS": 64}
    gpu.triton("rope_forward", (B * T, -(-H // 8)), arguments | {"sign": -1.0 if inverse else 1.0}, plain=plain, **constants)
