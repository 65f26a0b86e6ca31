"""Objectives as transforms of data: rows of token ids in, a Batch out, whose fields are what the model's `loss` takes.

    model.loss(**objective(rows, seed, step)._asdict())

Each row is drawn from (seed, step, its number) alone, by Philox. NumPy only; nothing here knows a model or a tokenizer.
"""

from fastlm.data.objectives.base import (
    IGNORED,
    Batch,
    EncoderBatch,
    Objective,
    PermutationBatch,
    SourceBatch,
    Vocabulary,
)
from fastlm.data.objectives.causal import Causal
from fastlm.data.objectives.distillation import Distillation, DistillationBatch
from fastlm.data.objectives.masked import Masked, Replaced, ReplacedBatch, replaced
from fastlm.data.objectives.pairs import Chunks, Documents, SentencePairs
from fastlm.data.objectives.permutation import Permutation
from fastlm.data.objectives.spans import SpanCorruption

__all__ = [
    "IGNORED",
    "Batch",
    "Causal",
    "Chunks",
    "Distillation",
    "DistillationBatch",
    "Documents",
    "EncoderBatch",
    "Masked",
    "Objective",
    "Permutation",
    "PermutationBatch",
    "Replaced",
    "ReplacedBatch",
    "SentencePairs",
    "SourceBatch",
    "SpanCorruption",
    "Vocabulary",
    "replaced",
]
