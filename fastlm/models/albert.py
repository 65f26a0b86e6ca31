"""ALBERT. Lan et al. 2019, arXiv:1909.11942. BERT with a narrow embedding and layers that share their parameters in groups.

ids -> norm(token + segment + position) -> project -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastlm.backend import Array
from fastlm.models import bert, heads
from fastlm.models.base import check_config
from fastlm.models.bert import Block, Embeddings
from fastlm.models.encoder import Encoder
from fastlm.nn import Context, Linear, Module


@dataclass(frozen=True)
class AlbertConfig:
    vocab_size: int = 30000
    context: int = 512
    n_segment: int = 2
    d_embedding: int = 128
    d_model: int = 4096
    n_layer: int = 12
    n_group: int = 1  # layers of one group share their parameters, see `group_of`
    n_inner: int = 1  # blocks that a layer goes through
    n_head: int = 64
    d_ff: int = 16384
    activation: str = "gelu_tanh"
    eps: float = 1e-12
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str | None = None


PRESETS = {
    "albert-base-v2": AlbertConfig(d_model=768, n_head=12, d_ff=3072),
    "albert-large-v2": AlbertConfig(d_model=1024, n_layer=24, n_head=16, d_ff=4096),
    "albert-xlarge-v2": AlbertConfig(d_model=2048, n_layer=24, n_head=16, d_ff=8192),
    "albert-xxlarge-v2": AlbertConfig(),
}

POOLED = ("pretraining", "sequence_classification", "multiple_choice", None)


def _masked(c: Any) -> heads.MaskedLM:
    return heads.MaskedLM(c.d_model, c.d_embedding, c.vocab_size, c.activation, c.eps)


HEADS = heads.STANDARD | {
    "masked_lm": _masked,
    "pretraining": lambda c: heads.Pretraining(_masked(c), heads.NextSentence(c.d_model, len(c.labels))),  # which came first
}


class Group(Module):
    """The blocks of a layer. times: layers that share them."""

    def __init__(self, c: AlbertConfig, times: int) -> None:
        self.times = times
        self.blocks = [Block(c) for _ in range(c.n_inner)]

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        for block in self.blocks:
            x = block(x, context, layer)
        return x


def group_of(layer: int, n_layer: int, n_group: int) -> int:
    """The group whose parameters a layer has. The reference divides twice, which rounds: of 18 layers in 14 groups the tenth, in
    whole numbers the first of group 7, is in 6."""
    return int(layer / (n_layer / n_group))


class Albert(Encoder):
    def __init__(self, config: AlbertConfig) -> None:
        c = self.config = check_config(config)
        self.embeddings = Embeddings(c.vocab_size, c.context, c.n_segment, c.d_embedding, c.eps)
        self.project = Linear(c.d_embedding, c.d_model)
        self.group_of = [group_of(layer, c.n_layer, c.n_group) for layer in range(c.n_layer)]
        self.groups = [Group(c, self.group_of.count(group)) for group in range(c.n_group)]
        self.pooler = heads.Summary(c.d_model, "tanh") if c.head in POOLED else None
        self.head = heads.make(HEADS, c)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.project(self.embeddings(ids, context.places, context.segments))
        for layer, group in enumerate(self.group_of):
            x = self.groups[group](x, context, layer)
        return x


Config, Model = AlbertConfig, Albert

HF_TYPE = "albert"
HF_CLASS = {
    None: "AlbertModel",
    "masked_lm": "AlbertForMaskedLM",
    "pretraining": "AlbertForPreTraining",
    "sequence_classification": "AlbertForSequenceClassification",
    "token_classification": "AlbertForTokenClassification",
    "question_answering": "AlbertForQuestionAnswering",
    "multiple_choice": "AlbertForMultipleChoice",
}
HF_CONFIG = bert.HF_CONFIG | {"embedding_size": "d_embedding", "num_hidden_groups": "n_group", "inner_group_num": "n_inner"}
HF_VALUES = bert.HF_VALUES
HF_FIXED = {"position_embedding_type": "absolute", "tie_word_embeddings": True}
HF_IGNORED = (
    *bert.HF_IGNORED,
    "classifier_dropout_prob",
    "down_scale_factor",
    "gap_size",
    "net_structure_type",
    "num_memory_blocks",
)
_inner = {
    "attention.q": "attention.query",
    "attention.k": "attention.key",
    "attention.v": "attention.value",
    "attention.out": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "mlp.up": "ffn",
    "mlp.down": "ffn_output",
    "mlp_norm": "full_layer_layer_norm",
}
HF_NAMES = {
    "embeddings.tokens": "albert.embeddings.word_embeddings",
    "embeddings.positions": "albert.embeddings.position_embeddings",
    "embeddings.segments": "albert.embeddings.token_type_embeddings",
    "embeddings.norm": "albert.embeddings.LayerNorm",
    "project": "albert.encoder.embedding_hidden_mapping_in",
    **{
        f"groups.{{}}.blocks.{{}}.{k}": f"albert.encoder.albert_layer_groups.{{}}.albert_layers.{{}}.{v}" for k, v in _inner.items()
    },
    "pooler.dense": "albert.pooler",
}
_predictions = {"dense": "predictions.dense", "norm": "predictions.LayerNorm", "bias": "predictions.bias"}
HF_HEADS = {
    "masked_lm": {f"head.{k}": v for k, v in _predictions.items()},
    "pretraining": {f"head.tokens.{k}": v for k, v in _predictions.items()} | {"head.sentences.out": "sop_classifier.classifier"},
    "sequence_classification": {"head.out": "classifier"},
    "token_classification": {"head.out": "classifier"},
    "question_answering": {"head.out": "qa_outputs"},
    "multiple_choice": {"head.out": "classifier"},
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_TIED = {"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight", "predictions.decoder.bias": "predictions.bias"}
HF_RENAMED = bert.HF_RENAMED
HF_IGNORED_TENSORS = (r"albert\.embeddings\.position_ids", r"albert\.pooler\..*", r"predictions\..*", r"sop_classifier\..*")
HF_PREFIX = "albert."
