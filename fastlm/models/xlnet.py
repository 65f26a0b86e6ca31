"""XLNet. Yang et al. 2019, arXiv:1906.08237; relative positions and memories: Dai et al. 2019, arXiv:1901.02860.

Tokens are predicted in any order: `perm_mask` says which tokens a token may not see, `target_mapping` which are asked. The content
stream h holds what is there, itself included; the query stream g begins with `mask_embedding` at the places that are asked and never
sees itself. Both use the same weights; keys and values are always of h. Memories are the inputs of every layer for earlier tokens.

    h: embedding -> [ h = norm(h + attention(h, memory + h)); h = norm(h + mlp(h)) ] * n_layer
    g: mask_embedding -> the same with attention(g, memory + h); logits of g where something is asked, else of h
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import CausalLM, as_ids, check_config, host_float
from fastlm.models.heads import labels_of
from fastlm.models.permutation import (
    Memories,
    RelativeAttention,
    Row,
    Stream,
    after,
    as_states,
    distances_of,
    hidden_from,
    joined,
    kept_of,
    mems_of,
    positions_of,
    scores_of,
)
from fastlm.nn import MLP, Embedding, LayerNorm, Module, parameter
from fastlm.tensor import Tensor, data, no_grad

Distance = int  # a field of the Config that may be negative


@dataclass(frozen=True)
class XLNetConfig:
    vocab_size: int = 32000
    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_ff: int = 4096
    activation: str = "gelu"  # the original code has gelu_tanh
    attn_type: str = "bi"  # "uni": causal
    eps: float = 1e-12
    mem_len: int | None = 512  # positions that a memory keeps; None: all
    reuse_len: int | None = None  # of a segment, the first positions go into the memory; None: all
    clamp_len: Distance = -1  # greater distances count as this one; -1: none is
    context: int = 65536  # nothing in the architecture limits it
    usual_context: ClassVar[int] = 512  # of its training
    head: str | None = "language_model"  # None: no head

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {
    "xlnet-base-cased": XLNetConfig(d_model=768, n_layer=12, n_head=12, d_ff=3072, mem_len=None),
    "xlnet-large-cased": XLNetConfig(mem_len=None),
}


class Block(Module):
    def __init__(self, c: XLNetConfig) -> None:
        self.attention = RelativeAttention(c.d_model, c.n_head)
        self.attention_norm = LayerNorm(c.d_model, c.eps)
        self.mlp = MLP(c.d_model, c.d_ff, c.activation)
        self.mlp_norm = LayerNorm(c.d_model, c.eps)

    def __call__(self, xs: Sequence[Any], memory: Array | None, distances: Array, streams: Sequence[Stream]) -> list[Any]:
        """The streams, h first; memory (B, M, C) or None; distances (P, C)."""
        a = self.attention
        states = xs[0] if memory is None else after(memory, xs[0])
        keys, values, r = a.heads(a.k(states)), a.heads(a.v(states)), a.heads(a.r(distances))
        xs = [self.attention_norm(a(x, keys, values, r, stream)) for x, stream in zip(xs, streams, strict=True)]
        return [self.mlp_norm(self.mlp(x, residual=x)) for x in xs]


class XLNet(CausalLM):
    """Inputs of every call: ids (B, T). mems: what `run` returned for earlier tokens, a list of (B, M, C) for each layer. perm_mask
    (B, T, T): not 0 where the query (axis 1) must not see the key. target_mapping (B, N, T): row n has a 1 at the position that is
    asked, or is all 0; no position twice. mask (B, T): 0 is padding. segments (B, T) integers; those of memories are 0.
    All of these are NumPy arrays; memories of a model on a device are there."""

    ties = "they take two streams and the distances that all share"

    def __init__(self, config: XLNetConfig) -> None:
        c = self.config = check_config(config)
        if c.d_model % c.n_head or c.d_model % 2:
            raise ValueError(f"[config] d_model must be even and a multiple of n_head, got {c.d_model} and {c.n_head}.")
        if type(c.clamp_len) is not int or not -(1 << 31) < c.clamp_len < 1 << 31:
            raise ValueError(f"[config] clamp_len must be an integer of 32 bits, got {c.clamp_len!r:.60}.")
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.mask_embedding = Embedding(1, c.d_model)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.head = None  # tied
        self.head_bias = None if c.head is None else parameter(c.vocab_size)

    def run(
        self,
        ids: Any,
        *,
        mems: Sequence[Array] | None = None,
        perm_mask: Any = None,
        target_mapping: Any = None,
        mask: Any = None,
        segments: Any = None,
    ) -> tuple[Any, list[Array]]:
        """The last states, of g (B, N, C) if something is asked, else of h (B, T, C); and the memories for what follows."""
        ids = as_ids("ids", ids)
        B, T = ids.shape
        x = self.token_embedding(ids)
        mems = None if mems is None else mems_of(mems, self.config.n_layer, data(x))
        M = 0 if mems is None else mems[0].shape[1]
        hidden = hidden_from(B, T, M, self.config.attn_type == "uni", perm_mask, mask)
        if segments is not None:
            segments = as_ids("segments", segments, ids.shape)
        key_segments = None if segments is None else np.concatenate([np.zeros((B, M), np.int32), segments], 1)
        starts = np.repeat(np.arange(T, 0, -1, dtype=np.int32)[None], B, 0)
        own = None if hidden is None else hidden & ~np.eye(T, M + T, M, dtype=bool)
        streams, xs = [Stream(starts, scores_of(own), segments, key_segments)], [x]
        if target_mapping is not None:
            at, asked = positions_of(target_mapping, B, T)
            rows = np.arange(B)[:, None]
            seen = scores_of(None if hidden is None else hidden[rows, at])
            if not asked.all():  # nothing is asked: it sees nothing, and gets nothing
                seen = np.zeros((*at.shape, M + T), np.float32) if seen is None else seen
                seen[~asked] = -np.inf
            streams.append(Stream(starts[rows, at], seen, None if segments is None else segments[rows, at], key_segments))
            xs.append(self.mask_embedding(np.zeros(at.shape, np.int32)))
        streams = [stream.to(self.device) for stream in streams]
        distances, kept = as_states(distances_of(T, M + T, self.config.d_model, self.config.clamp_len), data(x)), []
        for layer, block in enumerate(self.blocks):
            memory = None if mems is None else mems[layer]
            kept.append(kept_of(data(xs[0]), memory, self.config))
            xs = block(xs, memory, distances, streams)
        return xs[-1], kept

    def _run(self, ids: Any, cache: Any, last: bool = False) -> Any:
        return self.run(ids)[0]

    @property
    def predicts_next(self) -> bool:
        """Whether targets may be the next tokens with nothing else said: not if the queries see these."""
        return bool(self.config.attn_type == "uni")

    def __call__(self, ids: Any, cache: Any = None, **given: Any) -> Tensor:
        """The logits of `run`'s states: (B, N, V) or (B, T, V)."""
        if cache is not None:
            raise ValueError("[xlnet] cache must be None here: logits(ids, cache, last=True) gives the next token.")
        return self._project(self.run(ids, **given)[0])

    def logits(self, ids: Any, cache: Any = None, last: bool = False, **given: Any) -> Array:
        """As the call, but nothing is recorded. With a cache and last=True: (B, V), of the token after ids."""
        with no_grad():
            if cache is None:
                out = host_float(data(self(ids, **given)))
                return out[:, -1] if last else out
            if not last or given:
                raise ValueError(
                    "[xlnet] last must be True with a cache, and nothing else given: only the next token is predicted."
                )
            return self._next(as_ids("ids", ids), cache)

    def logits_and_mems(self, ids: Any, **given: Any) -> tuple[Array, list[Array]]:
        """`logits`, and the memories that the next call takes as its mems."""
        with no_grad():
            x, mems = self.run(ids, **given)
            return host_float(data(self._project(x))), mems

    def loss(self, ids: Any, targets: Any, ignore_index: int = -100, **given: Any) -> Tensor:
        """Mean cross-entropy. targets: (B, N) the tokens asked for by target_mapping, or (B, T) without it; -100 is left out, 0
        where there is nothing else."""
        x, _ = self.run(ids, **given)
        wanted = labels_of(targets, x.shape[:2]).reshape(-1)
        rows = np.flatnonzero(wanted != ignore_index)
        if len(rows) == 0:  # one row, which counts for nothing
            rows = np.zeros(1, np.int64)
        x = ops.embedding(rows, ops.reshape(x, (-1, x.shape[-1])))
        loss: Tensor = ops.cross_entropy(self._project(x), wanted[rows], ignore_index)
        return loss

    def new_cache(self, batch: int, capacity: int, dtype: str | None = None) -> Any:
        """The memories of `batch` sequences, hidden states in float32. They grow: the capacity is not needed, nor a dtype."""
        return Memories([Row() for _ in range(batch)])

    def _next(self, ids: Array, cache: Memories) -> Array:
        """As transformers generates: the last token is read again with the new ones, and a dummy that nobody sees is asked. Sequences
        with memories of the same length are run together."""
        if len(ids) != len(cache.rows):
            raise ValueError(f"[cache] ids must have as many sequences as the cache, {len(cache.rows)}, got {len(ids)}.")
        out = np.empty((len(ids), self.config.vocab_size), np.float32)
        lengths = [-1 if row.mems is None else row.mems[0].shape[1] for row in cache.rows]
        for length in sorted(set(lengths)):
            chosen = [i for i, n in enumerate(lengths) if n == length]
            rows = [cache.rows[i] for i in chosen]
            new = np.stack([[*row.last, *ids[i], 0] for i, row in zip(chosen, rows, strict=True)]).astype(np.int32)
            mems = None
            if length >= 0:
                mems = [joined(layer, 0)[:, :-2] for layer in zip(*(row.mems or [] for row in rows), strict=True)]
            B, T = new.shape
            perm_mask, asked = np.zeros((B, T, T), bool), np.zeros((B, 1, T), bool)
            perm_mask[:, :, -1] = asked[:, 0, -1] = True
            x, kept = self.run(new, mems=mems, perm_mask=perm_mask, target_mapping=asked)
            out[chosen] = host_float(data(self._project(x)))[:, 0]
            for b, row in enumerate(rows):
                row.mems, row.last = [layer[b : b + 1] for layer in kept], [int(new[b, -2])]
                row.length += ids.shape[1]
        return out

    def _project(self, x: Any) -> Tensor:
        if self.head_bias is None:
            raise ValueError("[xlnet] this XLNet has no head: it gives hidden states (run), no logits and no loss.")
        logits: Tensor = ops.linear(x, self.token_embedding.weight, self.head_bias)
        return logits


