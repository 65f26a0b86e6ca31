"""What a run learns from: batches by their number, held-out batches, whether model and objective fit, and what a batch costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastlm.backend import Array
from fastlm.data import Causal, Corpus, Documents, Examples, Labelled, Loader, open_corpus, windows
from fastlm.data.objectives import IGNORED, SentencePairs
from fastlm.models.base import CausalLM
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.models.xlnet import XLNet

Cost = Callable[[Any], tuple[int, float]]
Data = Corpus | Documents | Labelled | Array | str | os.PathLike[str] | Callable[[int], Any]
# What a model learns by, by the `trains` of the objective.
OBJECTIVES = {
    "causal": "data.Causal",
    "masked_lm": "data.Masked",
    "pretraining": "data.SentencePairs",
    "next_sentence": "data.SentencePairs(..., tokens=False)",
    "encoder-decoder": "data.SpanCorruption",
    "permutation": "data.Permutation",
    "electra": "data.Replaced",
    "distillation": "data.Distillation",
}


@dataclass(frozen=True)
class Source:
    """batch(n): batch number n. held_out(): the held-out batches from the first, the same every time; None where there are none."""

    batch: Callable[[int], Any]
    held_out: Callable[[], Iterator[Any]] | None = None


def trains(model: Any) -> tuple[str, ...]:
    """What a model can learn: the `trains` of objectives that fit it."""
    if hasattr(model, "trains"):  # a pair of models, see fastlm.train.joint
        return (model.trains,)
    if isinstance(model, CausalLM):
        if isinstance(model, XLNet):
            return ("permutation", "causal") if model.predicts_next else ("permutation",)
        return ("causal",)
    if isinstance(model, EncoderDecoder):
        return ("encoder-decoder",)
    if isinstance(model, Encoder):
        return () if model.config.head is None else (model.config.head,)
    raise TypeError(f"[train] model must be a language model, got {type(model).__name__}.")


def objective_for(model: Any, objective: Any) -> Any:
    """The objective, the next token where None; ValueError where the model cannot learn it."""
    able = trains(model)
    head = f" with the head {model.config.head}" if isinstance(model, Encoder) else ""
    fitting = ", ".join(OBJECTIVES.get(name, "labelled examples (data.Labelled)") for name in able) or "nothing: it has no head"
    if objective is None and "causal" not in able:
        raise ValueError(f"[train] objective must be given: {type(model).__name__}{head} learns by {fitting}.")
    objective = Causal() if objective is None else objective
    if isinstance(objective, type):
        raise ValueError(f"[train] objective must be one, data.{objective.__name__}(...), got the class.")
    if getattr(objective, "trains", None) not in able:
        raise ValueError(
            f"[train] objective must be one that the model can learn, {fitting} for {type(model).__name__}{head}, got "
            f"{type(objective).__name__}."
        )
    return objective


def source(model: Any, data: Data, objective: Any, batch: int, context: int, seed: int, eval_batches: int | None = None) -> Source:
    """Checked: model, data and objective fit each other."""
    if isinstance(data, Labelled) or callable(data):
        if objective is not None:
            raise ValueError(f"[train] objective must be None: {type(data).__name__} gives batches that have their targets.")
        return _labelled(model, data, batch, context, seed, eval_batches) if isinstance(data, Labelled) else Source(data)
    objective, vocab_size = objective_for(model, objective), int(model.config.vocab_size)
    known = getattr(getattr(objective, "masked", objective), "vocabulary", None)
    if known is not None and known.size > vocab_size:
        raise ValueError(f"[train] the model's vocab_size must be at least the objective's {known.size}, got {vocab_size}.")
    if isinstance(data, Documents):
        return _pairs(objective, data, data.validation, batch, context, seed, eval_batches)
    if isinstance(data, str) and len(data) > 255 and not os.path.exists(data):  # longer than a file's name
        raise ValueError(
            f"[train] data must be a Corpus, its folder, or ids, got a text of {len(data):,} characters: data.prepare it."
        )
    corpus = open_corpus(data) if isinstance(data, (str, os.PathLike)) else data
    if not isinstance(corpus, Corpus):
        tokens = np.asarray(corpus)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"[train] data must be a Corpus, its folder, or (n,) integers, got {tokens.dtype} {tokens.shape}.")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise ValueError(f"[train] data must hold ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}.")
        corpus = Corpus(tokens, tokens[:0], vocab_size if known is None else known.size)
    if corpus.vocab_size > vocab_size:
        raise ValueError(f"[train] the model's vocab_size must be at least the data's {corpus.vocab_size}, got {vocab_size}.")
    held = corpus.validation
    if isinstance(objective, SentencePairs):
        if not objective.ends:
            raise ValueError(
                "[train] data must be Documents for data.SentencePairs, or its `ends` must say which ids end a sentence."
            )
        rest = Documents.cut(held, objective.ends) if len(held) else None
        try:
            usable = None if rest is None or not objective.chunks(rest, context) else rest
        except ValueError:  # too short for a pair, as other objectives' held-out text may be for a row
            usable = None
        return _pairs(objective, Documents.cut(corpus.train, objective.ends), usable, batch, context, seed, eval_batches)
    enough = len(held) >= objective.window(context)
    return Source(
        Loader(corpus.train, batch, context, seed, objective).batch,
        (lambda: windows(held, batch, context, eval_batches, objective, seed)) if enough else None,
    )


def _pairs(
    objective: Any, data: Documents, held_out: Documents | None, batch: int, context: int, seed: int, limit: int | None
) -> Source:
    if not isinstance(objective, SentencePairs):
        raise ValueError(f"[train] objective must be data.SentencePairs for Documents, got {type(objective).__name__}.")
    chunks = objective.chunks(data, context)
    examples = Examples(len(chunks), batch, seed, lambda seed, epochs, numbers: objective(chunks, seed, epochs, numbers))
    if held_out is None:
        return Source(examples.batch)
    rest = objective.chunks(held_out, context)

    def batches() -> Iterator[Any]:
        starts = range(0, len(rest), batch)[:limit]
        return (objective(rest, seed, 0, np.arange(i, min(i + batch, len(rest)))) for i in starts)

    return Source(examples.batch, batches)


def _labelled(model: Any, data: Labelled, batch: int, context: int, seed: int, limit: int | None) -> Source:
    able = trains(model)
    if not isinstance(model, Encoder) or not able or able[0] in OBJECTIVES:
        raise ValueError(
            f"[train] data must not be Labelled for {type(model).__name__}: that takes an encoder with a task head "
            '(fastlm.models.with_head(model, "sequence_classification", labels=...)).'
        )
    for part in (data, data.validation):
        if part is not None and part.longest > context:
            raise ValueError(
                f"[train] data must have at most {context} tokens in an example, got {part.longest}: cut it or give context."
            )
    if able[0] == "question_answering":
        data = _answered(data)
    held = data.validation

    def batches() -> Iterator[Any]:
        assert held is not None
        starts = range(0, len(held), batch)[:limit]
        return (held.batch(range(i, min(i + batch, len(held)))) for i in starts)

    examples = Examples(len(data), batch, seed, lambda seed, epochs, numbers: data.batch(numbers))
    return Source(examples.batch, None if held is None else batches)


def _answered(data: Labelled) -> Labelled:
    """Answers beyond an example's own tokens are none: else one that the padding of its batch reaches would be asked for there."""
    labels, lengths = np.asarray(data.labels), np.array([len(row) for row in data.ids])
    if labels.ndim == 2:  # else the head says what is wrong
        labels = np.where(labels < lengths[:, None], labels, IGNORED)
    return replace(data, labels=labels, validation=None if data.validation is None else _answered(data.validation))


