"""The position and segment scores of Transformer-XL as attention's bias. Dai et al. 2019, arXiv:1901.02860, appendix B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import data, needs_grad, record, recording, wrap


def rel_shift(
    q: Any,
    r: Any,
    bias: Any,
    starts: Any,
    keys: int,
    scale: float,
    *,
    mask: Any = None,
    segment_bias: Any = None,
    segment_embedding: Any = None,
    query_segments: Any = None,
    key_segments: Any = None,
) -> Any:
    """out[b, h, t, s] = scale * ((q[b, t, h] + bias[h]) . r[starts[b, t] + s, h] + ef) + mask[b, t, s].

    ef = (q[b, t, h] + segment_bias[h]) . segment_embedding[c, h] with c = 0 where query t and key s are of one segment, else 1; 0
    without segments. q: (B, T, H, D), r: (P, H, D), bias, segment_bias: (H, D), segment_embedding: (2, H, D), mask: (B, T, S), all
    float32. starts: (B, T) int32 from 0 to P - S: row p of r is of the distance starts - p behind key 0. keys: S. query_segments
    (B, T), key_segments (B, S): integers; the four of segments go together.

    Returns (B, H, T, S) float32, what `attention` takes as its bias: a Tensor where an input is one. Gradients for q, r, both biases
    and the segment embedding. On a device arrays may be bfloat16, but for the mask, and starts that lie there are not checked.
    Raises TypeError for a dtype, ValueError for a shape or a start out of range.
    """
    qd, rd = check.array("rel_shift", "q", data(q), ndim=4), check.array("rel_shift", "r", data(r), ndim=3)
    B, T, H, D = qd.shape
    P, S = rd.shape[0], int(keys)
    check.shape("rel_shift", "r", rd, "(P, H, D)", (P, H, D), f"q is {qd.shape}.")
    ud = _shaped("bias", bias, "(H, D)", (H, D))
    scale = check.number("rel_shift", "scale", scale)
    at = check.array("rel_shift", "starts", starts, dtype=np.int32)
    check.shape("rel_shift", "starts", at, "(B, T)", (B, T), f"q is {qd.shape}.")
    low, high = (int(at.min(initial=P)), int(at.max(initial=0))) if isinstance(at, np.ndarray) else (0, 0)
    if not 0 <= S <= P or (at.size and (low < 0 or high > P - S)):
        raise ValueError(
            f"[rel_shift] starts must be from 0 to P - S = {P} - {S}, got {low} to {high}. r must have a row for every distance."
        )
    md = None if mask is None else _shaped("mask", mask, "(B, T, S)", (B, T, S))
    segments = [x is not None for x in (segment_bias, segment_embedding, query_segments, key_segments)]
    if any(segments) and not all(segments):
        raise ValueError("[rel_shift] segment_bias, segment_embedding, query_segments and key_segments go together, got some.")
    sd = ed = term = qs = ks = None
    if all(segments):
        sd = _shaped("segment_bias", segment_bias, "(H, D)", (H, D))
        ed = _shaped("segment_embedding", segment_embedding, "(2, H, D)", (2, H, D))
        qs, ks = _numbers("query_segments", query_segments, (B, T), qd), _numbers("key_segments", key_segments, (B, S), qd)
    device = backend.device_of(qd)
    if device is not None:
        check.together("rel_shift", "q", qd, r=rd, bias=ud, mask=md, segment_bias=sd, segment_embedding=ed)
        at = backend.put(at, device)
        if md is not None and md.dtype != np.float32:
            raise TypeError(f"[rel_shift] mask must be float32, got {md.dtype}.")
    if sd is not None and ed is not None:
        term = _term(qd, sd, ed, scale)
    out = backend.empty_like(qd, (B, H, T, S))
    kernels(qd).rel_shift_forward(out, qd, ud, _columns(rd) if device is None else rd, P, at, term, qs, ks, md, scale)
    if not recording(q, r, bias, segment_bias, segment_embedding):
        return wrap(out, q, r, bias, segment_bias, segment_embedding)

    def backward(dout: Array) -> Sequence[Array | None]:
        dq = backend.empty_like(qd)
        dr = backend.empty_like(rd) if needs_grad(r) else None
        dout = dout if device is None else backend.cast(dout, np.float32)
        dterm = None if term is None else backend.empty((B, H, T, 2), like=qd)
        kernels(qd).rel_shift_backward(dq, dr, dterm, contiguous(dout), qd, ud, rd, at, qs, ks, scale)
        if device is not None:
            return dq, dr, *_sums_there(dq, dterm, qd, sd, ed, scale)
        dbias = dq.sum((0, 1), dtype=np.float64).astype(np.float32)
        if dterm is None:
            return dq, dr, dbias, None, None
        dterm *= np.float32(scale)
        assert sd is not None
        assert ed is not None
        dq += np.einsum("bhtc,chd->bthd", dterm, ed)
        dsegment = np.einsum("hc,chd->hd", dterm.sum((0, 2), dtype=np.float64), ed).astype(np.float32)
        dembedding = np.einsum("bhtc,bthd->chd", dterm, qd + sd, dtype=np.float64).astype(np.float32)
        return dq, dr, dbias, dsegment, dembedding

    return record(out, (q, r, bias, segment_bias, segment_embedding), backward)


def _term(q: Array, bias: Array, embedding: Array, scale: float) -> Array:
    """The segment scores (B, H, T, 2) float32, for keys of the same segment and of another."""
    if isinstance(q, np.ndarray):
        return np.ascontiguousarray(np.einsum("bthd,chd->bhtc", q + bias, embedding) * np.float32(scale))
    B, T, H, _ = q.shape
    term = backend.empty((B, H, T, 2), like=q)
    kernels(q).rel_shift_term(term, q, bias, embedding, scale)
    return term


def _sums_there(
    dq: Array, dterm: Array | None, q: Array, bias: Array | None, embedding: Array | None, scale: float
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients of the biases and of the segment embedding on a device, float32; dq gets the segment scores' part."""
    H, D = q.shape[2:]
    dbias = backend.empty((H, D), like=q)
    kernels(q).rel_shift_sum(dbias, dq)
    if dterm is None:
        return dbias, None, None
    sums = backend.empty((3, H, D), like=q)
    kernels(q).rel_shift_backward_term(dq, sums, dterm, q, bias, embedding, scale)
    return dbias, sums[2], sums[:2]


