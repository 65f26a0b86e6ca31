"""Decoding on a device: a whole step is one graph, and several run before the host reads what they chose.

Between its launches a step asks nothing of the host: ids, lengths and the counters of random numbers are in the device's memory, the
sampler writes the next ids where the embedding reads them. So up to AHEAD steps are queued, and then their ids are read back at once;
what a sequence got after its end is dropped. A step that cannot be recorded, or whose recording computes something else than the step
itself (looked at once for each model, batch and kind of step), is launched kernel by kernel: see `recorded.why_not`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.generate.recorded import Choose, enabled, log, verdicts_of, why_not
from fastlm.models.base import host_float
from fastlm.nn import Cache

AHEAD = 8  # steps at most whose ids are read back together; the first ones come sooner


class DeviceDecoder:
    """What `recorded.Decoder` is for the host. `ids` (B, 1) int32 are the host's: what is read next, then what was chosen.

    choose: writes the next ids, by kernels alone; None: the caller chooses from the logits, which are then copied to the host each
    step, and writes `ids`. counters: arrays on the device that choose counts up.
    """

    def __init__(self, model: Any, cache: Cache, choose: Choose | None = None, counters: Sequence[Any] = ()) -> None:
        self.model, self.cache, self.choose = model, cache, choose
        self.device: Any = cache.device
        B = cache.batch
        self.ids = np.zeros((B, 1), np.int32)
        self._counters = list(counters)
        owner = getattr(model, "model", model)
        self._verdicts, self._name = verdicts_of(owner), type(owner).__name__
        self._kind = (self.device.name, B, str(cache.arrays[0].dtype), choose is None, len(counters))
        self._plain = not enabled() or bool(self._verdicts.get(self._kind))
        self._next: Any = None  # the ids on the device
        self._history = self.device.empty((AHEAD, B), np.int32)
        self._ready: list[list[int]] = []
        self._count = 1
        self.recording: Any = None

    def step(self) -> Array | None:
        """Reads `ids` into the cache. With `choose`, `ids` are then the next; else returns the logits that follow, (B, V) float32."""
        if self.choose is None:
            if self._next is None:
                self._next = self.device.put(self.ids)
            else:
                self.device.copy_in(self._next.pointer, self.ids)
            return host_float(self._one())
        if not self._ready:
            self._run()
        self.ids[:, 0] = self._ready.pop(0)
        if self.ids.min() < 0:
            raise ValueError(f"[generate] logits row {int(self.ids.argmin())} has nan, or no token is possible.")
        return None

    def keeps(self, going: int) -> bool:
        """Whether the batch stays as it is, though only `going` of its sequences go on: a smaller one must be recorded anew."""
        return 2 * going > self.cache.batch and bool(self._ready or not self.cache.full)

    def settle(self) -> None:
        """Steps whose ids were not asked for are undone, so that the cache holds what the caller knows of."""
        self.cache.lengths -= len(self._ready)
        self._ready = []

    def _run(self) -> None:
        """Some steps, and their ids to the host."""
        if self._next is None:
            self._next = self.device.put(self.ids)
        count = min(self._count, self.cache.capacity - int(self.cache.lengths.max()))
        for i in range(max(count, 1)):  # 0: the step says itself that the cache is full
            self._one()
            backend.assign(self._history[i], self._next.reshape(-1))
        self._ready = self._history[: max(count, 1)].numpy().tolist()
        self._count = min(2 * self._count, AHEAD)

    def _one(self) -> Array:
        """One step; its logits, where the model is."""
        if self._plain or self.cache.full:
            return self._step()
        if self.recording is None:
            return self._record()
        if self._kind not in self._verdicts:
            return self._compare()
        self.recording.run()
        self.cache.lengths += 1
        logits: Array = self.recording.result
        return logits

    def _step(self) -> Array:
        logits: Array = self.model.scores(self._next, self.cache, last=True)
        if self.choose is not None:
            self.choose(logits, self._next.reshape(-1))
        return logits

    @property
    def _state(self) -> list[Any]:
        return [self._next, self.cache.counter, *self._counters]

    def _record(self) -> Array:
        """One step, as it is, while it is recorded."""
        self.cache.counter = self.device.put(self.cache.lengths)
        before = [a.copy() for a in self._state]
        try:
            self.recording = backend.record(self._step, self.device)
            log.debug("%s: recorded %d launches, %d bytes", self._name, len(self.recording), self.recording.nbytes)
            self.cache.lengths += 1
            logits: Array = self.recording.result
            return logits
        except Exception as e:
            self._restore(before)
            self._refuse(str(e) or type(e).__name__)
        return self._one()  # where the step itself was wrong this raises the same again

    def _restore(self, before: Sequence[Any]) -> None:
        for a, b in zip(self._state, before, strict=True):
            backend.assign(a, b)

    def _compare(self) -> Array:
        """The recorded step, with nan in its memory, against the step recorded anew."""
        before = [a.copy() for a in self._state]
        self.recording.spoil()
        self.recording.run()
        found = [a.numpy() for a in (self.recording.result, *self._state)]
        self._restore(before)
        try:
            again = backend.record(self._step, self.device)
        except backend.Unrecordable as e:
            self._restore(before)
            self._refuse(str(e))
            return self._one()
        expected = [a.numpy() for a in (again.result, *self._state)]
        self.cache.lengths += 1
        names = ["logits", "ids", "lengths", *["counters"] * len(self._counters)]
        differ = [n for n, a, b in zip(names, found, expected, strict=True) if a.tobytes() != b.tobytes()]
        if differ:
            self._refuse(f"run again, the recorded step gives other {' and '.join(dict.fromkeys(differ))}")
        else:
            self._verdicts[self._kind] = ""
        logits: Array = again.result
        return logits

    def _refuse(self, reason: str) -> None:
        self.recording, self._plain, self.cache.counter = None, True, None
        if reason not in why_not(self.model):
            log.warning("%s: steps on the device are launched kernel by kernel: %s", self._name, reason)
        self._verdicts[self._kind] = reason