def means(model: Any, batch: Any) -> list[tuple[Callable[[], Any], int]]:
    """The means that a batch's loss adds up, each with how many targets it is over: of an encoder each of its head's, else one."""
    if isinstance(model, Encoder):
        return model.need_head().means(model, model.run(batch.ids, batch.mask, batch.segments), batch.targets)
    fields = batch._asdict()
    return [(lambda: model.loss(**fields), int((np.asarray(batch.targets) != IGNORED).sum()))]


def cost(model: Any) -> Cost:
    """A function that says of a batch: its tokens, and the floating-point operations of its forward and backward pass, about.

    Multiply-adds count as two. 6 for every weight that multiplies (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and 12 L H D T
    for attention's two products (Chowdhery et al. 2022, appendix B), half of it where it is causal. Heads are counted for what is asked.
    A weight that several layers share counts once, a teacher not at all.
    """
    main = getattr(model, "model", model)
    c = main.config
    matrices = {k: p.size for k, p in model.named_parameters().items() if p.ndim == 2 and "embedding" not in k}
    everything = float(sum(matrices.values()))
    source_side = float(sum(size for k, size in matrices.items() if k.startswith("encoder.")))
    body = float(sum(size for k, size in matrices.items() if not k.startswith("head.")))
    attention = 12.0 * c.n_head * getattr(c, "head_dim", c.d_model // c.n_head)
    asks_tokens = getattr(c, "head", None) in ("masked_lm", "pretraining", "language_model")
    next_token = flops_per_token(main, 1) - attention / 2 * c.n_layer if isinstance(main, CausalLM) else 0.0

    def of(batch: Any) -> tuple[int, float]:
        width = batch[0].shape[-1] * attention
        if isinstance(main, EncoderDecoder):
            source, target = batch.source_ids.size, batch.decoder_ids.size
            flops = source * (6.0 * source_side + c.n_encoder_layer * width)
            return source + target, flops + target * (6.0 * (everything - source_side) + 1.5 * c.n_layer * width)
        tokens = batch.ids.size
        if isinstance(main, CausalLM) and not hasattr(batch, "perm_mask"):
            return tokens, tokens * (next_token + c.n_layer * width / 2)
        rows = tokens + (batch.targets.size if hasattr(batch, "perm_mask") else 0)  # two streams
        wanted = batch.targets[0] if isinstance(batch.targets, tuple) else batch.targets
        head = 6.0 * c.vocab_size * c.d_model * int((wanted != IGNORED).sum()) if asks_tokens else 0.0
        return tokens, rows * (6.0 * body + c.n_layer * width) + head

    return of


def flops_per_token(model: CausalLM, context: int) -> float:
    """Of a causal model, which sees half of the context on average."""
    c = model.config
    matrices = sum(p.size for k, p in model.named_parameters().items() if p.ndim == 2 and "embedding" not in k)
    head = c.vocab_size * c.d_model if model.head is None else 0
    return float(6.0 * (matrices + head) + 6.0 * c.n_layer * c.n_head * c.head_dim * context)
