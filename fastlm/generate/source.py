"""Generation from a source: an encoder-decoder model that has read it is to the loop, and to beam search, what a causal model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.backend import Array
from fastlm.generate.engine import check_prompt
from fastlm.nn import Memory, Padding
from fastlm.tensor import data, no_grad

if TYPE_CHECKING:
    from fastlm.models.encoder_decoder import EncoderDecoder
    from fastlm.nn import Cache


class Reading:
    """`model` with `sources` read, lists of ids of any lengths. Its prompts are the decoder's: `self.prompts`, the first id each.

        steps(reading := Reading(model, sources), reading.prompts, settings)

    Every source is encoded on its own, so that its text has the same bits alone and in a batch.
    """

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> None:
        self.model, self.config = model, model.config
        ids = [check_prompt(model, source) for source in sources]
        with no_grad():
            states = [data(model.encode(np.asarray(row, np.int32)[None]).states)[0] for row in ids]
        longest = max(len(row) for row in states)
        padded = np.zeros((len(states), longest, states[0].shape[-1]), np.float32)
        for out, row in zip(padded, states, strict=True):
            out[: len(row)] = row
        lengths = np.array([len(row) for row in states])
        self.memory = Memory(padded, Padding(np.arange(longest) < lengths[:, None]))
        self.prompts = [[model.config.start] for _ in ids]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of the decoder for the sources, one sequence each."""
        if batch != self.memory.batch:
            raise ValueError(f"[generate] prompts must be one for each of {self.memory.batch} sources, got {batch}.")
        return self.model.new_cache(self.memory, capacity)

    def logits(self, ids: Any, cache: Cache, last: bool = False) -> Array:
        """float32 (B, T, V) of the decoder's next positions, or (B, V) of the last."""
        return self.model.decode(ids, cache, last)
