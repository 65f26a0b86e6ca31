"""Sequences with labels, for a task head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastlm.data.objectives.base import IGNORED, EncoderBatch, as_rows, padded


@dataclass(frozen=True)
class Labelled:
    """Examples of a task: ids, one list each (special tokens in them, `tokenizer.encode` puts them there), and their labels.

    labels: what the head takes: N integers or floats, (N, M) floats for several labels (-100: not asked), (N, 2) for answers (beyond the
    example's tokens: none); with per_token a list for each example, one integer for each token (-100: not asked). segments: a list for
    each example, or None. pad: fills batches up. validation: the examples that are held out.
    """

    ids: Sequence[Any]
    labels: Any
    segments: Sequence[Any] | None = None
    per_token: bool = False
    pad: int = 0
    validation: Labelled | None = None

    def __post_init__(self) -> None:
        rows = as_rows("labelled", self.ids, 1 << 31)
        given: Any
        lists: list[tuple[str, Any, bool]] = [("labels", self.labels, self.per_token)]
        if self.segments is not None:
            lists.append(("segments", self.segments, True))
        for name, given, by_token in lists:
            if not hasattr(given, "__len__"):
                raise TypeError(f"[labelled] {name} must be a list or an array, one for each of ids, got {type(given).__name__}.")
            if len(given) != len(rows):
                raise ValueError(f"[labelled] {name} must be as many as ids, {len(rows)}, got {len(given)}.")
            for i, (row, own) in enumerate(zip(rows, given, strict=True)):
                if by_token and np.shape(own) != row.shape:
                    raise ValueError(
                        f"[labelled] {name} must be one for each token, {len(row)} in number {i}, got the shape {np.shape(own)}."
                    )
                kind, shape = np.asarray(own).dtype.kind, np.shape(own)
                if kind not in ("iu" if by_token else "iufb"):
                    wanted = "integers" if by_token else "numbers"
                    raise ValueError(f"[labelled] {name} must be {wanted}, got {own!r:.60} in number {i}.")
                if not by_token and shape != np.shape(given[0]):
                    raise ValueError(
                        f"[labelled] {name} must have one shape, got {np.shape(given[0])} in number 0 and {shape} in number {i}: labels "
                        "for each token take per_token=True."
                    )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(row) for row in self.ids)

    @cached_property
    def _dtype(self) -> Any:
        """That of all labels: [0.5, 1.0] beside [1, 0] are floats in a batch of the second alone, too, since heads go by that."""
        return np.asarray(self.labels).dtype

    def batch(self, numbers: Any) -> EncoderBatch:
        """The examples of these numbers, padded on the right."""
        ids, mask = padded([np.asarray(self.ids[i]) for i in numbers], self.pad)
        labels = [np.asarray(self.labels[i]) for i in numbers]
        targets = padded(labels, IGNORED)[0] if self.per_token else np.stack(labels).astype(self._dtype)
        segments = None if self.segments is None else padded([np.asarray(self.segments[i]) for i in numbers], 0)[0]
        return EncoderBatch(ids, targets, mask, segments)
