"""Cache: the keys and values of sequences of different lengths; Context: what one call of a model shares between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.nn.memory import Memory, Padding
from fastlm.tensor import data

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}


def cache_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a cache by its name, or a ValueError that lists the known ones."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"[cache] dtype must be one of {', '.join(map(repr, DTYPES))}, got {name!r}.")
    return DTYPES[name]


class Cache:
    """Keys and values of every layer, (B, capacity, G, D), allocated once, and `lengths` (B,) int32: what is filled.

    dtype: "float32", "bfloat16", or "int8" with a scale for each head's vector, (B, capacity, G, D + 4): see `ops.cache_append`.

    A model that is called with a cache appends T positions to every sequence and advances the lengths. To drop positions, lower
    the lengths: `cache.lengths[:] = n`. The capacity does not grow. `memory`: what a decoder's cross-attention reads, if it has one.

    device: where keys and values are, None for the host. `lengths` is the host's always; `counter` is a device's copy of it while a step
    is recorded (fastlm/generate/ondevice.py), else None.
    """

    memory: Memory | None = None
    device: Any = None
    counter: Any = None

    def __init__(
        self,
        n_layer: int,
        batch: int,
        capacity: int,
        n_kv_head: int,
        head_dim: int,
        dtype: str = "float32",
        device: Any = None,
    ) -> None:
        kind = cache_dtype(dtype)
        shape = (batch, capacity, n_kv_head, head_dim + (ops.SCALE if kind == np.int8 else 0))
        if min(shape) < 0 or batch < 1:
            raise ValueError(f"[cache] batch must be at least 1 and capacity at least 0, got batch {batch}, capacity {capacity}.")
        self.device = device
        empty = backend.empty if device is None else device.empty
        self.keys = [empty(shape, kind) for _ in range(n_layer)]
        self.values = [empty(shape, kind) for _ in range(n_layer)]
        self.lengths: Array = np.zeros(batch, np.int32)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def full(self) -> bool:
        """Whether a sequence has no room for another position."""
        return bool(max(self.lengths.tolist()) >= self.capacity)

    @property
    def arrays(self) -> list[Array]:
        """Keys and values of every layer."""
        return [*self.keys, *self.values]

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(a.nbytes for a in self.arrays)

    def row(self, b: int) -> Cache:
        """Sequence b alone, as a cache of batch 1 that shares this one's memory and length."""
        if not 0 <= b < self.batch:
            raise IndexError(f"[cache] row must be from 0 to {self.batch - 1}, got {b}.")
        return self.rows(b, b + 1)

    def rows(self, begin: int, end: int) -> Cache:
        """Sequences begin .. end - 1, as a cache that shares this one's memory and lengths."""
        if not 0 <= begin < end <= self.batch:
            raise IndexError(f"[cache] rows must be from 0 to {self.batch}, got {begin} to {end}.")
        view = Cache.__new__(Cache)
        view.device = self.device
        view.keys = [k[begin:end] for k in self.keys]
        view.values = [v[begin:end] for v in self.values]
        view.lengths = self.lengths[begin:end]
        view.memory = None if self.memory is None else self.memory.rows(begin, end)
        return view

    def select(self, rows: Sequence[int] | Array) -> Cache:
        """Sequence i becomes what sequence rows[i] was, in place; another number of rows changes the batch. Returns self."""
        index = np.asarray(rows, np.intp)
        if index.ndim != 1 or len(index) == 0 or index.min() < 0 or index.max() >= self.batch:
            raise IndexError(f"[cache] rows must be a list of numbers from 0 to {self.batch - 1}, got {rows!r}.")
        used = int(self.lengths[index].max())
        same = len(index) == self.batch
        if same and np.array_equal(index, np.arange(self.batch)):
            return self
        if self.memory is not None:
            sources = self.memory.sources
            if not same or not np.array_equal(sources[index], sources):  # the beams of one source all read the same
                self.memory = self.memory.select(index)
        into = np.flatnonzero(index != np.arange(len(index))) if same else np.arange(len(index))
        for arrays in (self.keys, self.values):
            for layer, array in enumerate(arrays):
                if self.device is not None:
                    moved = backend.rows_of(array, index, used)
                    if same:  # a recorded step knows the memory
                        backend.assign(array[:, :used], moved[:, :used])
                    else:
                        arrays[layer] = moved
                    continue
                kept = array[index[into], :used]  # a copy
                if not same:
                    arrays[layer] = backend.empty((len(index), *array.shape[1:]), array.dtype)
                arrays[layer][into, :used] = kept
        lengths = self.lengths[index]
        if same:
            self.lengths[:] = lengths
        else:
            self.lengths = lengths
        return self


