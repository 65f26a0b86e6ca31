"""What every encoder-decoder model is: an encoder that makes a Memory of the source, a decoder that reads it, a head."""

from __future__ import annotations

from typing import Any

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.models.base import LanguageModel, as_ids, host_float, scores_of
from fastlm.nn import Cache, Context, Memory, Padding
from fastlm.tensor import Tensor, data, no_grad


class EncoderDecoder(LanguageModel):
    """A subclass sets `config`, `encoder` and `decoder`, stacks with `blocks`, and defines `encode_hidden`, `decode_hidden`,
    `head_weight`, and `head_scale` where it has one.

    source_ids (B, S); decoder_ids (B, T), the decoder's inputs as given: nothing is shifted. mask (B, S): 1 where the source has a
    token, 0 where it has padding. Padding on the right of decoder_ids needs no mask: its targets are -100.
    """

    ties = "they share the encoder's memory and position biases, which have gradients"
    encoder: Any
    decoder: Any

    def encode_hidden(self, ids: Array, context: Context) -> Any:
        """ids (B, S) int32 -> (B, S, C)."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode_hidden")

    def decode_hidden(self, ids: Array, context: Context) -> Any:
        """ids (B, T) int32 -> (B, T, C); cross-attention reads context.memory."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode_hidden")

    def head_weight(self) -> Tensor:
        """(V, C)."""
        raise NotImplementedError(f"{type(self).__name__} defines no head_weight")

    def head_scale(self) -> float:
        """What the hidden states are multiplied by before the head."""
        return 1.0

    def auxiliary_loss(self, encoder: Context, decoder: Context) -> Any:
        """What `loss` adds to the cross-entropy after a call with these contexts, a scalar; None for nothing."""
        return None

    def encode(self, source_ids: Any, mask: Any = None) -> Memory:
        """What the decoder reads of the source, recorded where parameters want gradients."""
        return self._read(source_ids, mask)[0]

    def new_cache(self, memory: Memory, capacity: int, dtype: str | None = None) -> Cache:
        """Memory for up to `capacity` positions of the decoder, with the source that it reads. `select` and `row` take both along.
        dtype: default `cache_dtype`; what is kept of the source is float32, each layer's keys and values computed here."""
        c = self.config
        with no_grad():
            for layer, block in enumerate(self.decoder.blocks):
                memory.keys_values(layer, block.cross.keys_values)
        cache = Cache(c.n_layer, memory.batch, capacity, c.n_kv_head, c.head_dim, dtype or self.kept_dtype, self.device)
        cache.memory = memory
        return cache

    def __call__(self, source_ids: Any, decoder_ids: Any, mask: Any = None) -> Tensor:
        """Logits (B, T, V), recorded."""
        return self._project(self._run(decoder_ids, self.encode(source_ids, mask))[0])

    def loss(self, source_ids: Any, decoder_ids: Any, targets: Any, mask: Any = None, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy of targets (B, T) after decoder_ids (B, T), a scalar; the logits are never held as a whole."""
        memory, encoder = self._read(source_ids, mask)
        x, decoder = self._run(decoder_ids, memory)
        targets = as_ids("targets", targets, x.shape[:-1])
        flat = self._scaled(ops.reshape(x, (-1, x.shape[-1])))
        loss: Tensor = ops.linear_cross_entropy(flat, self.head_weight(), targets.reshape(-1), ignore_index)
        extra = self.auxiliary_loss(encoder, decoder)
        return loss if extra is None else ops.add(loss, extra)

    def logits(self, source_ids: Any, decoder_ids: Any, mask: Any = None) -> Array:
        """float32 (B, T, V); nothing is recorded."""
        with no_grad():
            return host_float(data(self(source_ids, decoder_ids, mask)))

    def decode(self, ids: Any, cache: Cache, last: bool = False) -> Array:
        """float32 (B, T, V) of T more positions of the decoder, or (B, V) of the last alone; they are appended to the cache."""
        return host_float(self.scores(ids, cache, last))

    def scores(self, ids: Any, cache: Cache, last: bool = False) -> Array:
        """`decode` as it is, where the model is; float32 there too."""
        with no_grad():
            x, _ = self._run(ids, None, cache)
            x = data(x)[:, -1] if last else data(x)
            return scores_of(data(self._scaled(backend.contiguous(x))), self.head_weight())

    def _read(self, source_ids: Any, mask: Any) -> tuple[Memory, Context]:
        ids = as_ids("source_ids", source_ids)
        context = Context(ids.shape[0], ids.shape[1], mask=mask, device=self.device)
        return Memory(self.encode_hidden(ids, context), Padding(mask, ids.shape).to(self.device)), context

    def _run(self, ids: Any, memory: Memory | None, cache: Cache | None = None) -> tuple[Any, Context]:
        ids = as_ids("decoder_ids", ids)
        context = Context(ids.shape[0], ids.shape[1], cache, memory=memory, device=self.device)
        assert context.memory is not None
        if context.memory.batch != ids.shape[0]:
            raise ValueError(
                f"[model] decoder_ids must have as many sequences as source_ids, {context.memory.batch}, got {len(ids)}."
            )
        x = self.decode_hidden(ids, context)
        context.finish()
        return x, context

    def _scaled(self, x: Any) -> Any:
        factor = self.head_scale()
        return x if factor == 1.0 else ops.scale(x, factor)

    def _project(self, x: Any) -> Tensor:
        logits: Tensor = ops.linear(self._scaled(x), self.head_weight())
        return logits
