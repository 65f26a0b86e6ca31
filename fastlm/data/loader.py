"""Batches as a function of (seed, number): what makes a resumed run the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import philox
from fastlm.data.objectives.causal import Causal


class Order:
    """`count` examples in random order, every one once an epoch. The order of an epoch follows from (seed, epoch) by Philox, so batch
    number n depends on the seed and on n alone."""

    def __init__(self, count: int, batch: int, seed: int = 0) -> None:
        if batch < 1 or count < 1:
            raise ValueError(f"[loader] batch and the number of examples must be at least 1, got {batch} and {count}.")
        philox(seed, 0)  # refuses what is none at once
        self.count, self.size, self.seed = count, batch, seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def examples(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Batch `number`: the epoch of each row, and which example it is."""
        places = np.arange(number * self.size, (number + 1) * self.size)
        epochs, chosen = places // self.count, np.empty(self.size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            chosen[inside] = self._of_epoch(epoch)[places[inside] - epoch * self.count]
        return epochs, chosen

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._order, self._epoch = self.draw(philox(self.seed, epoch)), epoch
        return self._order

    def draw(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """One epoch's examples."""
        return generator.permutation(self.count)


class Examples(Order):
    """Batches of examples that `make(seed, epochs, numbers)` puts together."""

    def __init__(self, count: int, batch: int, seed: int, make: Callable[[int, Any, Any], Any]) -> None:
        super().__init__(count, batch, seed)
        self.make = make

    def batch(self, number: int) -> Any:
        return self.make(self.seed, *self.examples(number))


class Loader(Order):
    """Windows of a token array in random order, every one once an epoch: all text is seen as often, unlike with free sampling.

    An epoch cuts the array from a random offset and visits the pieces in a random order. The objective (default: the next token) makes
    of window w of epoch e the row that it draws from (seed, e, w): the same whatever the batch size. Where it has a number of copies,
    each epoch cuts at the same places, so that a text meets its maskings again.
    """

    def __init__(self, tokens: NDArray[Any], batch: int, context: int, seed: int = 0, objective: Any = None) -> None:
        if batch < 1 or context < 1:
            raise ValueError(f"[loader] batch and context must be at least 1, got {batch} and {context}.")
        self.objective = Causal() if objective is None else objective
        window, self.stride = self.objective.window(context), self.objective.stride(context)
        if window < 1:
            raise ValueError(f"[loader] context must be more than the {context - window} places that are no text's, got {context}.")
        if len(tokens) < window:
            raise ValueError(f"[loader] tokens must be at least {window}, what a row of {context} reads, got {len(tokens)}.")
        shifted = self.objective.copies is None
        super().__init__(max(1, (len(tokens) - window + (1 if shifted else self.stride)) // self.stride), batch, seed)
        self.tokens, self.context = tokens, context
        self._spare = min(self.stride - 1, len(tokens) - window - (self.count - 1) * self.stride) if shifted else 0
        self._window = np.arange(window)

    @property
    def per_epoch(self) -> int:
        return self.count

    def draw(self, generator: np.random.Generator) -> NDArray[np.int64]:
        offset = generator.integers(0, self._spare + 1)
        return generator.permutation(self.count) * self.stride + offset

    def batch(self, number: int) -> Any:
        epochs, starts = self.examples(number)
        return self.objective(self.tokens[starts[:, None] + self._window], self.seed, epochs, starts // self.stride)


def windows(
    tokens: NDArray[Any], batch: int, context: int, limit: int | None = None, objective: Any = None, seed: int = 0
) -> Iterator[Any]:
    """The token array from its start, in windows that do not overlap, every target once; at most `limit` batches.

    The last batch may have fewer sequences. A remainder shorter than a window is left out. The same draws every time.
    """
    objective = Causal() if objective is None else objective
    window, stride = objective.window(context), objective.stride(context)
    starts = np.arange(0, len(tokens) - window + 1, stride)
    for i, first in enumerate(range(0, len(starts), batch)):
        if limit is not None and i >= limit:
            return
        chosen = starts[first : first + batch]
        yield objective(tokens[chosen[:, None] + np.arange(window)], seed, 0, chosen // stride)
