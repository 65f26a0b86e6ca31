"""What every model is, and what every causal one is: a config, hidden states, a head. The wiring is in the model's own file.

The other two kinds are in encoder.py and encoder_decoder.py.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.checkpoint import QuantizedArray
from fastlm.models.place import place_model
from fastlm.nn import Cache, Context, Embedding, Linear, Module
from fastlm.ops.matmul import product
from fastlm.tensor import Tensor, data, no_grad

C = TypeVar("C")
M = TypeVar("M", bound="LanguageModel")
Id = int  # a field of a Config that is a token id: 0 is allowed
Weight = float  # a field that is the weight of a loss: 0 is allowed
_LIMITS = {"n_layer": 10_000, "n_head": 100_000, "n_kv_head": 100_000, "max_distance": 1 << 20}
_LARGEST = 1 << 31


def check_config(config: C) -> C:
    """The config, or a ValueError that names the field: sizes are integers from 1 to a limit, floats positive, flags bool."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        limit = _LIMITS.get(field.name, _LARGEST)
        if kind.startswith("int") and not (type(value) is int and 1 <= value <= limit):
            raise ValueError(f"[config] {field.name} must be an integer from 1 to {limit}, got {value!r:.60}.")
        if kind == "Id" and not (type(value) is int and 0 <= value <= limit):
            raise ValueError(f"[config] {field.name} must be an integer from 0 to {limit}, got {value!r:.60}.")
        if kind == "Weight" and not (type(value) in (int, float) and 0 <= value <= sys.float_info.max):
            raise ValueError(f"[config] {field.name} must be a number of at least 0, got {value!r:.60}.")
        if kind == "float" and not (type(value) in (int, float) and 0 < value <= sys.float_info.max):
            raise ValueError(f"[config] {field.name} must be a positive number, got {value!r:.60}.")
        if kind == "bool" and type(value) is not bool:
            raise ValueError(f"[config] {field.name} must be true or false, got {value!r:.60}.")
        if kind.startswith("str") and type(value) is not str:
            raise ValueError(f"[config] {field.name} must be a string, got {value!r:.60}.")
        if kind.startswith("Mapping") and not isinstance(value, Mapping):
            raise ValueError(f"[config] {field.name} must be a mapping, got {value!r:.60}.")
    return config


class LanguageModel(Module):
    """A model over token ids. Its kind is CausalLM, Encoder or EncoderDecoder."""

    config: Any
    cache_dtype = "float32"  # of the caches that new_cache makes; see nn.Cache
    # What a folder says for others and `save` writes back: bos_token_id, eos_token_id and pad_token_id of config.json, and all of
    # generation_config.json.
    token_ids: Mapping[str, Any] = {}
    generation: Mapping[str, Any] = {}

    @property
    def kept_dtype(self) -> str:
        """`cache_dtype`, or bfloat16 where keys and values have no more digits than that: on a device in bfloat16."""
        half = self.cache_dtype == "float32" and self.device is not None
        return (
            "bfloat16" if half and any(p.dtype == backend.BFLOAT16 for p in self.named_parameters().values()) else self.cache_dtype
        )

    def to(self: M, device: Any, dtype: str | None = None) -> M:
        """Every parameter on "cpu" or "cuda", in place; each is copied once, gradients are dropped. Returns the model.

        dtype: "float32" or "bfloat16", of all parameters on a GPU, where activations have it too, and of the matrices on the CPU; None:
        as the matrices are. Quantised matrices stay what they are; dtype is that of the rest. Raises RuntimeError that says why where
        there is no GPU, ValueError for a dtype or weights without a value.
        """
        self.forget()
        place_model(self, backend.device(device), dtype)
        return self

    def forget(self) -> None:
        """Drops what generation keeps from call to call (fastlm/generate/kept.py): it holds arrays that are about to be replaced."""
        self.__dict__.pop("_shelf", None)


