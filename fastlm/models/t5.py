"""T5: v1.0, and v1.1 with what has its wiring (Flan-T5). Raffel et al. 2020, arXiv:1910.10683.

RMS norm before each part and at the end of each stack, no biases anywhere, scores not scaled by 1/sqrt(d). One table of biases by
relative position a stack, read in its first layer and shared by all. v1.0: ReLU, head tied to the embedding, states x d_model^-0.5
before it. v1.1: gated GELU (tanh), head of its own, unscaled.

    source -> embedding -> [ x += attention(norm(x)); x += mlp(norm(x)) ] * n_encoder_layer -> norm -> memory
    ids -> embedding -> [ x += attention(norm(x)); x += cross_attention(norm(x), memory); x += mlp(norm(x)) ] * n_layer -> norm -> head
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import Id, check_config
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.nn import MLP, Attention, Context, CrossAttention, Embedding, GatedMLP, Linear, Module, RMSNorm, make_fast, parameter
from fastlm.nn.attention import CAUSAL, EVERYTHING, Sees
from fastlm.tensor import Tensor


@dataclass(frozen=True)
class T5Config:
    vocab_size: int = 32128
    d_model: int = 512
    d_ff: int = 2048
    n_layer: int = 6  # of the decoder
    n_encoder_layer: int = 6
    n_head: int = 8
    head_dim: int = 64
    n_bucket: int = 32
    max_distance: int = 128
    activation: str = "relu"  # or "gated-gelu_tanh" and other gated forms
    eps: float = 1e-6
    tied: bool = True  # the head is the embedding
    scaled: bool = True  # states x d_model^-0.5 before the head
    start: Id = 0  # the decoder's first id: pad
    context: int = 1 << 20  # relative positions set no limit; this bounds generation
    usual_context: ClassVar[int] = 512  # of its training

    @property
    def n_kv_head(self) -> int:
        return self.n_head


def _first(d_model: int, d_ff: int, n_layer: int, n_head: int, head_dim: int = 64) -> T5Config:
    return T5Config(32128, d_model, d_ff, n_layer, n_layer, n_head, head_dim)


def _second(d_model: int, d_ff: int, n_layer: int, n_head: int) -> T5Config:
    return T5Config(32128, d_model, d_ff, n_layer, n_layer, n_head, 64, activation="gated-gelu_tanh", tied=False, scaled=False)


_SECOND = {
    "small": _second(512, 1024, 8, 6),
    "base": _second(768, 2048, 12, 12),
    "large": _second(1024, 2816, 24, 16),
    "xl": _second(2048, 5120, 24, 32),
    "xxl": _second(4096, 10240, 24, 64),
}
PRESETS = {
    "t5-small": _first(512, 2048, 6, 8),
    "t5-base": _first(768, 3072, 12, 12),
    "t5-large": _first(1024, 4096, 24, 16),
    "t5-3b": _first(1024, 16384, 24, 32, 128),
    "t5-11b": _first(1024, 65536, 24, 128, 128),
    **{f"t5-v1.1-{size}": config for size, config in _SECOND.items()},
    **{f"flan-t5-{size}": config for size, config in _SECOND.items()},
}


def buckets(queries: Array, keys: Array, count: int, max_distance: int, both: bool) -> Array:
    """The bucket of every (query, key) pair, (T, S) int32: exact for near keys, logarithmic up to max_distance, then the last.

    both: half of the buckets for keys after the query; else these share bucket 0. In float32 as the reference computes it.
    """
    distance = keys[None, :].astype(np.int64) - queries[:, None]
    offset = np.zeros(distance.shape, np.int64)
    if both:
        count //= 2
        offset = (distance > 0) * count
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (ratio * np.float32(count - exact)).astype(np.int64), count - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePosition(Module):
    """The table of biases that a stack's self-attention shares: positions (T,) or (B, T) -> (1 or B, H, T, S) for keys 0 .. S - 1."""

    def __init__(self, c: T5Config, both: bool) -> None:
        if c.n_bucket < 4:
            raise ValueError(f"[config] n_bucket must be at least 4, so that each direction has two, got {c.n_bucket}.")
        exact = c.n_bucket // (4 if both else 2)
        if c.max_distance <= exact:  # there the logarithm of the reference's rule changes its sign
            raise ValueError(
                f"[config] max_distance must be greater than {exact}, the distances that have a bucket each of n_bucket = {c.n_bucket}, "
                f"got {c.max_distance}."
            )
        self.weight = parameter(c.n_bucket, c.n_head, std=c.d_model**-0.5)
        self.center = c.max_distance
        keys = np.arange(c.max_distance * (2 if both else 1) + 1)  # beyond max_distance all is one bucket
        self.buckets = buckets(keys[self.center : self.center + 1], keys, c.n_bucket, c.max_distance, both)[0]

    def __call__(self, positions: Array, keys: int) -> Any:
        return ops.distance_bias(self.buckets, self.weight, positions, keys, self.center)


