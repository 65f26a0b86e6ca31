"""Sampling on the GPU, the host's side: the functions of csrc/bind/sampling.cpp, launching either twin.

Nothing is read back: where a row has no token, its place holds a kSample... status, as in sampling.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SLACK = 2.0**-20  # masses this close, relatively, count as equal
HELD = 18 << 10  # bytes of shared memory that the CUDA C++ twin uses beside a row


def sample(
    gpu: Any,
    token: Any,
    logits: Any,
    uniform: Any,
    previous: Any,
    previous_begin: Any,
    top_k: int,
    top_p: float,
    temperature: float,
    min_p: float,
    penalty: float,
) -> None:
    """uniform: (B,) float64. A row's choice is that of the CPU: weights have the same bits, masses are whole multiples of 2^-44."""
    V = logits.shape[-1]
    B = token.size
    if B == 0:
        return
    limit = (1 - top_p) * (1 + SLACK)  # as two floats: 48 bits
    high = float(np.float32(limit))
    fits = gpu.device.shared_memory >= 4 * V + HELD
    row = None if fits and gpu.twin == "cuda" else gpu.empty((B, V))
    named = {"token": token, "row": row, "logits": logits, "uniform": uniform, "previous": previous, "begin": previous_begin}
    named |= {"V": V, "top_k": top_k if 0 < top_k < V else 0, "limit": high, "rest": limit - high}
    named |= {"temperature": float(temperature), "floor": float(np.float32(np.float64(np.float32(min_p)) * (1 - SLACK)))}
    if gpu.twin == "cuda":
        named |= {"penalty": float(penalty)}
        gpu.cuda(f"sample_{_suffix(logits)}", (B,), 512, list(named.values()), shared=4 * V if fits else 0)
        return
    plain = ("V", "top_k", "n")
    if previous is not None:
        changed = gpu.empty((B, V))
        gpu.triton("sample_copy", (-(-B * V // 4096),), {"y": changed, "x": logits, "n": B * V}, plain=plain, BLOCK=4096)
        given = {"row": changed, "logits": logits, "previous": previous, "begin": previous_begin, "V": V, "penalty": float(penalty)}
        gpu.triton("sample_penalise", (B,), given, plain=plain, BLOCK=256)
        named["logits"] = changed
    gpu.triton("sample", (B,), named, plain=plain, warps=16, fused=False, BLOCK=4096)


def argmax(gpu: Any, index: Any, x: Any, token: bool) -> None:
    V = x.shape[-1]
    named = {"index": index, "x": x, "V": V, "token": int(token)}
    if gpu.twin == "cuda":
        gpu.cuda(f"argmax_{_suffix(x)}", (index.size,), 512 if V > 8192 else 256, list(named.values()))
        return
    gpu.triton("argmax", (index.size,), named, plain=("V", "token"), warps=8, BLOCK=4096)


def top_k(gpu: Any, values: Any, indices: Any, x: Any) -> None:
    """values, indices (..., k) of x (..., V); in either twin by Triton."""
    k = values.shape[-1]
    if k and values.size:
        named = {"values": values, "indices": indices, "x": x, "V": x.shape[-1], "k": k}
        gpu.triton("top_k", (values.size // k,), named, plain=("V", "k"), warps=8, BLOCK=2048)


def philox_uniforms(gpu: Any, u: Any, seeds: Any, steps: Any) -> None:
    named = {"u": u, "seeds": seeds, "steps": steps, "B": u.size}
    grid = (-(-u.size // 128),)
    if gpu.twin == "cuda":
        gpu.cuda("philox_uniforms", grid, 128, list(named.values()))
        return
    gpu.triton("philox_uniforms", grid, named, plain=("B",), fused=False, BLOCK=128)


def _suffix(x: Any) -> str:
    return "bf16" if x.dtype.itemsize == 2 else "fp32"
