"""Span corruption. Raffel et al. 2019, arXiv:1910.10683, section 3.1.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import IGNORED, Ints, SourceBatch, Vocabulary, as_rows, checked_rate, draws, padded


@dataclass(frozen=True)
class SpanCorruption:
    """Spans are cut out of the source, a sentinel in the place of each; the target is each sentinel with what stood there.

        Thank you for inviting me to your party last week
        source  Thank you <0> me to your party <1> week </s>        target  <0> for inviting <1> last </s>

    As the original code (random_spans_noise_mask): of n tokens round(rate * n) are cut out, in round(that / mean_span) spans; how they
    and the text between fall into spans is drawn with all ways equally likely, and the text begins with one that stays and ends with
    one that is cut out. There is no sentinel after the last, as there is in the paper's figure. The decoder's inputs are the targets
    after `start` (pad, T5's). A context of 512 reads 568 tokens and gives 512 and 114.
    """

    vocabulary: Vocabulary
    rate: float = 0.15
    mean_span: float = 3.0
    start: int | None = None
    trains: ClassVar[str] = "encoder-decoder"
    copies: ClassVar[None] = None

    def __post_init__(self) -> None:
        Vocabulary.need(self.vocabulary, "span_corruption", "eos", "pad", "first_sentinel")
        checked_rate("span_corruption", "rate", self.rate, high=0.999)
        if not self.mean_span >= 1:
            raise ValueError(f"[span_corruption] mean_span must be at least 1, got {self.mean_span}.")

    def counts(self, length: int) -> tuple[int, int]:
        """Of `length` tokens: how many are cut out, and in how many spans."""
        out = min(max(round(length * self.rate), 1), length - 1)
        return out, min(max(round(out / self.mean_span), 1), out, length - out)

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens of source and target that `length` tokens of text give."""
        out, spans = self.counts(length)
        return length - out + spans + 1, out + spans + 1

    def window(self, context: int) -> int:
        """The longest text whose source is no longer than the context."""
        length = 2
        while self.lengths(length + 1)[0] <= context:
            length += 1
        if self.lengths(length)[0] > context:
            raise ValueError(f"[span_corruption] context must be at least {self.lengths(length)[0]}, got {context}.")
        return length

    def stride(self, context: int) -> int:
        return self.window(context)

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> SourceBatch:
        """rows: (B, n), or B lists of at least 2 ids, without eos."""
        v = self.vocabulary
        texts = as_rows("span_corruption", rows, v.size, shortest=2)
        pairs = [
            self.corrupt(row, self.noise(len(row), rng))
            for row, rng in zip(texts, draws(seed, step, numbers, len(texts)), strict=True)
        ]
        pad = v.id("pad")
        source, mask = padded([p[0] for p in pairs], pad)
        targets, _ = padded([p[1] for p in pairs], IGNORED)
        inputs = np.full(targets.shape, pad if self.start is None else self.start, np.int32)
        inputs[:, 1:] = np.where(targets == IGNORED, pad, targets)[:, :-1]
        return SourceBatch(source, inputs, targets, mask)

    def noise(self, length: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """(length,): which tokens are cut out."""
        out, spans = self.counts(length)
        lengths = np.stack([_partition(length - out, spans, rng), _partition(out, spans, rng)], 1)
        return np.repeat(np.tile([False, True], spans), lengths.reshape(-1))

    def corrupt(self, row: Ints, noise: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Source and target of a row, of which `noise` is cut out."""
        return self._sentinels(row, noise), self._sentinels(row, ~noise)

    def _sentinels(self, row: Ints, cut: NDArray[np.bool_]) -> Ints:
        """The row with a sentinel for each run of `cut`, and eos."""
        v = self.vocabulary
        first = cut & ~np.concatenate([[False], cut[:-1]])
        if first.sum() > v.sentinels:
            raise ValueError(
                f"[span_corruption] vocabulary must have a sentinel for each of {first.sum()} spans, got {v.sentinels}: give shorter "
                "rows or a greater mean_span."
            )
        out = np.where(first, v.id("first_sentinel") + 1 - np.cumsum(first), row)
        return np.append(out[first | ~cut], v.id("eos")).astype(np.int32)


def _partition(count: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` as a sum of `parts` positive integers in order, every such sum equally likely."""
    cuts = np.sort(rng.permutation(count - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [count]])).astype(np.int64)