class Context:
    """What all layers of one call share: positions, padding, segments, the cache, the memory.

    `positions`: None for 0 .. T-1 with no cache, else (B, T) int32; `lengths`: (B,) after the call where they differ, else None;
    `end`: the longest length after the call. While a step is recorded (backend.Recording) no length is known to the host: positions
    and lengths are arrays that each run writes anew, and `end` is the capacity, the most that it can become.
    `bias`: added to the scores of every layer's self-attention, None or (1 or B, 1 or H, T, S), an array or a Tensor: what a mask
    hides, and what a model adds that shares its position bias between layers (`add_bias`). `segments`: (B, T) int32 or None.
    `memory`: what cross-attention reads. `routings`: what the routers of experts chose, by layer. `training`: experts may be full.

    `offsets`: (N + 1,) int32 where N sequences lie one behind the other in one row (`packed`), else None; `positions` are then (1, R).

    A mask (see Padding) is for models that see everything; a causal model needs none for padding on the right.

    device: that of the model; what is here lies there then. `starts`: (B,), the cache's lengths before the call.
    `only_last`: the layer of whose output nothing but the last position is asked, the last one of a prompt; else None (`asked`).
    """

    __slots__ = (
        "bias",
        "cache",
        "device",
        "end",
        "lengths",
        "memory",
        "offsets",
        "only_last",
        "positions",
        "routings",
        "segments",
        "starts",
        "time",
        "training",
    )

    def __init__(
        self,
        batch: int,
        time: int,
        cache: Cache | None = None,
        *,
        mask: Any = None,
        segments: Array | None = None,
        memory: Memory | None = None,
        device: Any = None,
    ) -> None:
        self.cache, self.time, self.segments = cache, time, backend.put(segments, device)
        self.device = device
        self.memory = cache.memory if memory is None and cache is not None else memory
        self.bias: Any = None
        self.routings: list[ops.Routing] = []
        self.training = False
        self.end = time
        self.positions: Array | None = None
        self.lengths: Array | None = None
        self.offsets: Array | None = None
        self.only_last: int | None = None
        if mask is not None:
            if cache is not None:
                raise ValueError("[mask] mask must be None with a cache: the cache's lengths say what is there.")
            padding = Padding(mask, (batch, time)).to(device)
            self.lengths, self.bias = padding.lengths, padding.bias(time)
        if cache is None:
            return
        if cache.batch != batch:
            raise ValueError(f"[cache] ids must have as many sequences as the cache, {cache.batch}, got {batch}.")
        before = self.starts = cache.lengths
        if backend.recording():
            if time != 1 and (batch != 1 or device is not None):
                raise backend.Unrecordable(f"a step takes one position of each sequence, or several of one, got {time} of {batch}")
            if device is not None:
                before = self.starts = cache.counter
            self.end, self.lengths = cache.capacity, ops.advance(before, time)
            self.positions = before[:, None] if time == 1 else ops.positions(before, time)
            return
        first, last = int(before.min()), int(before.max())
        self.end = last + time
        if self.end > cache.capacity:
            raise ValueError(
                f"[cache] capacity must be at least {self.end} for {time} more positions after {last}, got {cache.capacity}. "
                f"Make the cache larger: model.new_cache(batch, capacity)."
            )
        self.starts = backend.put(before, device)
        self.positions = backend.put(before[:, None] + np.arange(time, dtype=np.int32), device)
        if first != last:
            self.lengths = backend.put(before + np.int32(time), device)

    @classmethod
    def packed(cls, lengths: Any, device: Any = None) -> Context:
        """For ids (1, R), sequences of these lengths one behind the other: attention stays within each. Nothing is padding."""
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        context = cls(1, int(offsets[-1]), device=device)
        context.offsets = offsets
        context.positions = backend.put(context.within(np.ones((1, context.time), np.int32)) - np.int32(1), device)
        return context

    def within(self, counts: Array) -> Array:
        """The sum of counts (B, T) int32 up to each place, within its sequence."""
        sums: Array = np.cumsum(counts, axis=1, dtype=np.int32)
        if self.offsets is not None:
            before = np.concatenate([np.zeros(1, np.int32), sums[0]])[self.offsets[:-1]]
            sums -= np.repeat(before, np.diff(self.offsets))
        return sums

    @property
    def places(self) -> Array:
        """Each token's number in its sequence: (T,), or (B, T) where they differ."""
        if self.positions is None and self.device is not None:
            numbers: Array = self.device.numbers(self.time)
            return numbers
        return backend.numbers(self.time) if self.positions is None else self.positions

    @property
    def queries(self) -> Array:
        """The positions of the new tokens: (T,), or (B, T) where they differ, or may."""
        if self.positions is None or self.lengths is not None:
            return self.places
        first: Array = self.positions[0]
        return first

    def add_bias(self, bias: Any) -> None:
        """Adds (1 or B, 1 or H, T, S) to the scores of every layer's self-attention, with its gradient."""
        self.bias = bias if self.bias is None else ops.add_broadcast(bias, self.bias)

    def asked(self, x: Any, layer: int) -> Any:
        """What is asked of x (B, T, ...), beside the layer's keys and values: all of it, or (B, 1, ...) in the layer `only_last`."""
        return backend.contiguous(data(x)[:, -1:]) if layer == self.only_last else x

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Writes k and v (B, T, G, D) into the cache's layer and returns all that is there: views (B, end, G, D)."""
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        ops.cache_append(keys, values, k, v, self.starts)
        return keys[:, : self.end], values[:, : self.end]

    def finish(self) -> None:
        """Advances the cache's lengths, after the last layer."""
        if self.cache is None:
            return
        if self.device is not None and backend.recording():
            ops.advance(self.cache.counter, self.time, out=self.cache.counter)  # the host counts its own when the step is run
        else:
            ops.advance(self.cache.lengths, self.time, out=self.cache.lengths)
