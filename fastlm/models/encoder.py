"""What every encoder is: a body that reads a whole sequence at once, and a head for a task, or none."""

from __future__ import annotations

from typing import Any

from fastlm.backend import Array
from fastlm.models.base import LanguageModel, as_ids
from fastlm.nn import Context, Embedding, Module
from fastlm.tensor import Tensor, data, no_grad


class Head(Module):
    """What turns an encoder's hidden states into logits and a loss. It takes from the model what it shares with it: the token
    embedding, the pooler."""

    def __call__(self, model: Any, x: Any) -> Any:
        """x (B, T, C) -> logits."""
        raise NotImplementedError(f"{type(self).__name__} defines no logits")

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        """x (B, T, C), targets as the task has them -> a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")


class Encoder(LanguageModel):
    """A bidirectional model. A subclass sets `config`, `token_embedding`, `pooler`, `head`, and defines `hidden`.

    ids: (B, T), or (B, K, T) for K choices of each example. mask: (B, T), 1 where there is a token, 0 where there is padding, or
    (B, T, T), one for each query; None: all are there. segments: (B, T), the number of each token's segment; None: all 0.
    """

    token_embedding: Embedding
    pooler: Module | None
    head: Head | None

    def hidden(self, ids: Array, context: Context) -> Any:
        """ids (B, T) int32 -> (B, T, C), after the last layer."""
        raise NotImplementedError(f"{type(self).__name__} defines no hidden")

    def __call__(self, ids: Any, mask: Any = None, segments: Any = None) -> Tensor:
        """The head's logits, recorded."""
        logits: Tensor = self._need_head()(self, self.run(ids, mask, segments))
        return logits

    def loss(self, ids: Any, targets: Any, mask: Any = None, segments: Any = None) -> Tensor:
        """The head's loss, a scalar; targets as the head says."""
        return self._need_head().loss(self, self.run(ids, mask, segments), targets)

    def logits(self, ids: Any, mask: Any = None, segments: Any = None) -> Array:
        """The head's logits; nothing is recorded."""
        with no_grad():
            out: Array = data(self(ids, mask, segments))
            return out

    def states(self, ids: Any, mask: Any = None, segments: Any = None) -> Array:
        """The hidden states after the last layer, (B, T, C) float32; nothing is recorded."""
        with no_grad():
            out: Array = data(self.run(ids, mask, segments))
            return out

    def run(self, ids: Any, mask: Any = None, segments: Any = None) -> Any:
        """The hidden states, recorded."""
        ids = as_ids("ids", ids)
        if segments is not None:
            segments = as_ids("segments", segments, ids.shape)
        return self.hidden(ids, Context(ids.shape[0], ids.shape[1], mask=mask, segments=segments))

    def _need_head(self) -> Head:
        if self.head is None:
            raise ValueError(
                f"[model] this {type(self).__name__} has no head: it gives hidden states (states), no logits and no loss."
            )
        return self.head
