"""What XLNet is made of: streams of queries, who sees whom, attention by distance, which positions are asked, earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.nn import Linear, Module, parameter
from fastlm.nn.attention import EVERYTHING
from fastlm.ops import check
from fastlm.tensor import data, record, recording


@dataclass
class Stream:
    """Where the queries of one stream stand and what they see. starts (B, T): their first row of the distances (see ops.rel_shift);
    mask (B, T, S) or None; segments (B, T) of the queries, key_segments (B, S), or None."""

    starts: Array
    mask: Array | None
    segments: Array | None
    key_segments: Array | None

    def to(self, device: Any) -> Stream:
        """The same there, once for all layers."""
        return Stream(*(backend.put(x, device) for x in (self.starts, self.mask, self.segments, self.key_segments)))


class RelativeAttention(Module):
    """softmax(scale ((q + u) k + rel_shift((q + w) r) + (q + s) e)) v: content, position and segment each with a bias of its own."""

    products, sees = 3, EVERYTHING  # what `fastlm plan` counts

    def __init__(self, d_model: int, n_head: int) -> None:
        self.n_head = self.n_kv_head = n_head
        self.head_dim, self.cached = d_model // n_head, d_model  # a memory holds hidden states
        self.q, self.k, self.v, self.r, self.out = (Linear(d_model, d_model, bias=False) for _ in range(5))
        self.content_bias, self.position_bias, self.segment_bias = (parameter(d_model, std=0.02) for _ in range(3))
        self.segment_embedding = parameter(2 * d_model, std=0.02)

    def heads(self, x: Any) -> Any:
        """(..., C) -> (..., H, D)."""
        return ops.reshape(x, (*x.shape[:-1], self.n_head, self.head_dim))

    def __call__(self, x: Any, keys: Any, values: Any, r: Any, stream: Stream) -> Any:
        """x (B, T, C), keys and values (B, S, H, D), r (P, H, D) the distances -> x + attention (B, T, C)."""
        q, scale = self.heads(self.q(x)), self.head_dim**-0.5
        segments = {}
        if stream.segments is not None:
            segments["segment_bias"] = self.heads(self.segment_bias)
            segments["segment_embedding"] = ops.reshape(self.segment_embedding, (2, self.n_head, self.head_dim))
            segments |= {"query_segments": stream.segments, "key_segments": stream.key_segments}
        bias = ops.rel_shift(
            q, r, self.heads(self.position_bias), stream.starts, keys.shape[1], scale, mask=stream.mask, **segments
        )
        y = ops.attention(ops.add(q, self.heads(self.content_bias)), keys, values, scale=scale, bias=bias)
        return self.out(ops.reshape(y, x.shape), residual=x)


class Row:
    """What one sequence has behind it: the memories, the last id, how many there were."""

    def __init__(self, mems: list[Array] | None = None, last: Sequence[int] = (), length: int = 0) -> None:
        self.mems, self.last, self.length = mems, list(last), length


class Memories:
    """The memories of several sequences, in the place of a Cache: `lengths`, `row`, `select`."""

    chunk = 1 << 30  # a prompt is read at once: its tokens see one another

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> Array:
        return np.array([row.length for row in self.rows], np.int32)

    def row(self, b: int) -> Memories:
        return Memories([self.rows[b]])

    def select(self, rows: Sequence[int] | Array) -> Memories:
        self.rows = [Row(self.rows[i].mems, self.rows[i].last, self.rows[i].length) for i in rows]
        return self


def hidden_from(B: int, T: int, M: int, causal: bool, perm_mask: Any, mask: Any) -> Array | None:
    """(B, T, M + T) bool: what a query must not see, or None; memories are always seen."""
    if not causal and perm_mask is None and mask is None:
        return None
    hidden = np.zeros((B, T, M + T), bool)
    if causal:
        hidden |= np.triu(np.ones((T, M + T), bool), M + 1)
    for name, given, shape in (("perm_mask", perm_mask, (B, T, T)), ("mask", mask, (B, T))):
        if given is not None and np.shape(given) != shape:
            raise ValueError(f"[xlnet] {name} must be {shape} for ids {(B, T)}, got {np.shape(given)}.")
    if perm_mask is not None:
        hidden[:, :, M:] |= np.asarray(perm_mask) != 0
    if mask is not None:
        hidden[:, :, M:] |= (np.asarray(mask) == 0)[:, None]
    return hidden


def scores_of(hidden: Array | None) -> Array | None:
    """What is added to the scores. Finite, as in the reference: a query that sees nothing takes the mean of all values."""
    return None if hidden is None else np.where(hidden, np.float32(-1e30), np.float32(0))


def positions_of(target_mapping: Any, B: int, T: int) -> tuple[Array, Array]:
    """The position that each row asks for, (B, N), and whether it asks for one."""
    m = np.asarray(target_mapping)
    if m.ndim != 3 or m.shape[0] != B or m.shape[2] != T or m.shape[1] == 0:
        raise ValueError(f"[xlnet] target_mapping must be (B, N, T) with (B, T) = {(B, T)}, got {m.shape}.")
    if not np.isin(m, (0, 1)).all() or (m.sum(2) > 1).any() or (m.sum(1) > 1).any():
        raise ValueError("[xlnet] target_mapping must have at most one 1 in every row and every column, and zeros.")
    return m.argmax(2), np.asarray(m.any(2))


def joined(parts: Sequence[Any], axis: int) -> Array:
    """Arrays one after another along axis 0 or 1, where they are."""
    if not backend.on_device(parts[0]):
        return np.concatenate(parts, axis)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    out, at = backend.empty_like(parts[0], tuple(shape)), 0
    for part in parts:
        span = slice(at, at := at + part.shape[axis])
        backend.assign(out[span] if axis == 0 else out[:, span], part)
    return out


def after(memory: Array, x: Any) -> Any:
    """memory (B, M, C), which has no gradient, then x (B, T, C)."""
    both = joined([memory, data(x)], 1)
    if not recording(x):
        return both
    return record(both, (x,), lambda dy: (backend.contiguous(dy[:, memory.shape[1] :]),))


def distances_of(T: int, S: int, C: int, clamp_len: int) -> Array:
    """(S + T, C): sines, then cosines, of the distances S, S - 1 ... 1 - T, of which none counts as more than clamp_len, if positive."""
    far = np.arange(S, -T, -1, dtype=np.float32)
    if clamp_len > 0:
        far = far.clip(-clamp_len, clamp_len)
    frequency = np.float32(1) / np.power(np.float32(10000), np.arange(0, C, 2, dtype=np.float32) / np.float32(C))
    angle = far[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def as_states(x: Any, like: Any) -> Array:
    """An array of the host where the states `like` are, in their dtype."""
    states: Array = backend.put(np.ascontiguousarray(x, like.dtype), backend.device_of(like))
    return states


def mems_of(mems: Sequence[Any], n_layer: int, like: Any) -> list[Array]:
    """The memories that were given, one a layer, as arrays (B, M, C) where the states `like` (B, T, C) are; the host's are put there."""
    B, C = like.shape[0], like.shape[2]
    found = [m if backend.on_device(m) else as_states(m, like) for m in map(data, mems)]
    for m in found:
        check.together("xlnet", "the model", like, mems=m)
        if m.dtype != like.dtype and backend.on_device(m):
            raise TypeError(f"[xlnet] mems on a device must be {like.dtype}, as the model is, got {m.dtype}.")
    want = (B, found[0].shape[1] if found and found[0].ndim == 3 else 0, C)
    if len(found) != n_layer or any(m.shape != want for m in found):
        raise ValueError(f"[xlnet] mems must be {n_layer} arrays (B, M, C) = {want}, got {[m.shape for m in found]!s:.80}.")
    return found


def kept_of(x: Array, memory: Array | None, c: Any) -> Array:
    """What a layer's next memory is: of this one and the first c.reuse_len positions of x (B, T, C), the last c.mem_len."""
    x = x[:, : c.reuse_len]
    x = x if memory is None else joined([memory, x], 1)
    return (x if c.mem_len is None else x[:, -c.mem_len :]).copy()
