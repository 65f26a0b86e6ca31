"""A linear layer with a weight in fewer bits, in NumPy: that of the weight as it was."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fastlm.checkpoint.quantized import QuantizedArray, quantize

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CASES: list[dict[str, Any]] = [
    {"dtype": dtype, "rows": rows, "out": out, "in": K}
    for dtype in DTYPES
    for rows, out, K in (
        (1, 31, 33), (0, 5, 8), (2, 33, 1), (3, 64, 1023), (4, 1, 16), (5, 97, 40), (7, 70, 9), (8, 130, 257), (13, 40, 96),
        (33, 130, 1031), (5, 0, 4), (3, 20, 0)
    )
] + [
    {"dtype": dtype, "rows": rows, "out": out, "in": K, "bench": True}
    for dtype in DTYPES
    for rows, out, K in ((1, 3072, 768), (1, 50257, 768), (8, 3072, 768))
]  # fmt: skip
GRADIENTS = ("x",)


def random_weight(dtype: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Of the size that real weights have, with zeros and numbers far smaller and larger among them, one in 200."""
    w = 0.02 * rng.standard_normal(shape)
    odd = rng.random(shape) < 1 / 200
    w = np.where(odd, np.sign(w) * 10.0 ** rng.integers(-40, 38, shape), w)
    w[rng.random(shape) < 1 / 400] = 0
    kept: np.ndarray = w.astype(np.float32).astype(DTYPES[dtype])
    return kept


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.standard_normal((case["rows"], case["in"]), np.float32)
    weight = (0.02 * rng.standard_normal((case["out"], case["in"]), np.float32)).astype(DTYPES[case["dtype"]])
    return {"x": x, "weight": quantize(weight, "LOSSLESS")}


def forward(x: np.ndarray, weight: QuantizedArray) -> np.ndarray:
    """x (M, K), weight (N, K) -> x W^T (M, N)."""
    return x @ weight.dequantize().astype(x.dtype).T


def backward(dy: np.ndarray, x: np.ndarray, weight: QuantizedArray) -> dict[str, np.ndarray]:
    """dy (M, N) -> gradient of x; the weight is frozen."""
    return {"x": dy @ weight.dequantize().astype(dy.dtype)}
