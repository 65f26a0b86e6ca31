"""The next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastlm.data.objectives.base import Batch


@dataclass(frozen=True)
class Causal:
    """Every token is asked for after those before it: rows (B, T + 1) -> ids and targets (B, T). Nothing is drawn."""

    trains: ClassVar[str] = "causal"
    copies: ClassVar[None] = None

    def window(self, context: int) -> int:
        return context + 1

    def stride(self, context: int) -> int:
        return context

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> Batch:
        cut = np.asarray(rows)
        if cut.ndim != 2 or cut.dtype.kind not in "iu" or cut.shape[1] < 2:
            raise ValueError(f"[causal] rows must be (B, T + 1) integers, got {cut.dtype} {cut.shape}.")
        cut = cut.astype(np.int32)
        return Batch(np.ascontiguousarray(cut[:, :-1]), np.ascontiguousarray(cut[:, 1:]))
