"""Attention in 8 bits, in NumPy: the kernel gives these bits. And what its weights stand for before they are rounded, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"B": B, "T": T, "S": S, "H": H, "G": G, "D": D, "E": E}
    for B, T, S, H, G, D, E in (
        (1, 1, 1, 1, 1, 1, 1), (2, 5, 3, 2, 1, 7, 9), (1, 31, 33, 4, 2, 32, 32), (2, 64, 65, 3, 3, 64, 64), (1, 3, 130, 2, 2, 80, 48),
        (1, 300, 17, 2, 1, 12, 100), (2, 4, 0, 2, 2, 8, 8), (0, 4, 4, 2, 2, 8, 8), (1, 7, 600, 1, 1, 64, 64), (1, 2, 20, 1, 1, 1023, 1)
    )
] + [
    {"B": B, "T": T, "S": T, "H": H, "G": H, "D": D, "E": D, "bench": True}
    for B, T, H, D in ((8, 128, 12, 64), (32, 32, 12, 32), (2, 512, 12, 64))  # BERT-base, MiniLM
]  # fmt: skip
GRADIENTS = ()


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, S, H, G, D, E = (case[name] for name in "BTSHGDE")
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((B, T, H, D), (B, S, G, D), (B, S, G, E)))
    v *= np.exp(2 * rng.standard_normal((B, S, G, 1))).astype(np.float32)  # values of different sizes
    return {"q": 2 * q, "k": k, "v": v}


_F = np.float32


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (..., D) float32 -> codes (..., D) and scales (..., 1)."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    live = largest >= _F(2.0**-100)
    safe = np.where(live, largest, _F(1))
    return np.rint(x * np.where(live, _F(127) / safe, _F(0))), np.where(live, safe * (_F(1) / _F(127)), _F(0))


def values(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v (S, G, E) of one sequence -> codes and scales (S, G, 1): a scale is at least 2^-24 of the head's largest."""
    largest = np.abs(v).max(axis=-1, keepdims=True)
    largest = np.maximum(largest, np.maximum(largest.max(axis=0) * _F(2.0**-24), _F(2.0**-100)))
    return np.rint(v * (_F(127) / largest)), largest * (_F(1) / _F(127))


def log2_of(x: np.ndarray) -> np.ndarray:
    """The kernel's logarithm."""
    bits = x.view(np.int32)
    e = ((bits - np.int32(0x3F3504F3) + np.int32(0x40000000)).view(np.uint32) >> 23).astype(np.int32) - np.int32(128)
    f = (bits - (e << 23)).view(_F) - _F(1)
    s = f / (f + _F(2))
    p = np.full_like(x, 0.32059889)
    for c in (0.41219858, 0.57707802, 0.96179669, 2.8853901):
        p = p * (s * s) + _F(c)
    result: np.ndarray = p * s + e.astype(_F)
    return result


def weight_of(x: np.ndarray) -> np.ndarray:
    """The kernel's 255 * 2^x, x <= 0."""
    x = np.maximum(x, _F(-127))
    whole = np.rint(x)
    r, p = x - whole, np.full_like(x, _F(255) * _F(9.58285e-3))
    for c in (5.590643e-2, 2.4024099e-1, 6.9312419e-1, 1):
        p = p * r + _F(255) * _F(c)
    return p * ((whole.astype(np.int32) + 127) << 23).view(_F)


def lane_sum(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis, in sixteen lanes, then halves of them."""
    total = np.zeros((*x.shape[:-1], 16), _F)
    for j in range(0, x.shape[-1], 16):
        part = x[..., j : j + 16]
        total[..., : part.shape[-1]] += part
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    result: np.ndarray = total[..., 0]
    return result


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None) -> np.ndarray:
    """The kernel's bits, (B, T, H, E)."""
    q, k, v = (x.astype(_F) for x in (q, k, v))
    (B, T, H, D), (S, G, E) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    y = np.zeros((B, T, H, E), _F)
    factor = (D**-0.5 if scale is None else scale) * 1.4426950408889634
    for b in range(B if S else 0):
        (qc, qs), (kc, ks), (vc, vs) = rounded(q[b] if factor >= 0 else -q[b]), rounded(k[b]), values(v[b])
        for h in range(H):
            g = h // (H // G)
            dots = (qc[:, h].astype(np.float64) @ kc[:, g].T).astype(_F)  # whole numbers below 2^53
            t = (dots * ks[:, g, 0]) * (qs[:, h] * _F(abs(factor))) + log2_of(vs[:, g, 0])
            e = weight_of(t - t.max(axis=1, keepdims=True))
            inverse = _F(1) / lane_sum(e * (_F(1) / vs[:, g, 0]))
            y[b, :, h] = (np.rint(e).astype(np.float64) @ vc[:, g]).astype(_F) * inverse[:, None]
    return y


def unrounded(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64 but for the codes of q, k and v, with weights that are not rounded; and the most that rounding them changes."""
    (B, T, H, D), (S, G, E) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    y, bound = np.zeros((B, T, H, E)), np.zeros((B, T, H, E))
    factor = (D**-0.5 if scale is None else scale) * np.log2(np.e)
    for b in range(B if S else 0):
        codes = [x.astype(np.float64) for pair in (rounded(q[b]), rounded(k[b]), values(v[b])) for x in pair]
        for h in range(H):
            qc, qs, kc, ks, vc, vs = (x[:, h if i < 2 else h // (H // G)] for i, x in enumerate(codes))
            t = (qc @ kc.T) * ks.T * (qs * factor) + np.log2(vs.T)
            e = 255 * np.exp2(t - t.max(axis=1, keepdims=True))
            total = (e / vs.T).sum(axis=1, keepdims=True)
            y[b, :, h], bound[b, :, h] = e @ vc / total, 0.5 * np.abs(vc).sum(axis=0) / total
    return y, bound
