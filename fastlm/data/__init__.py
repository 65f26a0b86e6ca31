"""Text to packed tokens to batches. Knows nothing of tokenizers: `prepare` takes a function from text to ids."""

from fastlm.data.corpus import Corpus, open_corpus, prepare
from fastlm.data.labelled import Labelled
from fastlm.data.loader import Examples, Loader, windows
from fastlm.data.objectives import (
    Batch,
    Causal,
    Distillation,
    DistillationBatch,
    Documents,
    EncoderBatch,
    Masked,
    Objective,
    Permutation,
    PermutationBatch,
    Replaced,
    ReplacedBatch,
    SentencePairs,
    SourceBatch,
    SpanCorruption,
    Vocabulary,
    replaced,
)

__all__ = [
    "Batch",
    "Causal",
    "Corpus",
    "Distillation",
    "DistillationBatch",
    "Documents",
    "EncoderBatch",
    "Examples",
    "Labelled",
    "Loader",
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
    "open_corpus",
    "prepare",
    "replaced",
    "windows",
]