def attention(kind: type[Attention], c: T5Config, sees: Sees) -> Attention:
    """With the reference's distribution: the missing 1 / sqrt(head_dim) is in the queries' first weights."""
    width = c.n_head * c.head_dim
    part = kind(c.d_model, c.n_head, head_dim=c.head_dim, sees=sees, scale=1.0, std=c.d_model**-0.5, out_std=width**-0.5)
    part.q.weight = parameter(width, c.d_model, std=(c.d_model * c.head_dim) ** -0.5)
    return part


def mlp(c: T5Config, out_std: float | None = None) -> MLP | GatedMLP:
    """Likewise: 1 / sqrt of what is summed over, unless out_std says else."""
    gated, _, activation = c.activation.rpartition("-")
    part: MLP | GatedMLP
    if gated:
        part = GatedMLP(c.d_model, c.d_ff, activation, out_std=out_std or c.d_ff**-0.5)
        part.gate.weight = parameter(c.d_ff, c.d_model, std=c.d_model**-0.5)
    else:
        part = MLP(c.d_model, c.d_ff, activation, bias=False, out_std=out_std or c.d_ff**-0.5)
    part.up.weight = parameter(c.d_ff, c.d_model, std=c.d_model**-0.5)
    return part


class EncoderBlock(Module):
    def __init__(self, c: T5Config, feed_forward: Module | None = None) -> None:
        self.attention = attention(Attention, c, EVERYTHING)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.mlp: Module = feed_forward or mlp(c)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        make_fast(self.attention, self.mlp)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.feed_forward(x, context)

    def feed_forward(self, x: Any, context: Context) -> Any:
        return self.mlp(self.mlp_norm(x), residual=x)


class DecoderBlock(Module):
    def __init__(self, c: T5Config, feed_forward: Module | None = None) -> None:
        self.attention = attention(Attention, c, CAUSAL)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.cross = attention(CrossAttention, c, EVERYTHING)
        self.cross_norm = RMSNorm(c.d_model, c.eps)
        self.mlp: Module = feed_forward or mlp(c)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        x = self.cross(self.cross_norm(x), context, layer, residual=x)
        return self.feed_forward(x, context)

    def feed_forward(self, x: Any, context: Context) -> Any:
        return self.mlp(self.mlp_norm(x), residual=x)


class Stack(Module):
    """Blocks with one position table, and the norm after them."""

    def __init__(self, c: T5Config, blocks: list[Any], both: bool) -> None:
        self.position = RelativePosition(c, both)
        self.blocks = blocks
        self.final_norm = RMSNorm(c.d_model, c.eps)

    def __call__(self, x: Any, context: Context) -> Any:
        # Relative positions know no padding: a row of the cache that is shorter is a query that stands earlier.
        context.add_bias(self.position(context.queries, context.end))
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


class T5(EncoderDecoder):
    def __init__(self, config: T5Config) -> None:
        c = self.config = check_config(config)
        self.token_embedding = Embedding(c.vocab_size, c.d_model, std=1.0)
        self.encoder = Stack(c, [EncoderBlock(c) for _ in range(c.n_encoder_layer)], both=True)
        self.decoder = Stack(c, [DecoderBlock(c) for _ in range(c.n_layer)], both=False)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def encode_hidden(self, ids: Array, context: Context) -> Any:
        return self.encoder(self.token_embedding(ids), context)

    def decode_hidden(self, ids: Array, context: Context) -> Any:
        return self.decoder(self.token_embedding(ids), context)

    def head_weight(self) -> Tensor:
        return self.token_embedding.weight if self.head is None else self.head.weight

    def head_scale(self) -> float:
        return float(self.config.d_model**-0.5) if self.config.scaled else 1.0


