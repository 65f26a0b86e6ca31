"""What changes the scores before one is chosen, in the order of transformers: repetition penalty, repeated n-grams, too early an end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastlm.backend import Array


def process(
    scores: Array,
    ids: Sequence[int],
    new: int,
    *,
    repetition_penalty: float,
    no_repeat_ngram: int,
    min_tokens: int,
    eos: Sequence[int],
) -> None:
    """Changes one row of scores (V,) in place. `ids` is the sequence so far, of which the last `new` were generated."""
    if repetition_penalty != 1.0:
        seen = np.unique(np.asarray(ids, np.intp))
        penalty = np.float32(repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if no_repeat_ngram > 0:
        scores[_would_repeat(ids, no_repeat_ngram)] = -np.inf
    if new < min_tokens:
        scores[list(eos)] = -np.inf


def _would_repeat(ids: Sequence[int], n: int) -> list[int]:
    """The ids that would complete an n-gram which the sequence holds already."""
    if len(ids) + 1 < n:
        return []
    start = tuple(ids[len(ids) - n + 1 :])
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == start]


def active(repetition_penalty: float, no_repeat_ngram: int, min_tokens: int) -> bool:
    """Whether `process` would do anything."""
    return repetition_penalty != 1.0 or no_repeat_ngram > 0 or min_tokens > 0


def check_possible(
    scores: Array, index: int, ids: Sequence[int], new: int, no_repeat_ngram: int, min_tokens: int, eos: Sequence[int]
) -> None:
    """ValueError where `process` left no id to choose of a row (V,); where it forbade none, the model's logits are to blame, and whoever
    chooses says so. Prompt `index` has `new` ids."""
    if np.max(scores) == -np.inf and ((no_repeat_ngram and _would_repeat(ids, no_repeat_ngram)) or (new < min_tokens and eos)):
        raise ValueError(exhausted(new, f" of prompt {index}"))


def exhausted(new: int, of: str = "") -> str:
    """What is said where nothing can follow `new` ids."""
    return (
        f"[generate] no id is possible after {new} new ones{of}: no_repeat_ngram and min_tokens forbid all that the logits allow. "
        "Lower max_tokens or min_tokens, or raise no_repeat_ngram."
    )
