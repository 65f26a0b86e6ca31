"""What objectives share: the ids that mean something, batches, draws, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
IGNORED = -100  # the target of a position where nothing is asked


class Batch(NamedTuple):
    """For a causal model. ids, targets: (B, T) int32; target t is the token after id t."""

    ids: Ints
    targets: Ints


class EncoderBatch(NamedTuple):
    """For an encoder. ids, segments (B, T) int32; mask (B, T) bool, None where there is no padding; targets as the head has them."""

    ids: Ints
    targets: Any
    mask: NDArray[np.bool_] | None = None
    segments: Ints | None = None


class SourceBatch(NamedTuple):
    """For an encoder-decoder model. source_ids, mask (B, S); decoder_ids, targets (B, T)."""

    source_ids: Ints
    decoder_ids: Ints
    targets: Ints
    mask: NDArray[np.bool_] | None = None


class PermutationBatch(NamedTuple):
    """For XLNet. ids, mask, segments (B, T); perm_mask (B, T, T), target_mapping (B, N, T) bool; targets (B, N)."""

    ids: Ints
    targets: Ints
    perm_mask: NDArray[np.bool_]
    target_mapping: NDArray[np.bool_]
    mask: NDArray[np.bool_] | None
    segments: Ints


@dataclass(frozen=True)
class Vocabulary:
    """The ids that objectives have to know. `Vocabulary.of(tokenizer)` finds them.

    size: ids run from 0 to here. special: never masked, predicted or drawn. cls and sep: what a row begins and ends with, None where
    it does not. first_sentinel: of `sentinels` descending ids that stand for spans. continues (size,): whether a token goes on with
    the word of the token before it.
    """

    size: int
    special: frozenset[int] = frozenset()
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    eos: int | None = None
    first_sentinel: int | None = None
    sentinels: int = 0
    continues: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        known = {"pad": self.pad, "cls": self.cls, "sep": self.sep, "mask": self.mask, "eos": self.eos}
        known["first_sentinel"], last = self.first_sentinel, (self.first_sentinel or 0) - max(self.sentinels, 1) + 1
        for name, value in {**known, "the last sentinel": None if self.first_sentinel is None else last}.items():
            if value is not None and not 0 <= value < self.size:
                raise ValueError(f"[vocabulary] {name} must be an id from 0 to {self.size - 1}, got {value}.")
        if self.continues is not None and self.continues.shape != (self.size,):
            raise ValueError(f"[vocabulary] continues must be (size,) = ({self.size},), got {self.continues.shape}.")
        sentinels = () if self.first_sentinel is None else range(last, self.first_sentinel + 1)
        named = {known[name] for name in ("pad", "cls", "sep", "mask", "eos")} - {None}
        object.__setattr__(self, "special", frozenset(self.special) | named | frozenset(sentinels))
        if outside := [i for i in self.special if not 0 <= i < self.size]:
            raise ValueError(f"[vocabulary] special must be ids from 0 to {self.size - 1}, got {min(outside)}.")
        if len(self.special) >= self.size:
            raise ValueError(f"[vocabulary] size must be more than the {len(self.special)} special ids, got {self.size}.")

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> Vocabulary:
        """That of a tokenizer (what it needs: `vocab_size`, `special_ids`, `special`, `id(token)`, `token(id)`); size: of a model with
        more rows. Sentinels are `<extra_id_0>` and so on."""

        if not hasattr(tokenizer, "special_ids"):
            raise TypeError(f"[vocabulary] tokenizer must be a fastlm.Tokenizer, got {type(tokenizer).__name__}.")

        def find(*tokens: str | None) -> int | None:
            return next((i for t in tokens if t is not None and (i := tokenizer.id(t)) is not None), None)

        role = tokenizer.special.get
        first, sentinels = tokenizer.id("<extra_id_0>"), 0
        while first is not None and tokenizer.id(f"<extra_id_{sentinels}>") == first - sentinels:
            sentinels += 1
        count = tokenizer.vocab_size
        continues = np.zeros(size or count, bool)
        continues[:count] = continuing([tokenizer.token(i) or "" for i in range(count)])
        return cls(
            size or count, frozenset(tokenizer.special_ids), find(role("pad"), "[PAD]", "<pad>"), find(role("cls"), "[CLS]", "<cls>"),
            find(role("sep"), "[SEP]", "<sep>"), find(role("mask"), "[MASK]", "<mask>"), find(role("eos"), "</s>"),
            first, sentinels, continues,
        )  # fmt: skip

    @staticmethod
    def need(vocabulary: Any, objective: str, *names: str) -> None:
        """An error unless it is a Vocabulary in which these ids are there."""
        if not isinstance(vocabulary, Vocabulary):
            raise TypeError(
                f"[{objective}] vocabulary must be a data.Vocabulary, Vocabulary.of(tokenizer), got {type(vocabulary).__name__}."
            )
        missing = [name for name in names if getattr(vocabulary, name) is None]
        if missing:
            raise ValueError(f"[{objective}] vocabulary must have {', '.join(missing)}: give Vocabulary({missing[0]}=...).")

    def id(self, name: str) -> int:
        """The id of pad, cls, sep, mask, eos or first_sentinel, which must be there."""
        found: int | None = getattr(self, name)
        if found is None:
            raise ValueError(f"[vocabulary] {name} must be there: give Vocabulary({name}=...).")
        return found

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """(size,): whether an id is special."""
        table = np.zeros(self.size, bool)
        table[list(self.special)] = True
        return table

    @cached_property
    def ordinary(self) -> Ints:
        """The ids that a random token is drawn from."""
        return np.flatnonzero(~self.is_special).astype(np.int32)


def continuing(tokens: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each token goes on with a word, by the way that vocabularies write: `##ing` of WordPiece; `ing` where words begin with
    a space, a Ġ or a ▁."""
    pieces = any(t.startswith("##") for t in tokens)
    return np.array([len(t) > 2 and t.startswith("##") if pieces else t[:1].isalnum() and t[0] not in "ĠĊĉč" for t in tokens], bool)