class CausalLM(LanguageModel):
    """A model of the next token. A subclass sets `config`, `token_embedding` and `head` (None: tied), and defines `hidden`."""

    token_embedding: Embedding
    head: Linear | None

    def hidden(self, ids: Array, context: Context) -> Any:
        """ids (B, T) int32 -> (B, T, C), after the final norm."""
        raise NotImplementedError(f"{type(self).__name__} defines no hidden")

    def new_cache(self, batch: int, capacity: int, dtype: str | None = None) -> Cache:
        """Memory for the keys and values of `batch` sequences of up to `capacity` positions; dtype: default `cache_dtype`, which a model
        that computes in bfloat16 has in bfloat16, with nothing lost."""
        c = self.config
        return Cache(c.n_layer, batch, capacity, c.n_kv_head, c.head_dim, dtype or self.kept_dtype, self.device)

    def __call__(self, ids: Any, cache: Cache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V). With a cache the positions are appended to it and nothing is recorded."""
        if cache is not None:
            with no_grad():
                return self._project(self._run(ids, cache))
        return self._project(self._run(ids, cache))

    def loss(self, ids: Any, targets: Any, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy of the next token, a scalar. ids and targets (B, T); the logits are never held as a whole."""
        x = self._run(ids, None)
        targets = as_ids("targets", targets, x.shape[:-1])
        flat = ops.reshape(x, (-1, x.shape[-1]))
        loss: Tensor = ops.linear_cross_entropy(flat, self._head_weight(), targets.reshape(-1), ignore_index)
        return loss

    def logits(self, ids: Any, cache: Cache | None = None, last: bool = False) -> Array:
        """float32 (B, T, V), or (B, V) of the last position alone, on the host. Nothing is recorded."""
        return host_float(self.scores(ids, cache, last))

    def scores(self, ids: Any, cache: Cache | None = None, last: bool = False) -> Array:
        """`logits` as they are, where the model is."""
        with no_grad():
            x = self._run(ids, cache, last)
            if last:
                x = data(x)[:, -1]
            return scores_of(backend.contiguous(data(x)), self._head_weight())

    def _run(self, ids: Any, cache: Cache | None, last: bool = False) -> Any:
        ids = as_ids("ids", ids)
        context = Context(ids.shape[0], ids.shape[1], cache, device=self.device)
        if last and ids.shape[1] > 1:
            context.only_last = self.config.n_layer - 1
        x = self.hidden(ids, context)
        context.finish()
        return x

    def _head_weight(self) -> Tensor:
        return self.token_embedding.weight if self.head is None else self.head.weight

    def _project(self, x: Any) -> Tensor:
        logits: Tensor = ops.linear(x, self._head_weight())
        return logits


def as_ids(name: str, ids: Any, shape: tuple[int, ...] | None = None) -> Array:
    """ids as (B, T) int32, with at least one token a sequence. An array on a device must be that already: a step that is recorded."""
    array = ids if backend.on_device(ids) else np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"[model] {name} must be integers, got {array.dtype}.")
    if shape is not None and array.shape != shape:
        raise ValueError(f"[model] {name} must be (B, T) = {shape}, the shape of ids, got {array.shape}.")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"[model] {name} must be (B, T) with T at least 1, got {array.shape}. One sequence is ids[None].")
    if array.dtype != np.int32 and not isinstance(array, np.ndarray):
        raise TypeError(f"[model] {name} on a device must be int32, got {array.dtype}.")
    return array if array.dtype == np.int32 else narrowed(name, array)


def narrowed(name: str, array: Any) -> Array:
    """Integers of the host as int32, or a ValueError: a cast alone would make 2^32 + 5 the id 5."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < -(1 << 31) or high >= 1 << 31:
        raise ValueError(f"[model] {name} must fit into 32 bits, got {low if low < -(1 << 31) else high}.")
    narrow: Array = array.astype(np.int32)
    return narrow


def scores_of(x: Any, head: Any) -> Array:
    """The logits of hidden states, float32 where these are bfloat16 too: logits are compared, and rounding makes many equal."""
    weight = data(head)
    if x.dtype == backend.BFLOAT16 and isinstance(weight, QuantizedArray):
        rows = data(x)
        wide = ops.embedding(rows.device.numbers(rows.size // weight.shape[1]), rows.reshape(-1, weight.shape[1]), np.float32)
        x = wide.reshape(rows.shape)  # by now float32, so the logits are
    elif x.dtype == backend.BFLOAT16 and backend.on_device(weight):
        V, C = weight.shape
        scores = backend.empty((*x.shape[:-1], V), like=x)
        product(scores, x, weight, x.size // C, V, C, b_transposed=True)
        return scores
    out: Array = data(ops.linear(x, head))
    return out


def host_float(x: Any) -> Array:
    """x as float32 on the host."""
    array = backend.host(x)
    return array if array.dtype == np.float32 else array.astype(np.float32)


def names(table: Mapping[str, str], model: LanguageModel) -> dict[str, str]:
    """Their name of every parameter of the model: `blocks.3.mlp.up.weight` -> `transformer.h.3.mlp.c_fc.weight`.

    A key of the table is a part, `blocks.{}.mlp.up`, whose parameters keep their own names, or a parameter by its full name.
    """
    found = {}
    for ours in model.named_parameters():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", ours)
        whole = re.sub(r"(?<=\.)\d+(?=\.)", "{}", ours)
        part, _, kind = whole.rpartition(".")
        theirs = table[whole] if whole in table else f"{table[part]}.{kind}"
        found[ours] = theirs.format(*numbers)
    return found
