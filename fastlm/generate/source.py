"""Generation from a source: an encoder-decoder model that has read it is to the loop, and to beam search, what a causal model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.generate.engine import alike, check_prompt
from fastlm.nn import Memory, Padding
from fastlm.tensor import data, no_grad

if TYPE_CHECKING:
    from fastlm.models.encoder_decoder import EncoderDecoder
    from fastlm.nn import Cache


class Reading:
    """`model` with `sources` read, lists of ids of any lengths. Its prompts are the decoder's: `self.prompts`, the first id each.

        steps(reading := Reading(model, sources), reading.prompts, settings)

    Sources of one length that follow each other are encoded together; none is padded, so that a text has the same bits alone and in a
    batch.
    """

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> None:
        self.model, self.config = model, model.config
        ids = [check_prompt(model, source) for source in sources]
        with no_grad():
            runs = list(alike(None, [len(row) for row in ids]))
            states = [data(model.encode(np.asarray(ids[a:b], np.int32)).states) for a, b in runs]
        lengths = np.array([len(row) for row in ids])
        longest = int(lengths.max())
        padded = states[0]
        if len(runs) > 1:
            padded = backend.zeros((len(ids), longest, padded.shape[-1]), padded.dtype, like=padded)
            for (a, b), part in zip(runs, states, strict=True):
                backend.assign(padded[a:b, : part.shape[1]], part)
        self.memory = Memory(padded, Padding(np.arange(longest) < lengths[:, None]).to(model.device))
        self.prompts = [[model.config.start] for _ in ids]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of the decoder for the sources, one sequence each."""
        if batch != self.memory.batch:
            raise ValueError(f"[generate] prompts must be one for each of {self.memory.batch} sources, got {batch}.")
        return self.model.new_cache(self.memory, capacity)

    def logits(self, ids: Any, cache: Cache, last: bool = False) -> Array:
        """float32 (B, T, V) of the decoder's next positions, or (B, V) of the last."""
        return self.model.decode(ids, cache, last)

    def scores(self, ids: Any, cache: Cache, last: bool = False) -> Array:
        """The same, where the model is."""
        return self.model.scores(ids, cache, last)
