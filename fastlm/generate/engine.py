"""The loop: every prompt is read into its own row of the cache, then all rows advance together, one id a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.generate.kept import Session, give, take
from fastlm.generate.ondevice import DeviceDecoder
from fastlm.generate.past import Past
from fastlm.generate.processors import active, check_possible, process
from fastlm.generate.recorded import Decoder
from fastlm.generate.settings import Continues, Settings
from fastlm.nn import Cache
from fastlm.ops import check

CHUNK = 512  # positions of a prompt read at a time: bounds the memory, and is large enough for full speed
PIECES = 128  # positions of a small model's prompt up to which recorded readers take it: see fastlm/generate/kept.py
AHEAD = 5e-4  # seconds of steps that are made before their ids are looked at: waking Python for each costs as much as a small model's step
TOGETHER = 2048  # positions of neighbouring prompts of one length that are read together, which changes no bit

Stop = Callable[[int, int], bool]  # (index of the prompt, new id) -> whether this sequence ends here


@dataclass
class Output:
    """The new ids of one prompt, eos included, and why they end: eos, stop, or length (max_tokens or the model's context)."""

    ids: list[int] = field(default_factory=list)
    reason: str = "length"
    score: float | None = None  # of a beam search


def steps(
    model: Continues,
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    seeds: int | Sequence[int] = 0,
    stop: Stop | None = None,
    outputs: list[Output] | None = None,
    past: Past | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (index of the prompt, new id) until every sequence has ended. Closing the iterator ends it early.

    The prompts may have different lengths. One seed is used for each of them, so that a prompt gives the same ids wherever it stands;
    give a list to draw different samples of one prompt. A sequence ends at the model's context: prompt and new ids together are at
    most `model.config.context`. `outputs`, if given, is filled with one Output for each prompt. `past`: see Past.
    """
    settings = settings or Settings()
    rows = [_Row(i, check_prompt(model, p), s) for i, (p, s) in enumerate(zip(prompts, _seeds(seeds, len(prompts)), strict=True))]
    check_eos(model, settings.eos)
    if past is not None and not isinstance(past, Past):
        raise TypeError(f"[generate] past must be a fastlm.Past or None, got {type(past).__name__}")
    if past is not None and len(rows) != 1:
        raise ValueError(f"[generate] past must be None for {len(rows)} prompts: it is of one sequence, call for each of them")
    if outputs is not None:
        outputs.extend(row.output for row in rows)
    room = model.config.context
    for row in rows:
        row.limit = min(settings.max_tokens, room - len(row.ids))
    rows = [row for row in rows if row.limit > 0]
    if not rows:
        return
    capacity = max(len(row.ids) + row.limit for row in rows)
    session = take(model, len(rows), capacity) if past is None else past.take(model, rows[0].ids, capacity)
    try:
        yield from _advance(model, rows, settings, stop, session)
    finally:
        if past is None:
            give(model, session)
        else:
            past.give(model)


def _advance(
    model: Continues, rows: list[_Row], settings: Settings, stop: Stop | None, session: Session
) -> Iterator[tuple[int, int]]:
    """All steps of these rows, on the session's cache. Where a row ends before the others, the session is left."""
    cache = session.cache
    prompts = [row.ids for row in rows]
    if len(rows) == 1 and isinstance(cache, Cache) and cache.lengths[0]:  # of a Past
        prompts = [rows[0].ids[int(cache.lengths[0]) :]]
    if session.small and len(rows) == 1 and len(prompts[0]) <= PIECES:
        logits = session.read(model, prompts[0])
    else:
        logits = np.concatenate(
            [
                prefill(model, prompts[a:b], cache.row(a) if b - a == 1 else cache.rows(a, b))
                for a, b in alike(cache, [len(ids) for ids in prompts])
            ]
        )
    ids = choose(logits, rows, settings)
    decoder: Any = None  # a Decoder or a DeviceDecoder
    ends = np.array(settings.eos, np.int32)
    ready: Iterator[list[int]] = iter(())  # ids that are chosen already
    while True:
        for row, id in zip(rows, ids, strict=True):
            if row.reason is not None:  # ended, and still in a batch on a device
                continue
            row.ids.append(id)
            row.output.ids.append(id)
            if id in settings.eos:
                row.reason = "eos"
            elif stop is not None and stop(row.index, id):
                row.reason = "stop"
            elif len(row.output.ids) >= row.limit:
                row.reason = "length"
            row.output.reason = row.reason or row.output.reason
            yield row.index, id
        going = [b for b, row in enumerate(rows) if row.reason is None]
        if not going:
            return
        if len(going) < len(rows) and not (isinstance(decoder, DeviceDecoder) and decoder.keeps(len(going))):
            if isinstance(decoder, DeviceDecoder):
                decoder.settle()
            session.kept = False
            cache = cache.select(going)
            rows = [rows[b] for b in going]
            decoder = None
        if decoder is None:
            decoder = _decoder(model, cache, rows, settings, session)
            decoder.ids[:, 0] = [row.ids[-1] for row in rows]
        found = next(ready, None)
        if found is None and isinstance(decoder, Decoder) and (stop is None or len(rows) == 1):
            least = min(row.limit - len(row.output.ids) for row in rows)  # no row ends within, unless its id says so
            ready = iter(decoder.ahead(least, ends, AHEAD))
            found = next(ready, None)
        if found is not None:
            ids, logits = found, decoder.recording.result
        else:
            logits = decoder.step()
            if decoder.choose is None:
                decoder.ids[:, 0] = choose(logits, rows, settings)
            ids = decoder.ids[:, 0].tolist()
        if min(ids) < 0:
            choose(logits, rows, settings)  # raises: a row of logits has nan, or no token is possible


def generate(
    model: Continues,
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    seeds: int | Sequence[int] = 0,
    stop: Stop | None = None,
    past: Past | None = None,
) -> list[Output]:
    """All new ids of every prompt; see `steps`."""
    outputs: list[Output] = []
    for _ in steps(model, prompts, settings, seeds, stop, outputs, past):
        pass
    return outputs


def prefill(model: Continues, prompts: Sequence[Sequence[int]], cache: Cache) -> Array:
    """Reads prompts of one length into a cache, in fixed chunks; the logits (B, V) after their last ids."""
    array = np.asarray(prompts, np.int32)
    chunk: int = getattr(cache, "chunk", CHUNK)  # XLNet's memories take a prompt at once
    for start in range(0, array.shape[1], chunk):
        logits = model.logits(array[:, start : start + chunk], cache, last=True)
    return logits


def alike(cache: Cache | None, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs (begin, end) of neighbours of one length, each of at most TOGETHER positions in a pass. XLNet reads one at a time."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        positions = (end - begin + 1) * min(lengths[begin], CHUNK)
        single = cache is not None and not isinstance(cache, Cache)
        if end == len(lengths) or lengths[end] != lengths[begin] or positions > TOGETHER or single:
            yield begin, end
            begin = end


def _decoder(model: Continues, cache: Cache, rows: Sequence[_Row], settings: Settings, session: Session) -> Any:
    """Steps of these rows. The next ids are chosen within the step where kernels alone can choose."""
    s, device = settings, getattr(cache, "device", None)

    def make() -> tuple[Any, list[Array]]:
        if key is None:
            return None, []
        if key == "greedy":
            return lambda logits, out: ops.argmax(logits, out=out, token=True), []
        seeds = backend.put(np.zeros(len(rows), np.uint64), device)
        steps = backend.put(np.zeros(len(rows), np.int64), device)

        def draw(logits: Array, out: Array) -> None:
            ops.sample(logits, s.temperature, s.top_k, s.top_p, s.min_p, seed=seeds, step=steps, out=out)
            ops.advance(steps, out=steps)

        return draw, [seeds, steps]

    key: Any = "greedy" if s.temperature == 0.0 else ("drawn", s.temperature, s.top_k, s.top_p, s.min_p)
    if active(s.repetition_penalty, s.no_repeat_ngram, s.min_tokens):
        key = None
    if session.kept and device is None:
        decoder, arrays = session.decoder(model, key, make)
    else:
        how, arrays = make()
        decoder = stepper(model, cache, how, arrays[1:])
    if arrays:
        backend.assign(arrays[0], backend.put(np.array([row.seed & ((1 << 64) - 1) for row in rows], np.uint64), device))
        backend.assign(arrays[1], backend.put(np.array([len(row.output.ids) for row in rows], np.int64), device))
    return decoder


def stepper(model: Continues, cache: Cache, *how: Any) -> Any:
    """What steps the sequences of a cache, where that is: a Decoder or a DeviceDecoder."""
    return (Decoder if getattr(cache, "device", None) is None else DeviceDecoder)(model, cache, *how)


def choose(logits: Array, rows: Sequence[_Row], settings: Settings) -> list[int]:
    """The next id of every row. logits (B, V) are changed where a processor is on."""
    s = settings
    if active(s.repetition_penalty, s.no_repeat_ngram, s.min_tokens):
        for scores, row in zip(logits, rows, strict=True):
            process(
                scores,
                row.ids,
                len(row.output.ids),
                repetition_penalty=s.repetition_penalty,
                no_repeat_ngram=s.no_repeat_ngram,
                min_tokens=s.min_tokens,
                eos=s.eos,
            )
            check_possible(scores, row.index, row.ids, len(row.output.ids), s.no_repeat_ngram, s.min_tokens, s.eos)
    if s.temperature == 0.0:
        chosen = ops.argmax(logits, token=True)
    else:
        chosen = ops.sample(
            logits,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            seed=[row.seed for row in rows],
            step=[len(row.output.ids) for row in rows],
        )
    return [int(id) for id in chosen]


class _Row:
    """A sequence under way."""

    __slots__ = ("ids", "index", "limit", "output", "reason", "seed")

    def __init__(self, index: int, ids: list[int], seed: int) -> None:
        self.index, self.ids, self.seed = index, ids, seed
        self.limit = 0
        self.output = Output()
        self.reason: str | None = None


def check_prompt(model: Any, prompt: Sequence[int]) -> list[int]:
    """A prompt as a list of ids of the model's vocabulary that leaves room for one more, or a ValueError."""
    array = np.asarray(prompt)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        if array.size == 0:
            raise ValueError("[generate] a prompt must have at least one id, got none: begin with the model's bos")
        raise ValueError(f"[generate] a prompt must be a list of ids, got shape {array.shape} of {array.dtype}")
    if array.size == 0:
        raise ValueError("[generate] a prompt must have at least one id, got none: begin with the model's bos")
    low, high, vocab = int(array.min()), int(array.max()), model.config.vocab_size
    if low < 0 or high >= vocab:
        raise ValueError(f"[generate] ids must be from 0 to {vocab - 1}, got {low if low < 0 else high}")
    if len(array) >= model.config.context:
        raise ValueError(
            f"[generate] a prompt must be shorter than the model's context of {model.config.context}, got {len(array)} ids. Shorten it."
        )
    ids: list[int] = array.tolist()
    return ids


def check_eos(model: Any, eos: Sequence[int]) -> None:
    """eos ids are ids of the model's vocabulary."""
    for id in eos:
        if id >= model.config.vocab_size:
            raise ValueError(f"[generate] eos must be from 0 to {model.config.vocab_size - 1}, got {id}")


def _seeds(seeds: Any, count: int) -> list[int]:
    if isinstance(seeds, (list, tuple)) or np.ndim(seeds):
        if len(seeds) != count:
            raise ValueError(f"[generate] seed must be one number or {count}, one for each prompt, got {len(seeds)}")
    else:
        seeds = [seeds] * count
    return [check.integer("generate", "seed", seed, 0, wrong=ValueError) for seed in seeds]
