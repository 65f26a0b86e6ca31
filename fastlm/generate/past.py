"""Past: what was read of one sequence, between calls. A talk that goes on is read from where it is new."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from fastlm import backend
from fastlm.generate.kept import SMALL, Session, parts_of, unchanged
from fastlm.generate.recorded import enabled
from fastlm.models.base import CausalLM
from fastlm.models.xlnet import XLNet

STEP = 256  # positions: a cache grows by at least as many, and by half of what it had


class Past:
    """Keys and values of the last sequence, prompt and answer, for the next call of `LM.generate`, `stream`, `chat`, `chat_stream`,
    `generate_ids` or `generate.steps` that is given this object: of its prompt only what follows the common beginning is read. Ids and
    bits are those of a call without it. Memory: as many positions as the longest sequence had.

        past = fastlm.Past()
        lm.chat(messages, past=past)

    Another model, other weights, another kind of cache, activations or number of threads begin anew. Numbers that were changed within
    the weights' arrays are not seen, as an optimiser changes them: call `clear` then. `len(past)` is the number of positions kept. One
    Past serves one call at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()

    def __len__(self) -> int:
        return 0 if self._session is None else min(len(self._ids), int(self._session.cache.lengths[0]))

    def clear(self) -> None:
        """Forgets everything, and gives the memory back. Raises RuntimeError while a call uses it."""
        self._hold()
        self._forget()
        self._lock.release()

    def _forget(self) -> None:
        self._session: Session | None = None
        self._ids: Sequence[int] = ()
        self._parts: list[Any] = []

    def _hold(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("[generate] this past is in use by a call that has not ended: give each sequence a Past of its own")

    def take(self, model: Any, ids: list[int], capacity: int) -> Session:
        """A session whose cache holds what `ids` and the last sequence begin with, at most all ids but one, and has room for `capacity`
        positions. `ids` may grow until `give` is called."""
        if not isinstance(model, CausalLM) or isinstance(model, XLNet):
            kind = type(getattr(model, "model", model)).__name__
            raise ValueError(f"[generate] past must be None: {kind} keeps no keys and values of a prompt that could go on")
        self._hold()
        try:
            parts, size = parts_of(model)
            if not unchanged(parts, self._parts):
                self._forget()
            known = _common(self._ids, ids, min(len(self), len(ids) - 1))
            if self._session is None or self._session.cache.capacity < capacity:
                room = max(capacity, 0 if self._session is None else self._session.cache.capacity * 3 // 2)
                cache = model.new_cache(1, min(-(-room // STEP) * STEP, max(capacity, model.config.context)))
                for to, was in zip(cache.arrays, self._session.cache.arrays if self._session and known else [], strict=False):
                    backend.assign(to[:, :known], was[:, :known])
                small = enabled() and model.device is None and size <= SMALL
                self._session = Session(cache, kept=True, small=small)
            self._session.cache.lengths[:] = known
            self._ids = ids
            return self._session
        except BaseException:
            self._forget()
            self._lock.release()
            raise

    def give(self, model: Any) -> None:
        """The call has ended, well or not: what the cache holds is what its lengths say."""
        if self._session is not None:
            self._session.rest()
        self._parts = parts_of(model)[0]  # as it is now: parts make tables when they are first used
        self._lock.release()


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many ids a and b begin with alike, at most `most`."""
    return next((i for i in range(most) if a[i] != b[i]), most)
