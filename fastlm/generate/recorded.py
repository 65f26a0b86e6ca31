"""Decoding steps that are recorded once and then run in C++: see "A recorded step" in CONTRIBUTING.md.

A `Decoder` advances all sequences of a cache by one id. Its first step runs in Python as usual and is recorded. The next runs both
ways, once for each model, batch and kind of step, and where it reads the ids that it was recorded with, once more with others: where
logits, ids, lengths or cache differ in one bit, the model is stepped in Python from then on, as it is where recording was refused.
`why_not(model)` says why, and the logger "fastlm.generate" says it once. FASTLM_RECORD=0 turns recording off.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.generate.settings import Continues
from fastlm.nn import Cache

log = logging.getLogger("fastlm.generate")

# model -> kind of step -> "" where the recording was found to be the step itself, else why it is not
_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()

Choose = Callable[[Array, Array], None]  # logits (B, V) -> the next ids, (B,) int32, by kernels alone


def why_not(model: Any) -> list[str]:
    """Why steps of this model run in Python: an empty list where every recording so far was good, or none was tried."""
    return sorted({verdict for verdict in _verdicts.get(getattr(model, "model", model), {}).values() if verdict})


def verdicts_of(model: Any) -> dict[tuple[Any, ...], str]:
    """By kind of step, "" where the recording was found to be the step itself, else why it is not."""
    return _verdicts.setdefault(model, {})


def enabled() -> bool:
    """Whether steps are recorded: FASTLM_RECORD is not 0."""
    return os.environ.get("FASTLM_RECORD", "1") != "0"


class Decoder:
    """Steps of one cache, whose batch stays: `ids` (B, T) int32 holds what is read next, T being 1 unless `time` says otherwise.

    choose: writes the ids that follow, into `ids` itself, at the end of each step; without it the caller does. counters: further
    arrays that a step counts up, such as the steps of random numbers. turned: see backend.Recording.
    """

    model: Any  # None while nobody uses it: fastlm/generate/kept.py

    def __init__(
        self,
        model: Continues,
        cache: Cache,
        choose: Choose | None = None,
        counters: Sequence[Array] = (),
        time: int = 1,
        turned: bool = False,
    ) -> None:
        self.model, self.cache, self.choose = model, cache, choose
        self.ids = np.zeros((len(cache.lengths), time), np.int32)
        self._turned = turned
        self._state = [self.ids, cache.lengths, *counters]
        self.recording: backend.Recording | None = None
        owner = getattr(model, "model", model)  # of a Reading: it is new for each call
        self._verdicts = verdicts_of(owner)
        self._name = type(owner).__name__
        keeps = isinstance(cache, Cache)  # XLNet's memories grow
        self._kind = (self.ids.shape, str(cache.arrays[0].dtype) if keeps else "", choose is None, len(counters), turned)
        self._python = not keeps or not enabled() or bool(self._verdicts.get(self._kind))

    def step(self) -> Array:
        """Reads `ids` into the cache and returns the logits that follow, (B, V): memory that the next step overwrites."""
        if self._python:
            return self._ordinary()
        if self.recording is None or self.recording.threads != backend.num_threads():
            return self._record()
        if self._room < 1:
            return self._ordinary()  # which says what is wrong
        if self._kind not in self._verdicts:
            return self._compare()
        self.recording.run()
        logits: Array = self.recording.result
        return logits

    def ahead(self, most: int, ends: Array, seconds: float) -> list[list[int]]:
        """Up to `most` steps that each choose ids, no new one once `seconds` have passed or an id is among `ends` (int32) or below 0, as
        it is where logits are nan. Returns the ids (B,) of each; none where the next step is one for `step` to take."""
        recording = self.recording
        if (
            recording is None
            or recording.threads != backend.num_threads()
            or self.choose is None
            or self._kind not in self._verdicts
        ):
            return []
        most = min(most, self._room)
        if self._python or most < 1:
            return []
        found = np.empty((most, len(self.ids)), np.int32)
        rows: list[list[int]] = found[: recording.run_on(found, self.ids, ends, seconds)].tolist()
        return rows

    def refresh(self) -> None:
        """To be called where weights may have changed since the last step."""
        if self.recording is not None:
            self.recording.refresh()

    @property
    def _room(self) -> int:
        """How many steps the cache has room for."""
        return int((self.cache.capacity - max(self.cache.lengths.tolist())) // self.ids.shape[1])

    def _ordinary(self) -> Array:
        logits: Array = self.model.logits(self.ids, self.cache, last=True)
        if self.choose is not None:
            self.choose(logits, self.ids[:, 0])
        return logits

    def _record(self) -> Array:
        before = [a.copy() for a in self._state]
        self._recorded_ids, self._unlike = self.ids.copy(), np.zeros(self.ids.shape, bool)
        try:
            self.recording = backend.Recording(self._ordinary, self._turned)
            log.debug("%s: recorded %d kernels, %d bytes", self._name, len(self.recording), self.recording.nbytes)
            logits: Array = self.recording.result
            return logits
        except Exception as e:
            reason = str(e) or type(e).__name__
        for a, b in zip(self._state, before, strict=True):
            a[...] = b
        logits = self._ordinary()  # where the step itself was wrong this raises the same again
        self._refuse(reason)
        return logits

    def _compare(self) -> Array:
        logits = self._both_ways()
        if not (self._python or self._unlike.all() or self._room < 1):
            self._try_other_ids()
        if not self._python and self._unlike.all():
            self._verdicts[self._kind] = ""
        return logits

    def _try_other_ids(self) -> None:
        """The next step with ids unlike those that were recorded: what depends on these alone would not show. It leaves no trace."""
        before = [a.copy() for a in self._state]
        self.ids[...] = (self._recorded_ids + 1) % self.model.config.vocab_size
        try:
            self._both_ways()
        except Exception as e:  # nobody asked for this step: where something is wrong the next one says so
            log.debug("%s: other ids: %s", self._name, e)
            self._unlike[...] = False
        for a, b in zip(self._state, before, strict=True):
            a[...] = b

    def _both_ways(self) -> Array:
        """The same step both ways: first as recorded, so that nothing which the ordinary step leaves behind can help it."""
        assert self.recording is not None
        before = [a.copy() for a in self._state]
        rows = np.arange(len(self.ids))[:, None], self.cache.lengths[:, None] + np.arange(self.ids.shape[1])
        self._unlike |= self.ids != self._recorded_ids
        self.recording.spoil()
        self.recording.run()
        found = [self.recording.result.copy(), *(a.copy() for a in self._state), *(a[rows].copy() for a in self.cache.arrays)]
        for a, b in zip(self._state, before, strict=True):
            a[...] = b
        for a in self.cache.arrays:
            a[rows] = 0
        logits = self._ordinary()
        expected = [logits, *self._state, *(a[rows] for a in self.cache.arrays)]
        names = ["logits", "ids", "lengths", *["counters"] * (len(before) - 2)]
        names += ["cache"] * (len(expected) - len(names))
        differ = [name for name, a, b in zip(names, found, expected, strict=True) if a.tobytes() != b.tobytes()]
        if differ:
            wrong = " and ".join(dict.fromkeys(differ))
            self._refuse(f"run again, the recorded step gives other {wrong}: it computes outside kernels")
        return logits

    def _refuse(self, reason: str) -> None:
        self.recording, self._python = None, True
        if reason not in why_not(self.model):
            log.warning("%s: steps run in Python, slower: %s", self._name, reason)
        self._verdicts[self._kind] = reason
