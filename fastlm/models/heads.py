"""Heads of encoders: pre-training and tasks. A model's file says which it has and what they are called elsewhere.

A head turns hidden states (B, T, C) into logits and, with targets, into a loss:

    masked_lm                 logits (B, T, V)   targets (B, T): token ids, -100 where nothing is asked
    pretraining               logits (B, T, V)   targets (tokens as above, sentences (B,)): + next sentence or sentence order
    next_sentence             logits (B, 2)      targets (B,): 0 the second follows the first, 1 it does not
    replaced_token            logits (B, T)      targets (B, T): 1 replaced, 0 original, -100 padding
    sequence_classification   logits (B, N)      targets (B,): integers; (B,) floats for regression; (B, N) floats for several labels
    token_classification      logits (B, T, N)   targets (B, T): labels, -100 where nothing is asked
    question_answering        logits (B, T, 2)   targets (B, 2): where the answer starts and where it ends; beyond T: no answer here
    multiple_choice           logits (B, K)      targets (B,), for ids (B, K, T)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.models.base import narrowed
from fastlm.models.encoder import Head
from fastlm.nn import LayerNorm, Linear, Module, parameter
from fastlm.tensor import Tensor


def first(x: Any) -> Any:
    """x (B, T, C) -> (B, C), the first token's states."""
    B, T, C = x.shape
    return ops.embedding(np.arange(0, B * T, T, dtype=np.int32), ops.reshape(x, (B * T, C)))


class Summary(Module):
    """act(dense(first token)): (B, T, C) -> (B, C). Activation: tanh (BERT's pooler), or one of ops.linear."""

    pools = True  # once a sequence, see models/plan.py

    def __init__(self, d_model: int, activation: str) -> None:
        self.dense = Linear(d_model, d_model)
        self.activation = activation

    def __call__(self, x: Any) -> Any:
        if self.activation == "tanh":
            return ops.tanh(self.dense(first(x)))
        return self.dense(first(x), activation=self.activation)


class MaskedLM(Head):
    """The token at each position: norm(act(dense(x))) times the token embedding, + bias. Devlin et al. 2018, arXiv:1810.04805."""

    def __init__(self, d_model: int, d_embedding: int, vocab_size: int, activation: str, eps: float) -> None:
        self.dense = Linear(d_model, d_embedding)
        self.norm = LayerNorm(d_embedding, eps)
        self.bias = parameter(vocab_size)
        self.activation = activation

    def __call__(self, model: Any, x: Any) -> Any:
        x = self.norm(self.dense(x, activation=self.activation))
        return ops.linear(x, model.token_embedding.weight, self.bias)

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        """Logits are computed for the positions that have a target, and for no others; 0 where there are none, as cross_entropy."""
        flat = labels_of(targets, x.shape[:2]).reshape(-1)
        asked = np.flatnonzero(flat != -100)
        if len(asked) == 0:  # a text of special tokens: one row, which counts for nothing
            asked = np.zeros(1, np.int64)
        rows = ops.embedding(asked, ops.reshape(x, (-1, x.shape[-1])))
        loss: Tensor = ops.cross_entropy(self(model, rows), flat[asked])
        return loss


class NextSentence(Head):
    """Whether the second segment follows the first, from the pooled state. n_label: the reference's ALBERT has as many as it has labels."""

    pools = True

    def __init__(self, d_model: int, n_label: int = 2) -> None:
        self.out = Linear(d_model, n_label)

    def __call__(self, model: Any, x: Any) -> Any:
        return self.out(model.pooler(x))

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        loss: Tensor = ops.cross_entropy(self(model, x), labels_of(targets, x.shape[:1]))
        return loss


