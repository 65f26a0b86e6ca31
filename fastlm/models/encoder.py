"""What every encoder is: a body that reads a whole sequence at once, and a head for a task, or none."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import LanguageModel, as_ids, host_float
from fastlm.models.deferred import in_one_go
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

    def means(self, model: Any, x: Any, targets: Any) -> list[tuple[Callable[[], Tensor], int]]:
        """The means that the loss adds up, and over how many targets each is taken. What is evaluated in batches weighs each by its own
        number."""
        return [(partial(self.loss, model, x, targets), int((np.asarray(targets) != -100).sum()))]


@dataclass(frozen=True)
class Pooling:
    """How a sequence becomes one vector: the mean over its tokens ("mean") or its first token ("cls"), and whether to length 1.

    max_tokens: what is longer is cut, as sentence-transformers does; None: the model's context.
    """

    mode: str = "mean"
    normalise: bool = False
    max_tokens: int | None = None

    def __call__(self, x: Array, lengths: Array) -> Array:
        """x (B, T, C), of which lengths (B,) positions are there, or packed (R, C), R their sum -> (B, C) float32."""
        rows = np.split(x, np.cumsum(lengths)[:-1]) if x.ndim == 2 else [row[:n] for row, n in zip(x, lengths, strict=True)]
        pooled = np.stack([row[0] if self.mode == "cls" else row.mean(0) for row in rows])
        if self.normalise:
            pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled


class Encoder(LanguageModel):
    """A bidirectional model. A subclass sets `config`, `embeddings` (its `tokens`), `pooler`, `head`, and defines `hidden`.

    ids: (B, T), or (B, K, T) for K choices of each example. mask: (B, T), 1 where there is a token, 0 where there is padding, or
    (B, T, T), one for each query; None: all are there. segments: (B, T), the number of each token's segment; None: all 0.
    """

    embeddings: Any
    pooler: Module | None
    head: Head | None
    pooling = Pooling()

    @property
    def token_embedding(self) -> Embedding:
        """What heads share."""
        tokens: Embedding = self.embeddings.tokens
        return tokens

    @property
    def pad(self) -> int:
        """The id that fills a batch up. Only RoBERTa looks at it; elsewhere the mask says all."""
        return int(getattr(self.config, "pad", 0))

    @property
    def max_tokens(self) -> int:
        """The longest sequence."""
        return int(self.config.context)

    def hidden(self, ids: Array, context: Context) -> Any:
        """ids (B, T) int32 -> (B, T, C), after the last layer."""
        raise NotImplementedError(f"{type(self).__name__} defines no hidden")

    def __call__(self, ids: Any, mask: Any = None, segments: Any = None) -> Tensor:
        """The head's logits, recorded. For ids (B, K, T): the K scores of each example, (B, K)."""
        logits: Tensor = self.need_head()(self, self.run(ids, mask, segments))
        lead = np.shape(ids)[:-1]
        return ops.reshape(logits, lead) if len(lead) == 2 else logits

    def loss(self, ids: Any, targets: Any, mask: Any = None, segments: Any = None) -> Tensor:
        """The head's loss, a scalar; targets as the head says."""
        return self.need_head().loss(self, self.run(ids, mask, segments), targets)

    def logits(self, ids: Any, mask: Any = None, segments: Any = None) -> Array:
        """The head's logits; nothing is recorded."""
        with no_grad():
            return host_float(data(self(ids, mask, segments)))

    def states(self, ids: Any, mask: Any = None, segments: Any = None) -> Array:
        """The hidden states after the last layer, (B, T, C) float32; nothing is recorded."""
        kind = np.ndim(ids), None if mask is None else np.ndim(mask), segments is None
        return self._in_one_go(kind, lambda: data(self.run(ids, mask, segments)))

    def packed_states(self, rows: Sequence[Sequence[int]]) -> Array:
        """The hidden states of sequences of any lengths, one behind the other, (R, C) float32: nothing is padded, a sequence has the
        same bits alone and in company; nothing is recorded."""
        ids = as_ids("ids", np.concatenate([np.asarray(row) for row in rows])[None])
        lengths = [len(row) for row in rows]
        return self._in_one_go("packed", lambda: data(self.hidden(ids, Context.packed(lengths, self.device)))[0])

    def _in_one_go(self, kind: Hashable, forward: Callable[[], Any]) -> Array:
        """What forward gives, float32 on the host. kind: see fastlm/models/deferred.py."""
        with no_grad():
            return host_float(forward()) if self.device is not None else in_one_go(self, kind, forward)

    def run(self, ids: Any, mask: Any = None, segments: Any = None) -> Any:
        """The hidden states, recorded."""
        ids, mask, segments = (_flat(x) for x in (ids, mask, segments)) if np.ndim(ids) == 3 else (ids, mask, segments)
        ids = as_ids("ids", ids)
        if segments is not None:
            segments = as_ids("segments", segments, ids.shape)
        return self.hidden(ids, Context(ids.shape[0], ids.shape[1], mask=mask, segments=segments, device=self.device))

    def need_head(self) -> Head:
        """The head, or a ValueError that says that there is none."""
        if self.head is None:
            raise ValueError(
                f"[model] this {type(self).__name__} has no head: it gives hidden states (states), no logits and no loss."
            )
        return self.head


def _flat(x: Any) -> Any:
    """(B, K, T) -> (B K, T)."""
    return x if x is None else np.reshape(x, (-1, np.shape(x)[-1]))
