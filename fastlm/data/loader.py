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
    """Windows of a token array in random order, every one once an epoch: all text is seen as often, unlike with free sampling.

    An epoch cuts the array from a random offset and visits the pieces in a random order; both follow from (seed, epoch) by Philox.
    So batch number n depends on the seed and on n alone.
    """

    def __init__(self, tokens: NDArray[Any], batch: int, context: int, seed: int = 0) -> None:
        if batch < 1 or context < 1:
            raise ValueError(f"[loader] batch and context must be at least 1, got {batch} and {context}.")
        if len(tokens) <= context:
            raise ValueError(f"[loader] tokens must be more than the context of {context}, got {len(tokens)}.")
        self.tokens, self.size, self.context, self.seed = tokens, batch, context, seed
        self.per_epoch = max(1, (len(tokens) - context) // context)
        self._spare = min(context - 1, len(tokens) - 1 - self.per_epoch * context)
        self._window = np.arange(context + 1)
        self._epoch = -1
        self._starts = np.zeros(0, np.int64)

    def batch(self, number: int) -> Batch:
        places = np.arange(number * self.size, (number + 1) * self.size)
        starts = np.empty(self.size, np.int64)
        epochs = places // self.per_epoch
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            starts[inside] = self._of_epoch(epoch)[places[inside] - epoch * self.per_epoch]
        return _cut(self.tokens, starts, self._window)

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            offset = generator.integers(0, self._spare + 1)
            self._starts = generator.permutation(self.per_epoch) * self.context + offset
            self._epoch = epoch
        return self._starts


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
