"""Beam search, step for step that of transformers 5 (`GenerationMixin._beam_search`), so that the ids are the same.

`beams` sequences run side by side. Each step looks at the best max(2, 1 + number of eos) * beams continuations; those of the first
`beams` that end are finished with score / length^length_penalty, the best of the others run on. The search ends when `beams` are
finished (early_stopping True), when no running beam is likely to win (False), or when none can (\"never\").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.generate.engine import Output, check_eos, check_prompt, prefill, stepper
from fastlm.generate.processors import active, exhausted, process
from fastlm.generate.settings import Continues, ids_of, number, penalty
from fastlm.ops import check

_STEEPEST = 6.0  # of length_penalty: up to 2^20 ids, float32 holds length^length_penalty
_NEVER = np.float32(-1e9)  # the reference's score of what must not win


@dataclass(frozen=True)
class BeamSettings:
    """What a beam search is asked to do; see `Settings` for the names they share."""

    beams: int = 4
    max_tokens: int = 32
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("beams", 1), ("max_tokens", 0), ("min_tokens", 0), ("no_repeat_ngram", 0)):
            object.__setattr__(self, name, check.integer("generate", name, getattr(self, name), low, wrong=ValueError))
        object.__setattr__(self, "length_penalty", number("length_penalty", self.length_penalty, -_STEEPEST, _STEEPEST))
        object.__setattr__(self, "repetition_penalty", penalty("repetition_penalty", self.repetition_penalty))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"[generate] early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        object.__setattr__(self, "eos", ids_of("eos", self.eos))


@dataclass
class _Beam:
    ids: list[int]  # new ones alone
    score: np.float32
    finished: bool = False


def beam_search(
    model: Continues, prompt: Sequence[int], settings: BeamSettings, stop: Callable[[list[int]], bool] | None = None
) -> Output:
    """The best sequence of a beam search. `stop`, given the new ids of a candidate, says whether it ends there, as eos does."""
    s = settings
    ids = check_prompt(model, prompt)
    check_eos(model, s.eos)
    limit = min(s.max_tokens, model.config.context - len(ids))
    keep = max(2, 1 + len(s.eos)) * s.beams
    if keep > s.beams * model.config.vocab_size:
        raise ValueError(
            f"[generate] {s.beams} beams need {keep} continuations, a vocabulary of {model.config.vocab_size} has fewer"
        )
    if limit == 0:
        return Output()
    cache = model.new_cache(1, len(ids) + limit)
    logits = np.repeat(prefill(model, [ids], cache), s.beams, axis=0)
    cache = cache.select([0] * s.beams)
    decoder = stepper(model, cache)
    running = [_Beam([], np.float32(0) if b == 0 else _NEVER) for b in range(s.beams)]
    finished = [_Beam([], _NEVER) for _ in range(s.beams)]
    improvable = True
    for length in range(1, limit + 1):  # of the new ids, after this step
        scores = _log_probabilities(logits, ids, running, s) + np.array([r.score for r in running], np.float32)[:, None]
        best, where = _top(scores.reshape(-1), keep)
        parents, tokens = np.divmod(where, scores.shape[1])
        candidates = [_Beam([*running[p].ids, int(t)], score) for p, t, score in zip(parents, tokens, best, strict=True)]
        ends = np.array([length >= limit or c.ids[-1] in s.eos or (stop is not None and stop(c.ids)) for c in candidates])
        going, order = _top(best + ends.astype(np.float32) * _NEVER, s.beams)
        finished = _finish(finished, candidates, ends, best, length, improvable, s)
        running = [_Beam(candidates[i].ids, score) for i, score in zip(order, going, strict=True)]
        improvable = improvable and _may_improve(running, finished, length, limit, s)
        full = all(f.finished for f in finished) and s.early_stopping is True
        if not improvable or full or ends.all():
            break
        cache.select(parents[order])  # in place: the recorded step goes on
        decoder.ids[:, 0] = [r.ids[-1] for r in running]
        logits = decoder.step()
    winner = finished[0]
    if not winner.finished:  # -inf is all that was left, before one could end
        raise ValueError(exhausted(len(running[0].ids) - 1))
    reason = "length"
    if winner.ids and winner.ids[-1] in s.eos:
        reason = "eos"
    elif stop is not None and stop(winner.ids):
        reason = "stop"
    return Output(winner.ids, reason, float(winner.score))


def _log_probabilities(logits: Array, prompt: list[int], running: list[_Beam], s: BeamSettings) -> Array:
    """(beams, V): log softmax first, the processors after, as the reference has it."""
    ops.argmax(logits, token=True)  # refuses rows with nan, and rows of -inf, whose log softmax is nan
    scores: Array = ops.log_softmax(logits)
    if active(s.repetition_penalty, s.no_repeat_ngram, s.min_tokens):
        for row, beam in zip(scores, running, strict=True):
            process(
                row,
                prompt + beam.ids,
                len(beam.ids),
                repetition_penalty=s.repetition_penalty,
                no_repeat_ngram=s.no_repeat_ngram,
                min_tokens=s.min_tokens,
                eos=s.eos,
            )
    return scores


def _finish(
    finished: list[_Beam], candidates: list[_Beam], ends: Array, best: Array, length: int, improvable: bool, s: BeamSettings
) -> list[_Beam]:
    """The best `beams` of what was finished and what now ends; only the first `beams` candidates may finish."""
    may = ends & (np.arange(len(candidates)) < s.beams)
    scores = best / np.float32(length**s.length_penalty)
    if all(f.finished for f in finished) and s.early_stopping is True:
        scores = scores + _NEVER
    if not improvable:
        scores = scores + _NEVER
    scores = scores + (~may).astype(np.float32) * _NEVER
    merged = finished + [_Beam(c.ids, score, bool(m)) for c, score, m in zip(candidates, scores, may, strict=True)]
    _, order = _top(np.array([m.score for m in merged], np.float32), s.beams)
    return [merged[i] for i in order]


def _may_improve(running: list[_Beam], finished: list[_Beam], length: int, limit: int, s: BeamSettings) -> bool:
    """Whether the best running beam could still enter the finished ones, by the reference's estimate of its length."""
    longest = limit if s.early_stopping == "never" and s.length_penalty > 0 else length
    possible = running[0].score / np.float32(longest**s.length_penalty)
    worst = min(f.score for f in finished)
    return any(possible > (worst if f.finished else _NEVER) for f in finished)


def _top(scores: Array, k: int) -> tuple[Array, Array]:
    """The k greatest of (N,), in descending order, ties to the lowest index, and where they are."""
    values, indices = ops.top_k(scores[None], k)
    return values[0], indices[0]