class Pretraining(Head):
    """Masked tokens, and a question about the sentences (next sentence, sentence order); the losses are added."""

    def __init__(self, tokens: MaskedLM, sentences: NextSentence) -> None:
        self.tokens, self.sentences = tokens, sentences

    def __call__(self, model: Any, x: Any) -> Any:
        return self.tokens(model, x)

    def sentence_logits(self, model: Any, x: Any) -> Any:
        """(B, 2), or as many as the head has labels."""
        return self.sentences(model, x)

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        if not isinstance(targets, (tuple, list)) or len(targets) != 2:
            raise ValueError("[pretraining] targets must be (tokens (B, T), sentences (B,)).")
        tokens, sentences = targets
        loss: Tensor = ops.add(self.tokens.loss(model, x, tokens), self.sentences.loss(model, x, sentences))
        return loss

    def means(self, model: Any, x: Any, targets: Any) -> list[tuple[Callable[[], Tensor], int]]:
        tokens, sentences = targets
        return self.tokens.means(model, x, tokens) + self.sentences.means(model, x, sentences)


class ReplacedToken(Head):
    """Whether each token was replaced. Clark et al. 2020, arXiv:2003.10555."""

    def __init__(self, d_model: int, activation: str) -> None:
        self.dense = Linear(d_model, d_model)
        self.out = Linear(d_model, 1)
        self.activation = activation

    def __call__(self, model: Any, x: Any) -> Any:
        return ops.reshape(self.out(self.dense(x, activation=self.activation)), x.shape[:2])

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        loss: Tensor = ops.binary_cross_entropy(self(model, x), targets)
        return loss


PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class SequenceClassifier(Head):
    """Labels of a sequence, or numbers for it. summary: (B, T, C) -> (B, C), the model's pooler where None.

    problem: None, "regression", "single_label_classification" or "multi_label_classification", as Hugging Face has it. None: one
    label is regression; integers as targets are single labels, floats several.
    """

    pools = True

    def __init__(self, d_model: int, n_label: int, summary: Module | None = None, problem: str | None = None) -> None:
        if problem is not None and problem not in PROBLEMS:
            raise ValueError(f"[config] problem must be None or one of {', '.join(PROBLEMS)}, got {problem!r:.60}.")
        self.summary = summary
        self.out = Linear(d_model, n_label)
        self.problem = problem

    def __call__(self, model: Any, x: Any) -> Any:
        summary = model.pooler if self.summary is None else self.summary
        return self.out(summary(x))

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        logits, targets = self(model, x), np.asarray(targets)
        problem = self.problem_of(targets)
        loss: Tensor
        if problem == "regression":
            if targets.size != logits.size:
                raise ValueError(
                    f"[model] targets must be {logits.shape} numbers, one for each of the {logits.shape[1]} labels, got {targets.shape}."
                )
            loss = ops.mean_squared_error(logits, targets.reshape(logits.shape))
        elif problem == "multi_label_classification":
            loss = ops.binary_cross_entropy(logits, targets)
        else:
            loss = ops.cross_entropy(logits, labels_of(targets, x.shape[:1]))
        return loss

    def problem_of(self, targets: Any) -> str:
        """`problem`, or what the targets make of None."""
        if self.problem is not None:
            return self.problem
        if self.out.weight.shape[0] == 1:
            return "regression"
        return f"{'single' if targets.dtype.kind in 'iu' else 'multi'}_label_classification"

    def means(self, model: Any, x: Any, targets: Any) -> list[tuple[Callable[[], Tensor], int]]:
        array = np.asarray(targets)
        if self.problem_of(array) == "regression":
            return [(partial(self.loss, model, x, targets), array.size)]
        return super().means(model, x, targets)


class TokenClassifier(Head):
    """A label for every token."""

    def __init__(self, d_model: int, n_label: int) -> None:
        self.out = Linear(d_model, n_label)

    def __call__(self, model: Any, x: Any) -> Any:
        return self.out(x)

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        loss: Tensor = ops.cross_entropy(self(model, x), labels_of(targets, x.shape[:2]))
        return loss


