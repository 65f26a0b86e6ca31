"""DistilBERT. Sanh et al. 2019, arXiv:1910.01108. BERT with half the layers, no segments and no pooler.

ids -> norm(token + position) -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastlm.backend import Array
from fastlm.models import bert, heads
from fastlm.models.base import check_config
from fastlm.models.bert import Block, Embeddings
from fastlm.models.encoder import Encoder
from fastlm.nn import Context


@dataclass(frozen=True)
class DistilBertConfig:
    vocab_size: int = 30522
    context: int = 512
    d_model: int = 768
    n_layer: int = 6
    n_head: int = 12
    d_ff: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str | None = None


PRESETS = {
    "distilbert-base-uncased": DistilBertConfig(),
    "distilbert-base-cased": DistilBertConfig(vocab_size=28996),
}

HEADS = heads.STANDARD | {
    "sequence_classification": lambda c: heads.SequenceClassifier(
        c.d_model, len(c.labels), heads.Summary(c.d_model, "relu"), c.problem
    ),
    "multiple_choice": lambda c: heads.MultipleChoice(c.d_model, heads.Summary(c.d_model, "relu")),
}


class DistilBert(Encoder):
    def __init__(self, config: DistilBertConfig) -> None:
        c = self.config = check_config(config)
        self.embeddings = Embeddings(c.vocab_size, c.context, None, c.d_model, c.eps)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.pooler = None
        self.head = heads.make(HEADS, c)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.embeddings(ids, context.places, context.segments)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return x


Config, Model = DistilBertConfig, DistilBert

HF_TYPE = "distilbert"
HF_CLASS = {
    None: "DistilBertModel",
    "masked_lm": "DistilBertForMaskedLM",
    "sequence_classification": "DistilBertForSequenceClassification",
    "token_classification": "DistilBertForTokenClassification",
    "question_answering": "DistilBertForQuestionAnswering",
    "multiple_choice": "DistilBertForMultipleChoice",
}
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "dim": "d_model",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "hidden_dim": "d_ff",
    "activation": "activation",
    "problem_type": "problem",
}
HF_VALUES = bert.HF_VALUES
HF_FIXED = {"tie_word_embeddings": True}
# fmt: off
HF_IGNORED = (
    "attention_dropout", "dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_", "pruned_heads",
    "torchscript", "use_bfloat16",
)
# fmt: on
HF_NAMES = {
    "embeddings.tokens": "distilbert.embeddings.word_embeddings",
    "embeddings.positions": "distilbert.embeddings.position_embeddings",
    "embeddings.norm": "distilbert.embeddings.LayerNorm",
    "blocks.{}.attention.q": "distilbert.transformer.layer.{}.attention.q_lin",
    "blocks.{}.attention.k": "distilbert.transformer.layer.{}.attention.k_lin",
    "blocks.{}.attention.v": "distilbert.transformer.layer.{}.attention.v_lin",
    "blocks.{}.attention.out": "distilbert.transformer.layer.{}.attention.out_lin",
    "blocks.{}.attention_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
    "blocks.{}.mlp.up": "distilbert.transformer.layer.{}.ffn.lin1",
    "blocks.{}.mlp.down": "distilbert.transformer.layer.{}.ffn.lin2",
    "blocks.{}.mlp_norm": "distilbert.transformer.layer.{}.output_layer_norm",
}
HF_HEADS = {
    "masked_lm": {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head.bias": "vocab_projector.bias"},
    "sequence_classification": {"head.summary.dense": "pre_classifier", "head.out": "classifier"},
    "token_classification": {"head.out": "classifier"},
    "question_answering": {"head.out": "qa_outputs"},
    "multiple_choice": {"head.summary.dense": "pre_classifier", "head.out": "classifier"},
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_TIED = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
HF_IGNORED_TENSORS = (r"distilbert\.embeddings\.position_ids", r"vocab_(transform|layer_norm|projector)\..*")
HF_PREFIX = "distilbert."