class Objective(Protocol):
    """What is learnt from text: from rows of tokens to a Batch. `objective(rows, seed, step, numbers)` draws row r from
    (seed, step, numbers[r]) alone: neither the rows beside it nor the order of calls matter."""

    trains: ClassVar[str]  # the kind of model that it is for: causal, encoder-decoder, permutation, or an encoder's head

    @property
    def copies(self) -> int | None:
        """Of a text that is seen in every epoch, how many differing rows are made; None: always another."""

    def window(self, context: int) -> int:
        """Tokens of text that make a row of a model that sees `context`."""

    def stride(self, context: int) -> int:
        """Tokens between the beginnings of two windows."""

    def __call__(self, rows: Any, seed: int = 0, step: Any = 0, numbers: Any = None) -> Any: ...


def philox(seed: Any, stream: int, counter: Sequence[int] = (0, 0, 0, 0)) -> np.random.Generator:
    """The generator with the key (seed, stream). Of a list that holds a seed beyond 2^63 NumPy would make floats."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"[data] seed must be an integer of 64 bits, got {seed!r:.60}.")
    key = np.array([int(seed) & ((1 << 64) - 1), stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, np.uint64)))


def draws(seed: int, step: Any, numbers: Any, count: int, stream: int = 0) -> list[np.random.Generator]:
    """One generator a row, of the Philox stream (seed, step, number). step: one for all, or (count,); numbers: 0, 1 ... if None.
    stream: tells apart what is drawn for different ends."""
    steps = np.broadcast_to(np.asarray(step, np.uint64), (count,))
    numbers = np.arange(count) if numbers is None else np.asarray(numbers)
    if numbers.shape != (count,):
        raise ValueError(f"[objective] numbers must be (B,) = ({count},), one for each row, got {numbers.shape}.")
    # The counter's last word is that of objectives: other users of the seed count from 0.
    return [philox(seed, stream, (0, int(n), int(s), 1)) for n, s in zip(numbers, steps, strict=True)]


def as_rows(op: str, rows: Any, size: int, shortest: int = 1) -> list[Ints]:
    """rows, a matrix or a list of lists of ids, as int32 arrays; checked."""
    found = [np.asarray(row) for row in rows]
    if not found:
        raise ValueError(f"[{op}] rows must have a sequence, got none.")
    for i, row in enumerate(found):
        if row.ndim != 1 or row.dtype.kind not in "iu" or len(row) < shortest:
            raise ValueError(
                f"[{op}] rows must be lists of at least {shortest} integers, got {row.dtype} {row.shape} in number {i}."
            )
        if not (row.min() >= 0 and row.max() < size):
            raise ValueError(f"[{op}] rows must hold ids from 0 to {size - 1}, got {row.min()} to {row.max()} in number {i}.")
    return [row.astype(np.int32) for row in found]


def padded(rows: Sequence[NDArray[Any]], fill: int, left: bool = False) -> tuple[Ints, NDArray[np.bool_] | None]:
    """Rows in one matrix (B, T), and where there are tokens; None for the latter if all are as long."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    there = np.arange(width) < lengths[:, None]
    if left:
        there = there[:, ::-1]
    out = np.full(there.shape, fill, np.int32)
    out[there] = np.concatenate(rows)
    return out, None if there.all() else np.ascontiguousarray(there)


def checked_rate(op: str, name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """ValueError unless low < value < high, or value = high."""
    if not isinstance(value, Real) or not low < float(value) <= high:
        raise ValueError(f"[{op}] {name} must be above {low} and at most {high}, got {value!r:.60}.")