Config, Model = T5Config, T5

HF_TYPE, HF_CLASS = "t5", "T5ForConditionalGeneration"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "d_kv": "head_dim",
    "num_layers": "n_encoder_layer",
    "num_decoder_layers": "n_layer",
    "num_heads": "n_head",
    "relative_attention_num_buckets": "n_bucket",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
    "feed_forward_proj": "activation",
    "tie_word_embeddings": "tied",
    "scale_decoder_outputs": "scaled",
    "decoder_start_token_id": "start",
}
HF_VALUES = {
    "activation": {"relu": "relu", "gelu": "gelu", "gated-gelu": "gated-gelu_tanh", "gated-silu": "gated-silu", "silu": "silu"}
}
HF_FIXED: dict[str, Any] = {"is_encoder_decoder": True}
# fmt: off
HF_IGNORED = (
    "dropout_rate", "classifier_dropout", "initializer_factor", "n_positions", "is_gated_act", "dense_act_fn", "is_decoder",
)
# fmt: on
_BLOCK = "{0}.block.{{}}.layer.{1}"
HF_NAMES = {
    "token_embedding": "shared",
    "encoder.position": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder.position": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder.final_norm": "encoder.final_layer_norm",
    "decoder.final_norm": "decoder.final_layer_norm",
    "head": "lm_head",
}
for _stack, _parts in {"encoder": ("attention", "mlp"), "decoder": ("attention", "cross", "mlp")}.items():
    for _number, _part in enumerate(_parts):
        _ours, _theirs = f"{_stack}.blocks.{{}}.{_part}", _BLOCK.format(_stack, _number)
        HF_NAMES[f"{_ours}_norm"] = f"{_theirs}.layer_norm"
        if _part == "mlp":
            for _name, _wi in {"gate": "wi_0", "up": "wi", "down": "wo"}.items():
                HF_NAMES[f"{_ours}.{_name}"] = f"{_theirs}.DenseReluDense.{_wi}"
        else:
            _module = "SelfAttention" if _part == "attention" else "EncDecAttention"
            for _name, _letter in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
                HF_NAMES[f"{_ours}.{_name}"] = f"{_theirs}.{_module}.{_letter}"
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)  # in old files, never read
HF_PREFIX = ""
HF_TIED = {f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Both forms of v1.1: tie_word_embeddings false says "unscaled" (and untied, see hf_found); transformers 5 writes
    scale_decoder_outputs beside tie_word_embeddings true."""
    raw = dict(raw)
    if not isinstance(raw.get("scale_decoder_outputs"), bool):
        raw["scale_decoder_outputs"] = raw.get("tie_word_embeddings") is not False
    for theirs, default in {"num_layers": 6, "decoder_start_token_id": 0, "vocab_size": 32128}.items():
        if raw.get(theirs) is None:
            raw[theirs] = default
    if raw.get("num_decoder_layers") is None:
        raw["num_decoder_layers"] = raw["num_layers"]
    return raw


def hf_found(raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as its weights show it: whether the head is one of its own is said by them alone, in either form."""
    raw = hf_defaults(dict(raw))
    head, shared = tensors.get("lm_head.weight"), tensors.get("shared.weight")
    raw["tie_word_embeddings"] = head is None or (shared is not None and np.array_equal(np.asarray(head), np.asarray(shared)))
    return raw


def hf_read(tensors: Mapping[str, Any], config: T5Config) -> dict[str, Any]:
    """`wi_1` of a gated feed-forward is its `up`, which the others call `wi`. ValueError where the stacks read embeddings of their own,
    as an untied Switch of the reference does that was trained from the start; published ones have copies of the shared one."""
    shared = tensors.get("shared.weight")
    own = [n for n in list(HF_TIED)[:2] if n in tensors and (shared is None or not np.array_equal(tensors[n], shared))]
    if own:
        raise ValueError(
            f"the weights have {', '.join(own)} that differ from shared.weight: fastlm has one embedding for both stacks."
        )
    return {name.replace(".wi_1.", ".wi."): tensor for name, tensor in tensors.items()}


def hf_write(tensors: Mapping[str, Any], model: T5) -> dict[str, Any]:
    gated = model.config.activation.startswith("gated-")
    return {k.replace(".wi.", ".wi_1.") if gated else k: v for k, v in tensors.items()}
