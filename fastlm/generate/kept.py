"""Caches and recorded steps that outlive a call: the next answer begins where recording has been done.

A model's `Shelf` holds the sessions that nobody uses. A `Session` is a cache, its recorded steps by how the next ids are chosen, and its
recorded readers of prompts by length. They are used again as long as every attribute of every part of the model, and every parameter's
array, is the object that it was; the values in these arrays may change between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.generate.recorded import Choose, Decoder, enabled
from fastlm.models.base import CausalLM
from fastlm.nn import Cache, Module
from fastlm.tensor import Tensor

# Bytes of weights up to which Python costs as much as kernels, and copies of the weights stay in the processor's caches.
SMALL = 4 << 20
LARGEST = 8 << 20  # bytes that sessions keep, beside recorded steps; of a large model SHARE of its own
SHARE = 8
MOST = 4  # sessions that are kept
LONGEST = 64  # ids that a recorded reader takes at once

_lock = threading.Lock()


class Session:
    """A cache; where it is `kept` for another call, with its recorded steps, and of a `small` model with readers of prompts."""

    def __init__(self, cache: Any, kept: bool, small: bool) -> None:
        self.cache, self.kept, self.small = cache, kept, small
        self._steps: dict[Any, tuple[Decoder, list[Array]]] = {}
        self._ready: set[Any] = set()  # of `_steps`: those that were used in this call

    def decoder(self, model: Any, key: Any, make: Callable[[], tuple[Choose | None, list[Array]]]) -> tuple[Decoder, list[Array]]:
        """What advances the sequences by one id, chosen as `key` says, and the arrays that it reads beside ids and lengths; `make`
        gives these for a new one: int64 counters, and others."""

        def new() -> tuple[Decoder, list[Array]]:
            choose, arrays = make()
            return Decoder(model, self.cache, choose, [a for a in arrays if a.dtype == np.int64], turned=self.small), arrays

        return self._of(model, key, new)

    def read(self, model: Any, prompt: Sequence[int]) -> Array:
        """The logits (1, V) after a prompt of one sequence, read in pieces whose lengths are powers of two, so that few are recorded."""
        ids, at = np.asarray(prompt, np.int32), 0
        while at < len(ids):
            length = min(1 << ((len(ids) - at).bit_length() - 1), LONGEST)
            new = partial(Decoder, model, self.cache, time=length, turned=True)
            reader = self._of(model, length, lambda: (new(), []))[0]  # noqa: B023 -- called at once
            reader.ids[0] = ids[at : at + length]
            logits = reader.step()
            at += length
        return logits

    def _of(self, model: Any, key: Any, new: Callable[[], tuple[Decoder, list[Array]]]) -> tuple[Decoder, list[Array]]:
        if key not in self._steps:
            self._steps[key] = new()
        elif key not in self._ready:
            decoder = self._steps[key][0]
            decoder.model = model
            decoder.refresh()
        self._ready.add(key)
        return self._steps[key]

    def rest(self) -> None:
        """Nothing here refers to the model any longer: its memory goes with it."""
        for decoder, _ in self._steps.values():
            decoder.model = None
        self._ready.clear()


class Shelf:
    """The sessions of a model that rest, and the model's parts when they were made. A copy of it is empty."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.parts: list[Any] = []
        self.room = LARGEST

    def __reduce__(self) -> Any:
        return Shelf, ()


def take(model: Any, batch: int, capacity: int) -> Session:
    """A session with an empty cache of at least this capacity; `give` puts it back."""
    if not enabled() or not isinstance(model, CausalLM) or model.device is not None:
        return unkept(model, batch, capacity)
    parts, size = parts_of(model)
    with _lock:
        shelf: Shelf = model.__dict__.setdefault("_shelf", Shelf())
        if not unchanged(parts, shelf.parts):
            shelf.sessions.clear()
        shelf.parts, shelf.room = parts, _room(size)
        for session in shelf.sessions:
            if session.cache.batch == batch and session.cache.capacity >= capacity:
                shelf.sessions.remove(session)
                session.cache.lengths[:] = 0
                return session
    cache = model.new_cache(batch, max(capacity, min(-(-capacity // 64) * 64, model.config.context)))
    kept = isinstance(cache, Cache) and cache.nbytes <= _room(size)
    return Session(cache, kept, small=kept and size <= SMALL)


def _room(size: int) -> int:
    """Bytes of caches that a model of `size` bytes may keep."""
    return max(LARGEST, size // SHARE)


def unkept(model: Any, batch: int, capacity: int) -> Session:
    """A session for one call."""
    return Session(model.new_cache(batch, capacity), kept=False, small=False)


def give(model: Any, session: Session) -> None:
    """Back to the shelf, in place of those that lay there longest where there are too many."""
    if session.kept:
        session.rest()
        with _lock:
            shelf = model.__dict__.setdefault("_shelf", Shelf())
            shelf.sessions.append(session)
            while len(shelf.sessions) > MOST or sum(s.cache.nbytes for s in shelf.sessions) > shelf.room:
                del shelf.sessions[0]


def parts_of(model: Module) -> tuple[list[Any], int]:
    """What recorded steps took from a model, values in arrays aside: the machine's settings, every attribute of its parts, every
    parameter's array. And the bytes of these."""
    found: list[Any] = [backend.isa(), _C.has_vnni(), backend.num_threads()]
    size = 0
    parts = [model]
    while parts:
        for name, value in parts.pop().__dict__.items():
            if name == "_shelf":
                continue
            inner = value if value.__class__ is list else (value,)
            found.append(len(inner))
            for item in inner:
                if item.__class__ is Tensor:
                    size += item.data.nbytes
                    found.append(item.data)
                elif isinstance(item, Module):
                    parts.append(item)
                else:
                    found.append(item)
    return found, size


def unchanged(a: list[Any], b: list[Any]) -> bool:
    """Whether these are the same objects, or equal numbers."""
    return len(a) == len(b) and all(
        x is y or (x.__class__ is y.__class__ and x.__class__ in _PLAIN and x == y) for x, y in zip(a, b, strict=True)
    )


_PLAIN = (int, float, bool, str)
