"""What a teacher says about a batch. Hinton et al. 2015, arXiv:1503.02531; Sanh et al. 2019, arXiv:1910.01108."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import Ints
from fastlm.data.objectives.masked import Masked

Teacher = Callable[[Any, Any, Any], tuple[NDArray[np.float32], NDArray[np.float32]]]


class DistillationBatch(NamedTuple):
    """For a student: a masked batch, and the teacher's logits (B, T, V) and last hidden states (B, T, C) for its ids."""

    ids: Ints
    targets: Ints
    mask: NDArray[np.bool_] | None
    segments: Ints | None
    teacher_logits: NDArray[np.float32]
    teacher_states: NDArray[np.float32]


@dataclass(frozen=True)
class Distillation:
    """Masked rows and what a teacher makes of them. teacher: (ids, mask, segments) -> logits, states (`fastlm.train.teacher(model)`)."""

    masked: Masked
    teacher: Teacher = field(repr=False, compare=False)
    trains: ClassVar[str] = "distillation"

    @property
    def copies(self) -> int | None:
        return self.masked.copies

    def window(self, context: int) -> int:
        return self.masked.window(context)

    def stride(self, context: int) -> int:
        return self.masked.stride(context)

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> DistillationBatch:
        b = self.masked(rows, seed, step, numbers)
        logits, states = self.teacher(b.ids, b.mask, b.segments)
        for name, given in (("logits", logits), ("states", states)):
            if np.ndim(given) != 3 or given.shape[:2] != b.ids.shape:
                raise ValueError(
                    f"[distillation] the teacher's {name} must be (B, T, ...) with (B, T) = {b.ids.shape}, got {np.shape(given)}."
                )
        return DistillationBatch(*b, logits, states)
