"""A linear layer with quantised weights and 8-bit activations in NumPy: the kernel gives these bits."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fastlm.checkpoint.quantized import QuantizedArray

_dequantize = importlib.import_module("fastlm.kernels.dequantize.dequantize_ref")
_float = importlib.import_module("fastlm.kernels.quantized_matmul.quantized_matmul_ref")
KINDS: tuple[str, ...] = tuple(_dequantize.BLOCKS)

CASES: list[dict[str, Any]] = [c for c in _float.CASES if not c.get("bench")] + [
    {"kind": kind, "rows": rows, "out": out, "in": K, "bench": True}
    for kinds, shapes, several in (
        (("Q4_1",), ((1536, 576), (576, 1536)), (1, 8, 512)),  # SmolLM2-135M
        (("Q8_0", "Q4_0"), ((3072, 768), (768, 3072)), (1, 8, 512)),  # GPT-2 124M
        (("Q8_0",), ((768, 768), (3072, 768), (768, 3072)), (1024,)),  # BERT-base, 8 x 128
        (("Q4_K", "Q6_K"), ((4096, 4096),), (1, 8, 512)),
        (("Q8_0", "Q4_1"), ((32768, 4096),), (1,)),  # cold: larger than any cache
    )
    for kind in kinds
    for out, K in shapes
    for rows in several
]
GRADIENTS = ()  # that of x is quantized_matmul's: straight through the rounding
inputs = _float.inputs
random_weight = _float.random_weight


def quantise_rows(x: np.ndarray, wide: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x (M, K) float32 -> codes (M, K / 32, 32) int8, scales (M, K / 32) float32: by each group's largest magnitude, ties to even.

    wide: codes of 16 bits, int32: 256 times the integer and a rest.
    """
    groups = x.reshape(x.shape[0], x.shape[1] // 32, 32)
    largest = np.abs(groups).max(axis=2)
    sane = np.isfinite(groups).all(axis=2)
    live = sane & (largest >= np.float32(2.0**-100))
    safe = np.where(live, largest, np.float32(1))
    scales = np.where(live, safe * np.float32(1 / np.float32(127)), np.float32(0))
    scaled = np.where(live[..., None], groups, np.float32(0)) * (np.float32(127) / safe)[..., None]
    codes = np.rint(scaled)
    if wide:
        rest = np.clip(np.rint((scaled - codes) * np.float32(256)), -127, 127)
        codes, scales = codes * 256 + rest, scales * np.float32(2.0**-8)
    return codes.astype(np.int32 if wide else np.int8), np.where(sane, scales, np.float32(np.nan))


def parts(weight: QuantizedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """W as integers (N, groups, values of a group), scales (N, groups) and minima (N, groups): W = scale * integer + minimum.

    A group is the values under one scale: 32, in Q6_K 16. Found through the decoder of `dequantize`: codes are what it gives for
    blocks whose halves are one (and minima zero), scales from there.
    """
    kind, (N, K) = weight.kind, weight.shape
    values, size = _dequantize.BLOCKS[kind]
    blocks = weight.blocks.reshape(-1, size)
    d = {"Q6_K": 208}.get(kind, 0)
    minimum = kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    group = 16 if kind == "Q6_K" else 32

    def decode(changed: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            out: np.ndarray = _dequantize._DECODE[kind](changed).reshape(-1, values // group, group)
        return out

    one, nothing = np.frombuffer(np.float16(1).tobytes(), np.uint8), np.zeros(2, np.uint8)
    units = blocks.copy()
    units[:, d : d + 2] = one
    if minimum:
        units[:, 2:4] = nothing
    sub = np.ones((len(blocks), values // group), np.float32)  # the K formats' integer scales
    if kind == "Q6_K":
        sub = blocks[:, 192:208].view(np.int8).astype(np.float32)
        units[:, 192:208] = 1
    elif values == 256:
        sub = _dequantize._scales(blocks[:, 4:16])[0][..., 0]
        units[:, 4:8] = units[:, 8:12] = 1
        units[:, 12:16] = 1
    integers = decode(units)
    half = np.ascontiguousarray(blocks[:, d : d + 2]).view("<f2").astype(np.float32)
    scales = half * sub
    minima = None
    if minimum:
        m = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
        minima = m if values == 32 else -(m * _dequantize._scales(blocks[:, 4:16])[1][..., 0])
        minima = np.broadcast_to(minima, scales.shape).reshape(N, K // group)
    return integers.reshape(N, K // group, group), scales.reshape(N, K // group), minima


def forward(x: np.ndarray, weight: QuantizedArray, wide: bool = False) -> np.ndarray:
    """x (M, K), taken as float32, weight (N, K) -> (M, N). Every float32 operation in the order that int8_matmul.h defines, with sums
    of integers between them: the kernel gives these bits."""
    codes, scales = quantise_rows(x.astype(np.float32), wide)
    q, d, m = parts(weight)
    M, each = x.shape[0], 32 // q.shape[2]
    exact = np.float64 if wide else np.float32  # for sums of their products with q, in any order
    codes = codes.astype(exact)
    y = np.zeros((M, q.shape[0]), np.float32)
    with np.errstate(all="ignore"):
        for g in range(q.shape[1]):
            u, h = divmod(g, each)
            a = codes[:, u, h * q.shape[2] : (h + 1) * q.shape[2]]
            y += (a @ q[:, g].T.astype(exact)).astype(np.float32) * (d[:, g] * scales[:, u, None])
            if m is not None:
                y += m[:, g] * (scales[:, u] * codes[:, u].sum(axis=1).astype(np.float32))[:, None]
    return y
