"""Masked tokens, and replaced ones. Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Clark et al. 2020,
arXiv:2003.10555."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import IGNORED, EncoderBatch, Ints, Vocabulary, as_rows, checked_rate, draws, padded


@dataclass(frozen=True)
class Masked:
    """Some tokens are hidden and asked for. Rows of text -> `[cls] text [sep]` with padding on the right.

    As BERT's create_pretraining_data: of a row of n tokens, the special ones counted, max(1, round(rate * n)) are chosen among those
    that are not special; of these `replace` become mask, `random` a random token that is not special, the others stay. whole_word:
    words are chosen whole or not at all, in random order, while they fit into that number; where none fits, the shortest is taken.
    copies: None masks anew each time that a text is seen (RoBERTa); N goes round through N maskings of it (BERT: 10).
    """

    vocabulary: Vocabulary
    rate: float = 0.15
    replace: float = 0.8
    random: float = 0.1
    whole_word: bool = False
    copies: int | None = None
    trains: ClassVar[str] = "masked_lm"

    def __post_init__(self) -> None:
        Vocabulary.need(self.vocabulary, "masked", "mask", *(("continues",) if self.whole_word else ()))
        checked_rate("masked", "rate", self.rate)
        shares = self.replace, self.random
        if not all(isinstance(x, Real) and float(x) >= 0 for x in shares) or sum(shares) > 1 + 1e-9:
            raise ValueError(f"[masked] replace and random must be shares of 1, got {self.replace!r} and {self.random!r}.")
        if self.copies is not None and not (hasattr(self.copies, "__index__") and self.copies >= 1):
            raise ValueError(f"[masked] copies must be None or at least 1, got {self.copies!r}: an integer.")

    def window(self, context: int) -> int:
        return context - (self.vocabulary.cls is not None) - (self.vocabulary.sep is not None)

    def stride(self, context: int) -> int:
        return self.window(context)

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> EncoderBatch:
        """rows: (B, n), or B lists of ids, without cls and sep."""
        v = self.vocabulary
        ends = [[i] if i is not None else [] for i in (v.cls, v.sep)]
        whole = [np.concatenate([ends[0], row, ends[1]]).astype(np.int32) for row in as_rows("masked", rows, v.size)]
        return self.batch(whole, seed, step, numbers)

    def batch(self, whole: Sequence[Ints], seed: int = 0, step: Any = 0, numbers: Any = None) -> EncoderBatch:
        """Masks rows that have their special tokens already."""
        if self.copies is not None:
            step = np.asarray(step) % self.copies
        masked = [self.hide(row, rng) for row, rng in zip(whole, draws(seed, step, numbers, len(whole)), strict=True)]
        pad = self.vocabulary.pad or 0
        ids, mask = padded([m[0] for m in masked], pad)
        return EncoderBatch(ids, padded([m[1] for m in masked], IGNORED)[0], mask)

    def hide(self, row: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """One row -> its ids with masks in place, and its targets."""
        v = self.vocabulary
        chosen = self.choose(row, rng)
        fate = rng.random(len(chosen))
        ordinary = v.ordinary
        drawn = ordinary[rng.integers(0, len(ordinary), len(chosen))]
        ids, targets = row.copy(), np.full(len(row), IGNORED, np.int32)
        targets[chosen] = row[chosen]
        ids[chosen] = np.where(fate < self.replace, v.id("mask"), np.where(fate < self.replace + self.random, drawn, row[chosen]))
        return ids, targets

    def choose(self, row: Ints, rng: np.random.Generator) -> NDArray[np.int64]:
        """The positions that are asked for, in ascending order."""
        free = np.flatnonzero(~self.vocabulary.is_special[row])
        wanted = min(len(free), max(1, round(self.rate * len(row))))
        if not self.whole_word:
            return np.sort(rng.permutation(free)[:wanted])
        groups = words(row, self.vocabulary)
        chosen: list[int] = []
        order = rng.permutation(len(groups))
        for g in order:
            if len(chosen) + len(groups[g]) <= wanted:
                chosen += groups[g].tolist()
        if not chosen and len(groups):
            chosen = min((groups[g] for g in order), key=len).tolist()
        return np.sort(np.array(chosen, np.int64))


def words(row: Ints, vocabulary: Vocabulary) -> list[NDArray[np.int64]]:
    """The positions of every word's tokens. Special tokens are in none, and end one."""
    assert vocabulary.continues is not None
    special = vocabulary.is_special[row]
    goes_on = vocabulary.continues[row] & ~special
    goes_on[1:] &= ~special[:-1]
    goes_on[:1] = False
    free = np.flatnonzero(~special)
    return np.split(free, np.flatnonzero(~goes_on[free])[1:]) if len(free) else []


class ReplacedBatch(NamedTuple):
    """For ELECTRA's generator and discriminator together: a masked batch, and (B, T) float32 from 0 to 1 by which the generator's
    tokens are drawn."""

    ids: Ints
    targets: Ints
    mask: NDArray[np.bool_] | None
    segments: Ints | None
    uniforms: NDArray[np.float32]


@dataclass(frozen=True)
class Replaced:
    """Replaced-token detection: masked rows, and the uniform numbers with which a generator fills them. All chosen tokens become
    mask, as in the paper (section 3.1)."""

    masked: Masked
    trains: ClassVar[str] = "electra"

    @classmethod
    def of(cls, vocabulary: Vocabulary, rate: float = 0.15) -> Replaced:
        return cls(Masked(vocabulary, rate, replace=1.0, random=0.0))

    @property
    def copies(self) -> int | None:
        return self.masked.copies

    def window(self, context: int) -> int:
        return self.masked.window(context)

    def stride(self, context: int) -> int:
        return self.masked.stride(context)

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> ReplacedBatch:
        b = self.masked(rows, seed, step, numbers)
        uniforms = np.zeros(b.ids.shape, np.float32)
        lengths = np.full(len(b.ids), b.ids.shape[1]) if b.mask is None else b.mask.sum(1)
        for row, n, rng in zip(uniforms, lengths, draws(seed, step, numbers, len(b.ids), stream=1), strict=True):
            row[:n] = rng.random(n, np.float32)
        return ReplacedBatch(*b, uniforms)


def replaced(batch: EncoderBatch, samples: Any) -> EncoderBatch:
    """The discriminator's batch from a masked batch and a generator's samples (B, T): at the positions that were asked for the sample
    stands, and the target is 1 where it is not the token that was there; elsewhere 0, and -100 in padding."""
    asked = batch.targets != IGNORED
    given = np.asarray(samples)
    if given.shape != batch.ids.shape or given.dtype.kind not in "iu":
        raise ValueError(f"[replaced] samples must be (B, T) = {batch.ids.shape} integers, got {given.dtype} {given.shape}.")
    ids = np.where(asked, given, batch.ids).astype(np.int32)
    targets = (asked & (ids != batch.targets)).astype(np.int32)
    if batch.mask is not None:
        targets[~batch.mask] = IGNORED
    return EncoderBatch(ids, targets, batch.mask, batch.segments)
