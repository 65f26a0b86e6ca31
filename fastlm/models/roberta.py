"""RoBERTa. Liu et al. 2019, arXiv:1907.11692. BERT whose positions count the tokens that are no padding, from pad + 1 on.

ids -> norm(token + segment + position) -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.backend import Array
from fastlm.models import bert, heads
from fastlm.models.base import Id, check_config
from fastlm.models.bert import Block, Embeddings
from fastlm.models.encoder import Encoder
from fastlm.nn import Context


@dataclass(frozen=True)
class RobertaConfig:
    vocab_size: int = 50265
    context: int = 512  # rows of the position table: a sequence may have context - pad - 1 tokens
    n_segment: int = 2
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_ff: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    pad: Id = 1
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str | None = None


PRESETS = {
    "roberta-base": RobertaConfig(context=514, n_segment=1, eps=1e-5),
    "roberta-large": RobertaConfig(context=514, n_segment=1, eps=1e-5, d_model=1024, n_layer=24, n_head=16, d_ff=4096),
}

POOLED = ("multiple_choice", None)
HEADS = heads.STANDARD | {
    "masked_lm": lambda c: heads.MaskedLM(c.d_model, c.d_model, c.vocab_size, "gelu", c.eps),
    "sequence_classification": lambda c: heads.SequenceClassifier(
        c.d_model, len(c.labels), heads.Summary(c.d_model, "tanh"), c.problem
    ),
}


class Roberta(Encoder):
    def __init__(self, config: RobertaConfig) -> None:
        c = self.config = check_config(config)
        self.embeddings = Embeddings(c.vocab_size, c.context, c.n_segment, c.d_model, c.eps)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.pooler = heads.Summary(c.d_model, "tanh") if c.head in POOLED else None
        self.head = heads.make(HEADS, c)

    @property
    def max_tokens(self) -> int:
        return int(self.config.context - self.config.pad - 1)

    def hidden(self, ids: Array, context: Context) -> Any:
        there = (ids != self.config.pad).astype(np.int32)
        positions = context.within(there) * there + np.int32(self.config.pad)
        x = self.embeddings(ids, positions, context.segments)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return x


Config, Model = RobertaConfig, Roberta

HF_TYPE = "roberta"
HF_CLASS = {
    None: "RobertaModel",
    "masked_lm": "RobertaForMaskedLM",
    "sequence_classification": "RobertaForSequenceClassification",
    "token_classification": "RobertaForTokenClassification",
    "question_answering": "RobertaForQuestionAnswering",
    "multiple_choice": "RobertaForMultipleChoice",
}
HF_CONFIG = bert.HF_CONFIG | {"pad_token_id": "pad"}
HF_VALUES = bert.HF_VALUES
HF_FIXED = bert.HF_FIXED
HF_IGNORED = bert.HF_IGNORED
HF_NAMES = {ours: theirs.replace("bert.", "roberta.", 1) for ours, theirs in bert.HF_NAMES.items()}
HF_HEADS = {
    "masked_lm": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.bias": "lm_head.bias"},
    "sequence_classification": {"head.summary.dense": "classifier.dense", "head.out": "classifier.out_proj"},
    "token_classification": {"head.out": "classifier"},
    "question_answering": {"head.out": "qa_outputs"},
    "multiple_choice": {"head.out": "classifier"},
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_TIED = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
HF_RENAMED = bert.HF_RENAMED
HF_IGNORED_TENSORS = (r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*", r"lm_head\..*")
HF_PREFIX = "roberta."
