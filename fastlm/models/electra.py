"""ELECTRA. Clark et al. 2020, arXiv:2003.10555. BERT with a narrow embedding and no pooler; pre-trained to find replaced tokens.

The discriminator has the head "replaced_token", the generator "masked_lm".

    ids -> norm(token + segment + position) -> project -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import bert, heads
from fastlm.models.base import as_ids, check_config
from fastlm.models.bert import Block, Embeddings
from fastlm.models.encoder import Encoder
from fastlm.nn import Context, Linear
from fastlm.ops import check
from fastlm.tensor import data, no_grad


@dataclass(frozen=True)
class ElectraConfig:
    vocab_size: int = 30522
    context: int = 512
    n_segment: int = 2
    d_embedding: int = 128
    d_model: int = 256
    n_layer: int = 12
    n_head: int = 4
    d_ff: int = 1024
    activation: str = "gelu"
    eps: float = 1e-12
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem: str | None = None


PRESETS = {
    "electra-small": ElectraConfig(),
    "electra-base": ElectraConfig(d_embedding=768, d_model=768, n_head=12, d_ff=3072),
    "electra-large": ElectraConfig(d_embedding=1024, d_model=1024, n_layer=24, n_head=16, d_ff=4096),
}

HEADS = heads.STANDARD | {
    "masked_lm": lambda c: heads.MaskedLM(c.d_model, c.d_embedding, c.vocab_size, "gelu", c.eps),
    "replaced_token": lambda c: heads.ReplacedToken(c.d_model, c.activation),
    "sequence_classification": lambda c: heads.SequenceClassifier(
        c.d_model, len(c.labels), heads.Summary(c.d_model, "gelu"), c.problem
    ),
    "multiple_choice": lambda c: heads.MultipleChoice(c.d_model, heads.Summary(c.d_model, "gelu")),
}


class Electra(Encoder):
    def __init__(self, config: ElectraConfig) -> None:
        c = self.config = check_config(config)
        self.embeddings = Embeddings(c.vocab_size, c.context, c.n_segment, c.d_embedding, c.eps)
        self.project = Linear(c.d_embedding, c.d_model) if c.d_embedding != c.d_model else None
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.pooler = None
        self.head = heads.make(HEADS, c)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.embeddings(ids, context.places, context.segments)
        if self.project is not None:
            x = self.project(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return x


def joint_loss(
    generator: Encoder, discriminator: Encoder, ids: Any, targets: Any, mask: Any = None, segments: Any = None, *, seed: int = 0,
    weight: float = 50.0, uniforms: Any = None,
) -> Any:  # fmt: skip
    """The generator's masked loss + weight * the discriminator's on the generator's samples; section 2 of the paper.

    ids (B, T) with masks in place, targets (B, T): the token that was there, -100 elsewhere. A sample that happens to be that token
    counts as original. Samples are drawn by the seed, or by uniforms (B, T), numbers from 0 to 1, a token each. Nothing flows back
    through sampling. The two share embeddings if they are given one Tensor:
    `generator.embeddings.tokens.weight = discriminator.embeddings.tokens.weight`, and so on.
    """
    ids, targets = as_ids("ids", ids), heads.labels_of(targets, np.shape(ids))
    asked = np.flatnonzero(targets != -100)
    x = generator.run(ids, mask, segments)
    loss = generator.need_head().loss(generator, x, targets)
    with no_grad():
        rows = ops.embedding(asked, np.ascontiguousarray(data(x)).reshape(-1, x.shape[-1]))
        logits = data(generator.need_head()(generator, rows))
    if uniforms is None:
        chosen = check.philox("electra", seed, 0).random(len(asked), np.float32)
    else:
        chosen = np.asarray(uniforms, np.float32).reshape(-1)[asked]
    replaced = ids.copy()
    replaced.reshape(-1)[asked] = ops.sample(np.nan_to_num(logits), uniform=chosen)  # the loss shows what is not finite
    original = np.where(targets == -100, ids, targets)
    labels = (replaced != original).astype(np.int32)
    if mask is not None:
        labels[np.asarray(mask) == 0] = -100
    return ops.add(loss, ops.scale(discriminator.loss(replaced, labels, mask, segments), weight))


Config, Model = ElectraConfig, Electra

HF_TYPE = "electra"
HF_CLASS = {
    None: "ElectraModel",
    "masked_lm": "ElectraForMaskedLM",
    "replaced_token": "ElectraForPreTraining",
    "sequence_classification": "ElectraForSequenceClassification",
    "token_classification": "ElectraForTokenClassification",
    "question_answering": "ElectraForQuestionAnswering",
    "multiple_choice": "ElectraForMultipleChoice",
}
HF_CONFIG = bert.HF_CONFIG | {"embedding_size": "d_embedding"}
HF_VALUES = bert.HF_VALUES
HF_FIXED = bert.HF_FIXED | {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}
HF_IGNORED = (*bert.HF_IGNORED, "summary_last_dropout")
HF_NAMES = {ours: theirs.replace("bert.", "electra.", 1) for ours, theirs in bert.HF_NAMES.items() if ours != "pooler.dense"} | {
    "project": "electra.embeddings_project"
}
_head = {"dense": "generator_predictions.dense", "norm": "generator_predictions.LayerNorm", "bias": "generator_lm_head.bias"}
HF_HEADS = {
    "masked_lm": {f"head.{ours}": theirs for ours, theirs in _head.items()},
    "replaced_token": {"head.dense": "discriminator_predictions.dense", "head.out": "discriminator_predictions.dense_prediction"},
    "sequence_classification": {"head.summary.dense": "classifier.dense", "head.out": "classifier.out_proj"},
    "token_classification": {"head.out": "classifier"},
    "question_answering": {"head.out": "qa_outputs"},
    "multiple_choice": {"head.summary.dense": "sequence_summary.summary", "head.out": "classifier"},
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_TIED = {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}
HF_RENAMED = bert.HF_RENAMED
HF_IGNORED_TENSORS = (r"electra\.embeddings\.position_ids", r"generator_.*", r"discriminator_.*")
HF_PREFIX = "electra."
