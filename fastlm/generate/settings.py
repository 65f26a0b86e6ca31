"""What one generation is asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastlm.ops import check
from fastlm.ops.check import LEAST, MOST

if TYPE_CHECKING:
    from fastlm.backend import Array
    from fastlm.nn import Cache

_NUMBERS = (int, float, np.integer, np.floating)


class Continues(Protocol):
    """What generation needs of a model: a CausalLM, or an encoder-decoder model that has read its sources (Reading)."""

    config: Any  # vocab_size, context

    def new_cache(self, batch: int, capacity: int) -> Cache: ...
    def logits(self, ids: Any, cache: Cache, last: bool = False) -> Array: ...


@dataclass(frozen=True)
class Settings:
    """How the next id is chosen, and when to end. Names and meanings are those of the transformers library.

    temperature 0 is greedy: the most likely id, the lowest of equals; the filters then mean nothing. top_k 0, top_p 1, min_p 0,
    repetition_penalty 1, no_repeat_ngram 0 are off. `eos` ends a sequence and is its last id. `min_tokens` forbids eos before.
    """

    max_tokens: int = 32
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 0), ("min_tokens", 0), ("top_k", 0), ("no_repeat_ngram", 0)):
            object.__setattr__(self, name, check.integer("generate", name, getattr(self, name), low, wrong=ValueError))
        object.__setattr__(self, "temperature", number("temperature", self.temperature, 0.0, MOST))
        object.__setattr__(self, "top_p", number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        object.__setattr__(self, "min_p", number("min_p", self.min_p, 0.0, 1.0))
        object.__setattr__(self, "repetition_penalty", penalty("repetition_penalty", self.repetition_penalty))
        object.__setattr__(self, "eos", ids_of("eos", self.eos))


def number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """The value, a number in the range; NumPy's as Python's."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or not low <= value <= high or (open_low and value == low):
        limits = f"{'above' if open_low else 'at least'} {low} and at most {high}"
        raise ValueError(f"[generate] {name} must be a number {limits}, got {value!r}")
    return value if isinstance(value, (int, float)) else float(value)


def penalty(name: str, value: Any) -> float:
    """The value, a number above 0 that logits of float32 can be divided by."""
    positive = isinstance(value, _NUMBERS) and value > 0
    return number(name, value, LEAST if positive else 0.0, MOST, open_low=not positive)


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    """None, an id or several as a tuple."""
    if value is None:
        return ()
    values = tuple(value) if hasattr(value, "__iter__") and not isinstance(value, str) else (value,)
    for i in values:
        if isinstance(i, bool) or not hasattr(i, "__index__") or i < 0:
            raise ValueError(f"[generate] {name} must be an id, several, or None, got {value!r}")
    return tuple(int(i) for i in values)