class QuestionAnswering(Head):
    """Where an answer starts and ends: two logits a token; the loss is the mean of both, over all positions of the batch: padding is
    not hidden from the softmax, as it is not in Hugging Face's."""

    def __init__(self, d_model: int) -> None:
        self.out = Linear(d_model, 2)

    def __call__(self, model: Any, x: Any) -> Any:
        return self.out(x)

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        (start, _), (end, _) = self._ends(model, x, targets)
        loss: Tensor = ops.scale(ops.add(start, end), 0.5)
        return loss

    def means(self, model: Any, x: Any, targets: Any) -> list[tuple[Callable[[], Tensor], int]]:
        return [(partial(ops.scale, mean, 0.5), n) for mean, n in self._ends(model, x, targets)]

    def _ends(self, model: Any, x: Any, targets: Any) -> list[tuple[Any, int]]:
        """The mean over the starts and that over the ends, each with how many there are among the positions."""
        B, T, _ = x.shape
        wanted = labels_of(targets, (B, 2))
        wanted = np.where((wanted < 0) | (wanted >= T), np.int32(-100), wanted)
        parts = ops.split(self(model, x), (1, 1))
        return [
            (ops.cross_entropy(ops.reshape(part, (B, T)), column.copy()), int((column != -100).sum()))
            for part, column in zip(parts, wanted.T, strict=True)
        ]


class MultipleChoice(Head):
    """One of K continuations: a score each, from its summary. ids (B, K, T); inside, the K are sequences of the batch."""

    pools = True

    def __init__(self, d_model: int, summary: Module | None = None) -> None:
        self.summary = summary
        self.out = Linear(d_model, 1)

    def __call__(self, model: Any, x: Any) -> Any:
        summary = model.pooler if self.summary is None else self.summary
        return self.out(summary(x))

    def loss(self, model: Any, x: Any, targets: Any) -> Tensor:
        wanted = np.asarray(targets)
        if wanted.ndim != 1 or len(wanted) == 0 or len(x) % len(wanted):
            raise ValueError(f"[multiple_choice] targets must be (B,), one for each K of {len(x)} sequences, got {wanted.shape}.")
        scores = ops.reshape(self(model, x), (len(wanted), -1))
        loss: Tensor = ops.cross_entropy(scores, labels_of(wanted, wanted.shape))
        return loss


def labels_of(targets: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """targets as int32 of this shape, or an error that says what was given."""
    array = np.asarray(targets)
    if array.dtype.kind not in "iu":
        raise TypeError(f"[model] targets must be integers, got {array.dtype}.")
    if array.shape != tuple(shape):
        raise ValueError(f"[model] targets must have the shape {tuple(shape)}, got {array.shape}.")
    return narrowed("targets", array)


def masked_lm(c: Any) -> MaskedLM:
    """BERT's, of a config with d_model, vocab_size, activation, eps."""
    return MaskedLM(c.d_model, c.d_model, c.vocab_size, c.activation, c.eps)


Maker = Callable[[Any], Head]
# What most encoders have, from a config with d_model, vocab_size, activation, eps, labels, problem.
STANDARD: dict[str, Maker] = {
    "masked_lm": masked_lm,
    "sequence_classification": lambda c: SequenceClassifier(c.d_model, len(c.labels), problem=c.problem),
    "token_classification": lambda c: TokenClassifier(c.d_model, len(c.labels)),
    "question_answering": lambda c: QuestionAnswering(c.d_model),
    "multiple_choice": lambda c: MultipleChoice(c.d_model),
}


def make(heads: Mapping[str, Maker], config: Any) -> Head | None:
    """The head that config.head asks for, None for the bare model."""
    if config.head is None:
        return None
    labels = getattr(config, "labels", ("",))
    if not isinstance(labels, tuple) or not labels or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"[config] labels must be a tuple of at least one name, got {labels!r:.60}.")
    if config.head not in heads:
        raise ValueError(f"[config] head must be None or one of {', '.join(heads)}, got {config.head!r:.60}.")
    return heads[config.head](config)
