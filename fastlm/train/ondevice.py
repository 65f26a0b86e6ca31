"""A training step on a device: forward, backward, global norm and AdamW as one graph; the host sends a batch, the step's number and its
rate, and reads a loss and a norm back."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import numpy as np

from fastlm import backend, ops
from fastlm.models.base import CausalLM
from fastlm.ops import check
from fastlm.train.optimizer import AdamW

log = logging.getLogger("fastlm.train")
_ANY = 1e30  # a norm to clip to that no finite one reaches


class DeviceStep:
    """Updates of a model on a device. `why_not`: why they are launched kernel by kernel; "" where a recorded one runs.

    The first update is done as it is, so that what is made once (tables of positions) is there; the second is recorded while it runs.
    Batches of another shape than the recorded one's are launched kernel by kernel, too.
    """

    def __init__(self, model: Any, optimizer: AdamW, accumulate: int, clip: float | None) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.device: Any = model.device
        self._share = self.device.put(np.array(1.0 / accumulate, np.float32))
        self._step, self._rate = self.device.zeros((1,), np.int32), self.device.zeros((1,))
        self._shapes: tuple[Any, ...] | None = None  # of the batches in the buffers
        self._buffers: list[dict[str, Any]] = []
        self._recording: Any = None
        self._warm = False
        self._done: tuple[Any, Any] | None = None
        self.why_not = "" if isinstance(model, CausalLM) else f"{type(model).__name__} computes from a batch's values on the host"

    def __call__(self, batches: list[Any], rate: float) -> tuple[float, float]:
        """One update from these batches; their summed loss and the gradient's norm. What is not finite changes nothing."""
        o = self.optimizer
        self.device.copy_in(self._step.pointer, np.array([o.updates + 1], np.int32))
        self.device.copy_in(self._rate.pointer, np.array([rate], np.float32))
        total, norm = self._run(batches)
        loss, found = float(total.item()), float(norm.item())
        if math.isfinite(loss) and math.isfinite(found):
            o.updates += 1
        return loss, found

    def _run(self, batches: list[Any]) -> tuple[Any, Any]:
        given = [dict(b._asdict()) for b in batches]
        if any(f.keys() != {"ids", "targets"} for f in given):
            self.why_not = self.why_not or f"{type(batches[0]).__name__} has more than ids and targets"
        if self.why_not or not enabled():
            return self._update(given)
        fields = [{k: self._checked(k, v) for k, v in fields.items()} for fields in given]
        shapes = tuple((k, v.shape) for f in fields for k, v in f.items())
        if self._shapes is None:
            self._shapes, self._buffers = shapes, [{k: self.device.put(v) for k, v in f.items()} for f in fields]
        if shapes != self._shapes:
            return self._update(given)
        for buffers, f in zip(self._buffers, fields, strict=True):
            for k, v in f.items():
                self.device.copy_in(buffers[k].pointer, v)
        if self._recording is not None:
            self._recording.run()
            result: tuple[Any, Any] = self._recording.result
            return result
        if not self._warm:
            self._warm = True
            return self._update(self._buffers)
        self._done = None
        try:
            self._recording = backend.record(lambda: self._update(self._buffers), self.device)
        except backend.Unrecordable as e:
            self.why_not = str(e)
            log.warning("%s: training steps are launched kernel by kernel: %s", type(self.model).__name__, e)
        return self._done or self._update(self._buffers)  # refused or not, the step may have been done

    def _update(self, batches: list[dict[str, Any]]) -> tuple[Any, Any]:
        """Nothing here reads what is on the device."""
        o = self.optimizer
        o.zero_grad()
        total = None
        for fields in batches:
            loss = self.model.loss(**fields)
            loss.backward(self._share)
            total = loss.data if total is None else ops.add(total, loss.data)
        norm = o.update_there(total, self._step, self._rate, _ANY if self.clip is None else self.clip)
        o.zero_grad()
        self._done = total, norm
        return total, norm

    def _checked(self, name: str, x: Any) -> Any:
        """A batch's field as contiguous int32, its ids within the vocabulary: kernels do not look."""
        array = np.ascontiguousarray(x, np.int32)
        flat = array if name == "ids" else array[array >= 0] if name == "targets" else array[:0]
        check.ids("train", flat, (int(self.model.config.vocab_size), int(self.model.config.d_model)))
        return array


def enabled() -> bool:
    """Whether steps are recorded: FASTLM_RECORD is not 0."""
    return os.environ.get("FASTLM_RECORD", "1") != "0"
