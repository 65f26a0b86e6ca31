"""Batches as a function of (seed, number): what makes a resumed run the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Batch(NamedTuple):
    """tokens, targets: (B, T) int32; target t is token t + 1."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]


class Loader:
    """Random windows of a token array. Batch number n depends on the seed and on n alone (Philox with the key (seed, n))."""

    def __init__(self, tokens: NDArray[Any], batch: int, context: int, seed: int = 0) -> None:
        if batch < 1 or context < 1:
            raise ValueError(f"[loader] batch and context must be at least 1, got {batch} and {context}.")
        if len(tokens) <= context:
            raise ValueError(f"[loader] tokens must be more than the context of {context}, got {len(tokens)}.")
        self.tokens, self.size, self.context, self.seed = tokens, batch, context, seed
        self._window = np.arange(context + 1)

    def batch(self, number: int) -> Batch:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        starts = generator.integers(0, len(self.tokens) - self.context, self.size)
        return _cut(self.tokens, starts, self._window)


def windows(tokens: NDArray[Any], batch: int, context: int, limit: int | None = None) -> Iterator[Batch]:
    """The token array from its start, in windows that do not overlap, every target once; at most `limit` batches.

    The last batch may have fewer sequences. A remainder shorter than the context is left out.
    """
    starts = np.arange(0, len(tokens) - context, context)
    for i, first in enumerate(range(0, len(starts), batch)):
        if limit is not None and i >= limit:
            return
        yield _cut(tokens, starts[first : first + batch], np.arange(context + 1))


def _cut(tokens: NDArray[Any], starts: NDArray[Any], window: NDArray[Any]) -> Batch:
    cut = tokens[starts[:, None] + window].astype(np.int32)
    return Batch(np.ascontiguousarray(cut[:, :-1]), np.ascontiguousarray(cut[:, 1:]))
