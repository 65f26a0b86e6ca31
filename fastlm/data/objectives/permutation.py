"""Permutation language modelling. Yang et al. 2019, arXiv:1906.08237, sections 2.2 to 2.4; data_utils.py of its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import IGNORED, PermutationBatch, Vocabulary, as_rows, draws, padded

Bools = NDArray[np.bool_]
STYLES = ("original", "huggingface")


@dataclass(frozen=True)
class Permutation:
    """Spans are asked for, each token after those that come before it in a drawn order and after all that is not asked for. Rows of
    text -> `text <sep> <cls>`, padding on the left, an even number of positions; the last two are functional: never asked for.

    style "original": as the authors' code. Each half has T // (2 K) targets or one more, T // K together (85 of 512): spans of 1 to
    `longest` tokens, the shorter the likelier (1 / n), each somewhere in K n tokens, then single tokens; whole words at their
    beginning where the vocabulary tells words. A target does not see itself; the first half sees nothing of the second.

    style "huggingface": as DataCollatorForPermutationLanguageModeling: spans of 1 to `longest` tokens, equally likely, each within
    K n tokens, and mask in their place in ids, so that targets do not see one another's tokens. Every position is mapped.
    """

    vocabulary: Vocabulary
    style: str = "original"
    K: int = 6
    longest: int = 5
    trains: ClassVar[str] = "permutation"
    copies: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"[permutation] style must be one of {', '.join(STYLES)}, got {self.style!r}.")
        Vocabulary.need(self.vocabulary, "permutation", "pad", "cls", "sep", *(("mask",) if self.style == "huggingface" else ()))
        if self.K < 2 or self.longest < 1:
            raise ValueError(f"[permutation] K must be at least 2 and longest at least 1, got {self.K} and {self.longest}.")

    def window(self, context: int) -> int:
        least = 4 if self.style == "huggingface" else max(4, self.K + self.K % 2)  # of fewer than K positions none is asked for
        if context < least:
            raise ValueError(f"[permutation] context must be at least {least}, got {context}.")
        return context // 2 * 2 - 2

    def stride(self, context: int) -> int:
        return self.window(context)

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> PermutationBatch:
        """rows: (B, n), or B lists of ids, without sep and cls."""
        v = self.vocabulary
        whole = [np.append(row, [v.id("sep"), v.id("cls")]).astype(np.int32) for row in as_rows("permutation", rows, v.size)]
        widest = max(map(len, whole))
        ids, mask = padded([*whole, np.zeros(widest + widest % 2, np.int32)], v.id("pad"), left=True)
        ids = ids[:-1]
        mask = None if mask is None or mask[:-1].all() else mask[:-1]
        segments = np.where(ids == v.cls, 2, 0).astype(np.int32)  # as the original code has it
        T, special = ids.shape[1], v.is_special[ids]
        perm_mask, targets = np.zeros((len(ids), T, T), bool), np.full(ids.shape, IGNORED, np.int32)
        for b, rng in enumerate(draws(seed, step, numbers, len(ids))):
            order = orders(T, rng)
            if self.style == "huggingface":
                asked = spans_huggingface(T, self.K, self.longest, rng) & ~special[b]
                perm_mask[b] = mask_huggingface(order, asked, special[b])
            else:
                starts = None if v.continues is None else ~v.continues[ids[b]] & ~special[b]
                asked = spans_original(special[b], T // self.K, self.K, self.longest, rng, starts)
                perm_mask[b] = mask_original(order, asked, special[b])
            targets[b, asked] = ids[b, asked]
        if self.style == "huggingface":
            return PermutationBatch(
                np.where(targets == IGNORED, ids, v.id("mask")).astype(np.int32), targets, perm_mask,
                np.repeat(np.eye(T, dtype=bool)[None], len(ids), 0), mask, segments,
            )  # fmt: skip
        places = [np.flatnonzero(row != IGNORED) for row in targets]
        mapping = np.zeros((len(ids), max(1, *map(len, places), T // self.K), T), bool)
        asked_for = np.full(mapping.shape[:2], IGNORED, np.int32)
        for b, at in enumerate(places):
            mapping[b, np.arange(len(at)), at] = True
            asked_for[b, : len(at)] = targets[b, at]
        return PermutationBatch(ids, asked_for, perm_mask, mapping, mask, segments)


def orders(length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The place of each position in the order of prediction: one drawn permutation, of both halves, the first half before the second."""
    half = length // 2
    drawn = rng.permutation(half)
    return np.concatenate([drawn, drawn + half])


def mask_original(order: NDArray[np.int64], asked: Bools, functional: Bools) -> Bools:
    """(T, T): what a row must not see. order (T,): the place of each position; asked, functional (T,).

    Tokens that are neither asked for nor functional come before all; of the others, one sees those that come before it, a functional
    one itself too. The first half does not see the second.
    """
    half, plain = len(order) // 2, ~(asked | functional)
    place = np.where(plain, -1, order)
    own = np.where(asked & ~functional, place, place + 1)
    hidden = (own[:, None] <= place[None]) & ~plain[None]
    hidden[half:, :half] = False
    hidden[:half, half:] = True
    return hidden


def mask_huggingface(order: NDArray[np.int64], asked: Bools, functional: Bools) -> Bools:
    """As `mask_original`, but functional tokens are seen by all, and both halves are one."""
    place = np.where(~asked & ~functional, -1, order)
    return (place[:, None] <= place[None]) & asked[None]


def spans_huggingface(length: int, K: int, longest: int, rng: np.random.Generator) -> Bools:
    """(length,): spans of 1 to `longest`, each somewhere in the K n positions after those of the one before."""
    asked, at = np.zeros(length, bool), 0
    while at < length:
        n = int(rng.integers(1, longest + 1))
        start = at + int(rng.integers(0, K * n - n + 1))
        asked[start : start + n] = True
        at += K * n
    return asked


def spans_original(special: Bools, goal: int, K: int, longest: int, rng: np.random.Generator, starts: Bools | None = None) -> Bools:
    """(T,): `goal` positions, fewer where there are not as many, half of them in each half of the row; none special.

    starts: where a word begins; a span begins at one. Special tokens at the beginning are padding, and are skipped.
    """
    half = len(special) // 2
    asked = np.zeros(len(special), bool)
    for first, last, wanted in ((0, half, goal - goal // 2), (half, len(special), goal // 2)):
        free = np.flatnonzero(~special[first:last]) + first
        wanted = min(wanted, len(free))
        at, left = int(free[0]) if len(free) else last, wanted
        shares = 1 / np.arange(1, longest + 1)
        while at < last and left:
            n = min(int(rng.choice(longest, p=shares / shares.sum())) + 1, left)
            before = int(rng.integers(0, K * n))
            begin = at + before
            while begin < last and (special[begin] or (starts is not None and not starts[begin])):
                begin += 1
            end = begin + n
            if end > last or special[begin:end].any():
                break
            asked[begin:end] = True
            at, left = end + K * n - before, left - n
        rest = free[~asked[free]]
        asked[rng.permutation(rest)[:left]] = True
    return asked
