"""BERT. Devlin et al. 2018, arXiv:1810.04805.

Learned positions and segments, layer norm after each residual sum, GELU (erf), a tanh pooler over the first token.

    ids -> norm(token + segment + position) -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> head
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import heads
from fastlm.models.base import check_config
from fastlm.models.encoder import Encoder
from fastlm.nn import EVERYTHING, MLP, Attention, Context, Embedding, LayerNorm, Module, make_fast


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30522
    context: int = 512
    n_segment: int = 2
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_ff: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    head: str | None = None  # see heads.py
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str | None = None


_large = BertConfig(d_model=1024, n_layer=24, n_head=16, d_ff=4096)
PRESETS = {
    "bert-base-uncased": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-large-uncased": _large,
    "bert-large-cased": replace(_large, vocab_size=28996),
    "all-minilm-l6-v2": BertConfig(d_model=384, n_layer=6, d_ff=1536),
}


class Embeddings(Module):
    """norm(token + segment + position); without segments where n_segment is None."""

    def __init__(self, vocab_size: int, context: int, n_segment: int | None, d_model: int, eps: float) -> None:
        self.tokens = Embedding(vocab_size, d_model)
        self.positions = Embedding(context, d_model)
        self.segments = None if n_segment is None else Embedding(n_segment, d_model)
        self.norm = LayerNorm(d_model, eps)
        self.context = context

    def __call__(self, ids: Array, positions: Array, segments: Array | None) -> Any:
        """ids (B, T), positions (T,) or (B, T) -> (B, T, d_model)."""
        last = int(positions.max()) if isinstance(positions, np.ndarray) else positions.shape[-1] - 1
        if last >= self.context:
            raise ValueError(f"[model] ids must end within {self.context} positions, got position {last}.")
        where = self.positions(positions)
        if self.segments is not None:
            kinds = np.zeros(positions.shape, np.int32) if segments is None else segments
            where = ops.add(self.segments(kinds), where)
        elif segments is not None:
            raise ValueError("[model] segments must be None: this model has none.")
        return self.norm(ops.add(self.tokens(ids), where))


class Block(Module):
    """Attention and MLP, each followed by its norm. c: n_head, d_model, d_ff, activation, eps."""

    def __init__(self, c: Any) -> None:
        self.attention = Attention(c.d_model, c.n_head, bias=True, sees=EVERYTHING)
        self.attention_norm = LayerNorm(c.d_model, c.eps)
        self.mlp = MLP(c.d_model, c.d_ff, c.activation)
        self.mlp_norm = LayerNorm(c.d_model, c.eps)
        make_fast(self.attention, self.mlp)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention_norm(self.attention(x, context, layer, residual=x))
        return self.mlp_norm(self.mlp(x, residual=x))


POOLED = ("pretraining", "next_sentence", "sequence_classification", "multiple_choice", None)  # heads that read the pooler
HEADS = heads.STANDARD | {
    "pretraining": lambda c: heads.Pretraining(heads.masked_lm(c), heads.NextSentence(c.d_model)),
    "next_sentence": lambda c: heads.NextSentence(c.d_model),
}


class Bert(Encoder):
    def __init__(self, config: BertConfig) -> None:
        c = self.config = check_config(config)
        self.embeddings = Embeddings(c.vocab_size, c.context, c.n_segment, c.d_model, c.eps)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.pooler = heads.Summary(c.d_model, "tanh") if c.head in POOLED else None
        self.head = heads.make(HEADS, c)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.embeddings(ids, context.places, context.segments)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return x


Config, Model = BertConfig, Bert

HF_TYPE = "bert"
HF_CLASS = {
    None: "BertModel",
    "masked_lm": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "next_sentence": "BertForNextSentencePrediction",
    "sequence_classification": "BertForSequenceClassification",
    "token_classification": "BertForTokenClassification",
    "question_answering": "BertForQuestionAnswering",
    "multiple_choice": "BertForMultipleChoice",
}
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "type_vocab_size": "n_segment",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_ff",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
    "problem_type": "problem",
}
HF_VALUES = {
    "activation": {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
}
HF_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# fmt: off
HF_IGNORED: tuple[str, ...] = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "pruned_heads", "torchscript", "use_bfloat16",
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
)
# fmt: on
BLOCK_NAMES = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
HF_NAMES = {
    "embeddings.tokens": "bert.embeddings.word_embeddings",
    "embeddings.positions": "bert.embeddings.position_embeddings",
    "embeddings.segments": "bert.embeddings.token_type_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    **{f"blocks.{{}}.{ours}": f"bert.encoder.layer.{{}}.{theirs}" for ours, theirs in BLOCK_NAMES.items()},
    "pooler.dense": "bert.pooler.dense",
}
_masked = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "bias": "cls.predictions.bias",
}
HF_HEADS = {
    "masked_lm": {f"head.{k}": v for k, v in _masked.items()},
    "pretraining": {f"head.tokens.{k}": v for k, v in _masked.items()} | {"head.sentences.out": "cls.seq_relationship"},
    "next_sentence": {"head.out": "cls.seq_relationship"},
    "sequence_classification": {"head.out": "classifier"},
    "token_classification": {"head.out": "classifier"},
    "question_answering": {"head.out": "qa_outputs"},
    "multiple_choice": {"head.out": "classifier"},
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
HF_RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))  # files made from TensorFlow's
# Buffers, and the parts of a pre-trained file that a head does not use: transformers leaves them out too.
HF_IGNORED_TENSORS = (r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\..*")
HF_PREFIX = "bert."