Config, Model = XLNetConfig, XLNet

HF_TYPE = "xlnet"
HF_CLASS = {None: "XLNetModel", "language_model": "XLNetLMHeadModel"}
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_inner": "d_ff",
    "ff_activation": "activation",
    "attn_type": "attn_type",
    "layer_norm_eps": "eps",
    "mem_len": "mem_len",
    "reuse_len": "reuse_len",
    "clamp_len": "clamp_len",
}
HF_VALUES = {
    "activation": {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"},
    "attn_type": {"bi": "bi", "uni": "uni"},
}
HF_FIXED = {"bi_data": False, "same_length": False, "untie_r": True, "tie_word_embeddings": True}
# fmt: off
HF_IGNORED: tuple[str, ...] = (
    "dropout", "use_mems_eval", "use_mems_train", "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout",
    "start_n_top", "end_n_top", "max_position_embeddings", "init", "init_range", "init_std",
)
# fmt: on
BLOCK_NAMES = {
    **{f"attention.{part}.weight": f"rel_attn.{part}" for part in "qkvr"},
    "attention.out.weight": "rel_attn.o",
    "attention.content_bias": "rel_attn.r_w_bias",
    "attention.position_bias": "rel_attn.r_r_bias",
    "attention.segment_bias": "rel_attn.r_s_bias",
    "attention.segment_embedding": "rel_attn.seg_embed",
    "attention_norm": "rel_attn.layer_norm",
    "mlp.up": "ff.layer_1",
    "mlp.down": "ff.layer_2",
    "mlp_norm": "ff.layer_norm",
}
HF_NAMES = {
    "token_embedding": "transformer.word_embedding",
    "mask_embedding.weight": "transformer.mask_emb",
    **{f"blocks.{{}}.{ours}": f"transformer.layer.{{}}.{theirs}" for ours, theirs in BLOCK_NAMES.items()},
}
HF_HEADS = {"language_model": {"head_bias": "lm_loss.bias"}}
HF_TRANSPOSED: tuple[str, ...] = tuple(f"attention.{part}.weight" for part in "qkvr")
HF_TIED = {"lm_loss.weight": "transformer.word_embedding.weight"}
HF_IGNORED_TENSORS = (r"lm_loss\..*",)
HF_PREFIX = "transformer."


def hf_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths of 0 mean none; d_head is d_model / n_head, and n_token an older name."""
    raw = {k: None if k in ("mem_len", "reuse_len") and v == 0 else v for k, v in raw.items()}
    if "n_token" in raw:
        raw.setdefault("vocab_size", raw["n_token"])
        del raw["n_token"]
    default = XLNetConfig()
    d_model, n_head = raw.get("d_model", default.d_model), raw.get("n_head", default.n_head)
    if type(d_model) is not int or type(n_head) is not int or n_head < 1:
        raise ValueError(
            f"config.json of model_type 'xlnet': d_model / n_head must be integers, got {d_model!r:.60} / {n_head!r:.60}."
        )
    width = d_model // n_head
    if raw.pop("d_head", None) not in (None, width):
        raise ValueError(f"config.json of model_type 'xlnet': 'd_head' must be d_model / n_head = {width}.")
    return raw


def hf_read(tensors: Mapping[str, Any], config: XLNetConfig) -> dict[str, Any]:
    """Theirs hold heads and their width as two axes; ours are matrices, and vectors for biases and segments."""
    out = dict(tensors)
    for name, array in tensors.items():
        if name.endswith("mask_emb") and array.ndim == 3:
            out[name] = array.reshape(1, -1)
        elif ".rel_attn." in name and array.ndim in (2, 3):
            vector = name.endswith(("_bias", "seg_embed"))
            out[name] = array.reshape(-1) if vector else array.reshape(len(array), -1)
    return out


def hf_write(tensors: Mapping[str, Any], model: XLNet) -> dict[str, Any]:
    c, out = model.config, dict(tensors)
    for name, array in tensors.items():
        if name.endswith("mask_emb"):
            out[name] = array.reshape(1, 1, -1)
        elif ".rel_attn." in name and "layer_norm" not in name:
            out[name] = array.reshape(*((2,) if name.endswith("seg_embed") else array.shape[:-1]), c.n_head, c.head_dim)
    return out
