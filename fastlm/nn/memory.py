"""Padding: which positions of a batch are there; Memory: the sequence that a decoder's cross-attention reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.tensor import data


class Padding:
    """What a mask hides, in the form that attention reads.

    mask: (B, S), 1 where a position is there and 0 where it is padding, or (B, T, S), one for each query; bool or numbers 0 and 1.
    Padding on the right becomes `lengths` (B,) int32, which costs nothing: hidden keys are not read. Any other mask becomes a bias
    of 0 and -inf. No mask, or one that hides nothing, is neither.
    """

    __slots__ = ("_hidden", "lengths")

    def __init__(self, mask: Any = None, shape: tuple[int, int] | None = None) -> None:
        self.lengths: Array | None = None
        self._hidden: Array | None = None
        if mask is None:
            return
        array = np.asarray(mask)
        if array.dtype != np.bool_ and (array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all()):
            raise ValueError(f"[mask] mask must hold 0 and 1 or be bool, got {array.dtype} with other values.")
        if array.ndim not in (2, 3) or (shape is not None and (array.shape[0], array.shape[-1]) != shape):
            raise ValueError(f"[mask] mask must be (B, S) or (B, T, S) with (B, S) = {shape}, got {array.shape}.")
        seen = array.astype(np.bool_)
        if seen.all():
            return
        if seen.ndim == 2 and not (seen[:, 1:] & ~seen[:, :-1]).any():
            self.lengths = seen.sum(1, dtype=np.int32)
            return
        hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
        self._hidden = hidden[:, None, None, :] if seen.ndim == 2 else hidden[:, None]

    def bias(self, time: int) -> Array | None:
        """(B, 1, time, S) float32, or None where `lengths` says all."""
        if self._hidden is None:
            return None
        B, _, T, S = self._hidden.shape
        if T not in (1, time):
            raise ValueError(f"[mask] mask must have a row for each of {time} queries, got {T}.")
        if not isinstance(self._hidden, np.ndarray):
            return self._hidden if time == T else backend.repeated(self._hidden, (B, 1, time, S))
        return np.broadcast_to(self._hidden, (B, 1, time, S))

    def to(self, device: Any) -> Padding:
        """The same on a device; itself where it is there."""
        if device is None:
            return self
        out = Padding()
        out.lengths, out._hidden = backend.put(self.lengths, device), backend.put(self._hidden, device)
        return out

    def select(self, rows: Any) -> Padding:
        """That of sequences `rows`, an index."""
        out = Padding()
        out.lengths = None if self.lengths is None else backend.rows_of(self.lengths, rows)
        out._hidden = None if self._hidden is None else backend.rows_of(self._hidden, rows)
        return out


class Memory:
    """The encoder's states (B, S, C), their padding, and each decoder layer's keys and values of them, computed once.

    `sources` (B,): which rows are one and the same, those of one number.
    """

    def __init__(self, states: Any, padding: Padding | None = None, sources: Array | None = None) -> None:
        self.states = states
        self.sources: Array = np.arange(states.shape[0]) if sources is None else sources
        self.padding = padding or Padding()
        self._kept: dict[int, tuple[Any, Any]] = {}

    @property
    def batch(self) -> int:
        return int(self.states.shape[0])

    def keys_values(self, layer: int, make: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Layer's keys and values: make(states) at first use."""
        if layer not in self._kept:
            self._kept[layer] = make(self.states)
        return self._kept[layer]

    def rows(self, begin: int, end: int) -> Memory:
        """Sequences begin .. end - 1, sharing memory. Nothing of it is recorded."""
        return self._taken(slice(begin, end))

    def select(self, rows: Sequence[int] | Array) -> Memory:
        """Sequence i of the result is sequence rows[i] of this. Nothing of it is recorded."""
        return self._taken(np.asarray(rows, np.intp))

    def _taken(self, rows: Any) -> Memory:
        out = Memory(backend.rows_of(data(self.states), rows), self.padding.select(rows), self.sources[rows])
        out._kept = {n: (backend.rows_of(data(k), rows), backend.rows_of(data(v), rows)) for n, (k, v) in self._kept.items()}
        return out
