"""What XLNet's calls are made of: streams of queries, who sees whom, which positions are asked for, memories of earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.backend import Array
from fastlm.tensor import data, record, recording


@dataclass
class Stream:
    """Where the queries of one stream stand and what they see. starts (B, T): their first row of the distances (see ops.rel_shift);
    mask (B, T, S) or None; segments (B, T) of the queries, key_segments (B, S), or None."""

    starts: Array
    mask: Array | None
    segments: Array | None
    key_segments: Array | None


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


def after(memory: Array, x: Any) -> Any:
    """memory (B, M, C), which has no gradient, then x (B, T, C)."""
    both = np.concatenate([memory, data(x)], 1)
    if not recording(x):
        return both
    return record(both, (x,), lambda dy: (np.ascontiguousarray(dy[:, memory.shape[1] :]),))