def _shaped(name: str, x: Any, symbols: str, shape: tuple[int, ...]) -> Array:
    xd = check.array("rel_shift", name, data(x))
    check.shape("rel_shift", name, xd, symbols, shape)
    return xd


def _numbers(name: str, x: Any, shape: tuple[int, ...], like: Array) -> Array:
    """Segments as the kernel compares them: float32 on the host, int32 on a device."""
    xd: Any = x if backend.on_device(x) else np.asarray(x)
    if xd.dtype.kind not in "iu":
        raise TypeError(f"[rel_shift] {name} must be integers, got {xd.dtype}.")
    check.shape("rel_shift", name, xd, "(B, T)" if name == "query_segments" else "(B, S)", shape)
    if isinstance(like, np.ndarray):
        return np.ascontiguousarray(xd, np.float32)
    there = contiguous(xd if backend.on_device(x) else backend.put(xd.astype(np.int32), like.device))
    numbers: Array = kernels(like).rel_shift_narrow(there)
    return numbers


def _columns(r: Array) -> Array:
    """r (P, H, D) as (H, D, stride): whole vectors of neighbouring positions. The stride is an odd number of cache lines, so that
    the rows do not fall into one set of the cache."""
    P, H, D = r.shape
    out = backend.zeros((H, D, (P + 15) // 16 * 16 + (16 if (P + 15) // 16 % 2 == 0 else 0)))
    out[:, :, :P] = r.transpose(1, 2, 0)
    return out
