"""Forward and backward pass of a small model's training step on the CPU, recorded once and then run in C++: see "A recorded step" in
CONTRIBUTING.md. Norm, clipping and AdamW stay two calls from Python."""

from __future__ import annotations

import hashlib
import logging
import time
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.models.base import CausalLM
from fastlm.train.ondevice import enabled
from fastlm.train.optimizer import AdamW

log = logging.getLogger("fastlm.train")
LONGEST = 2.0  # seconds of a step from which on Python does not count


class HostStep:
    """Gradients of a model on the CPU. `why_not`: why they are computed from Python; "" where the recording is run.

    The first two steps are done as they are, so that what is made once is there and the time is known. In the third a pass over the
    second's batches is recorded, and run with the third's and with nan in its memory: what it gives is compared bit for bit with what
    Python gave. Batches of other shapes than the recorded ones, or with targets that are ignored, are computed from Python, and so is
    everything once a parameter's array is another one or it is frozen.
    """

    def __init__(self, model: Any, optimizer: AdamW, accumulate: int) -> None:
        self.model, self.parameters = model, list(optimizer.parameters.values())
        self._share = np.array(1.0 / accumulate, np.float32)
        self._recording: Any = None
        self._buffers: list[dict[str, Array]] = []
        self._before: list[dict[str, Any]] = []  # the batches of the second step
        self._gradients: list[Array | None] = []
        self._weights: list[Array] = []
        self._steps = 0
        self.why_not = "" if isinstance(model, CausalLM) else f"{type(model).__name__} computes from a batch's values in Python"

    def __call__(self, batches: list[Any]) -> float:
        """The summed loss of these batches; every parameter's `grad` is that of their mean, and was none before."""
        given = [dict(batch._asdict()) for batch in batches]
        if self.why_not or not enabled() or not self._fits(given):
            return self._sum(self._pass(given))
        self._steps += 1
        if self._steps <= 2 or _shapes(given) != _shapes(self._before):
            start = time.perf_counter()
            total = self._sum(self._pass(given))
            if self._steps == 2 and time.perf_counter() - start > LONGEST:
                self.why_not = "the step is long"
            self._before = given
            return total
        if self._recording is None or self._recording.threads != backend.num_threads():
            return self._record(given)
        self._fill(given)
        self._recording.run()
        return self._take()

    def _pass(self, batches: list[dict[str, Any]]) -> list[Array]:
        """The losses, (), of the batches."""
        losses = []
        for fields in batches:
            loss = self.model.loss(**fields)
            loss.backward(self._share)
            losses.append(loss.data)
        return losses

    def _sum(self, losses: list[Array]) -> float:
        total = 0.0
        for loss in losses:
            total += float(loss.item())
        return total

    def _record(self, given: list[dict[str, Any]]) -> float:
        self._recording, self._gradients = None, []
        expected = self._bits(self._pass(given))
        self._drop()
        self._buffers = [{k: np.array(v, np.int32) for k, v in fields.items()} for fields in self._before]
        try:
            self._recording = backend.Recording(lambda: self._pass(self._buffers))
        except backend.Unrecordable as e:
            self._drop()
            return self._refuse(str(e), given)
        self._gradients = [p.grad for p in self.parameters]
        self._weights = [p.data for p in self.parameters]
        self._fill(given)
        self._recording.spoil()
        self._recording.run()
        total = self._take()
        if self._bits(self._recording.result) != expected:
            self._drop()
            return self._refuse("run again, the recorded step gives other gradients: it computes outside kernels", given)
        return total

    def _bits(self, losses: list[Array]) -> list[bytes]:
        """A digest of each: copies would be as much memory again."""
        arrays = (*losses, *(p.grad for p in self.parameters if p.grad is not None))
        return [hashlib.blake2b(np.ascontiguousarray(a).data).digest() for a in arrays]

    def _drop(self) -> None:
        """The gradients; the memory of what Python computed goes back, since a recording has its own."""
        for p in self.parameters:
            p.grad = None
        backend.release()

    def _take(self) -> float:
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._sum(self._recording.result)

    def _refuse(self, reason: str, given: list[dict[str, Any]]) -> float:
        """From here on, and for these batches, Python computes."""
        self._recording, self._gradients, self.why_not = None, [], reason
        log.info("%s: training steps run in Python, slower: %s", type(self.model).__name__, reason)
        return self._sum(self._pass(given))

    def _fits(self, batches: list[dict[str, Any]]) -> bool:
        """Whether a recorded step is right for these, and for the model as it is."""
        V = int(self.model.config.vocab_size)
        buffers: list[Any] = self._buffers or [None] * len(batches)
        for fields, buffer in zip(batches, buffers, strict=True):
            if fields.keys() != {"ids", "targets"}:
                self.why_not = "a batch has more than ids and targets"
                return False
            for name, x in fields.items():
                plain = isinstance(x, np.ndarray) and x.dtype in (np.int32, np.int64)
                if not plain or (buffer is not None and x.shape != buffer[name].shape):
                    return False
                if _C.embedding_first_outside(np.ascontiguousarray(x), V) >= 0:
                    return False  # ignored, or an error that the step explains
        if any(p.data is not w or not p.requires_grad for p, w in zip(self.parameters, self._weights, strict=False)):
            self._recording, self._gradients = None, []
            self.why_not = "a parameter is another one than when the step was recorded"
            return False
        return True

    def _fill(self, batches: list[dict[str, Any]]) -> None:
        for fields, buffer in zip(batches, self._buffers, strict=True):
            for name, x in fields.items():
                buffer[name][...] = x


def _shapes(batches: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [x.shape for fields in batches for x in fields.values()]
