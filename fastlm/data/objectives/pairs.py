"""Two pieces of text and how they stand to each other: next sentence (Devlin et al. 2018, arXiv:1810.04805, section 3.1) and sentence
order (Lan et al. 2019, arXiv:1909.11942, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm.data.objectives.base import EncoderBatch, Ints, Vocabulary, as_rows, draws, padded
from fastlm.data.objectives.masked import Masked

KINDS = ("next", "order")


class Documents:
    """Documents of sentences of tokens: `tokens` (n,), `sentences` (S + 1,), where each begins, `documents` (D + 1,), the first sentence
    of each; `validation`: those that are held out, or None."""

    validation: Documents | None = None

    def __init__(self, documents: Sequence[Sequence[Any]], validation: Documents | None = None) -> None:
        """documents: lists of sentences, which are lists of ids; empty ones are left out."""
        self.validation = validation
        try:
            kept = [[np.asarray(s) for s in d if len(s)] for d in documents]
        except TypeError:
            raise TypeError("[documents] documents must be lists of sentences, and these lists of ids.") from None
        kept = [d for d in kept if d]
        rows = as_rows("documents", [s for d in kept for s in d], 1 << 31)
        self._set(np.concatenate(rows), [len(s) for s in rows], [len(d) for d in kept])

    def _set(self, tokens: NDArray[Any], sentences: Any, documents: Any) -> None:
        self.tokens = tokens
        self.sentences = np.concatenate([[0], np.cumsum(sentences)]).astype(np.int64)
        self.documents = np.concatenate([[0], np.cumsum(documents)]).astype(np.int64)

    @classmethod
    def cut(cls, tokens: NDArray[Any], ends: Sequence[int]) -> Documents:
        """From packed tokens: a sentence ends after a token of `ends` (a line break, a full stop), a document after two in succession
        (a blank line). The tokens are not copied."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(f"[documents] tokens must be (n,) integers, got {tokens.dtype} {tokens.shape}.")
        is_end = np.isin(tokens, np.asarray(list(ends), np.int64))
        last = is_end & ~np.append(is_end[1:], False)  # of a run of ends
        last[-1] = True
        after = np.flatnonzero(last)
        closes = is_end[after] & (after > 0) & is_end[np.maximum(after - 1, 0)]
        closes[-1] = True
        out = cls.__new__(cls)
        out._set(tokens, np.diff(after, prepend=-1), np.diff(np.flatnonzero(closes), prepend=-1))
        return out

    def __len__(self) -> int:
        return len(self.documents) - 1

    def text(self, first: int, last: int) -> Ints:
        """The tokens of sentences first to last, the latter not included."""
        return np.asarray(self.tokens[self.sentences[first] : self.sentences[last]], np.int32)


@dataclass(frozen=True)
class Chunks:
    """What one row is made of: consecutive sentences, `spans` (N, 3): first, last, document; up to `limit` tokens in two pieces."""

    documents: Documents
    spans: NDArray[np.int64]
    limit: int

    def __len__(self) -> int:
        return len(self.spans)


@dataclass(frozen=True)
class SentencePairs:
    """Rows `[cls] A [sep] B [sep]`, segments 0 and 1, masked as `masked` says; targets (tokens (B, T), sentences (B,)).

    kind "next": B is what follows A (0), or as often a piece of another document (1), as BERT's create_pretraining_data. kind "order": A
    and B follow each other in this order (0), or were swapped (1), as ALBERT's. Sentences are taken together up to the context and cut
    in two between sentences; where they are too long, tokens are dropped from the longer piece, at its beginning or end by chance. One
    row in `1 / short` aims at a drawn shorter length. A chunk of one sentence has no second: B is of another document, or, for the
    order, no row is made of it. tokens: False asks for the sentences alone, and masks nothing. ends: ids that end a sentence, by which
    packed tokens are cut (see Documents.cut).
    """

    masked: Masked
    kind: str = "next"
    short: float = 0.1
    tokens: bool = True
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.masked, Masked):
            raise TypeError(f"[sentence_pairs] masked must be a data.Masked, got {type(self.masked).__name__}.")
        Vocabulary.need(self.masked.vocabulary, "sentence_pairs", "cls", "sep")
        if not hasattr(self.ends, "__iter__"):
            raise TypeError(f"[sentence_pairs] ends must be the ids that end a sentence, ({self.ends!r:.40},), not one alone.")
        if self.kind not in KINDS:
            raise ValueError(f"[sentence_pairs] kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not 0 <= self.short < 1:
            raise ValueError(f"[sentence_pairs] short must be from 0 to below 1, got {self.short}.")

    @property
    def trains(self) -> str:
        return "pretraining" if self.tokens else "next_sentence"

    @property
    def copies(self) -> int | None:
        return self.masked.copies

    def chunks(self, documents: Documents, context: int) -> Chunks:
        """Every document's sentences, put together until they fill a row."""
        limit = context - 3
        if limit < 2:
            raise ValueError(f"[sentence_pairs] context must be at least 5, got {context}.")
        if documents.tokens.max() >= self.masked.vocabulary.size:
            raise ValueError(
                f"[sentence_pairs] documents must hold ids below {self.masked.vocabulary.size}, got {documents.tokens.max()}."
            )
        lengths = np.diff(documents.sentences)
        spans = []
        for d, (begin, end) in enumerate(zip(documents.documents[:-1], documents.documents[1:], strict=True)):
            first, size = int(begin), 0
            for s in range(int(begin), int(end)):
                size += lengths[s]
                if size >= limit or s + 1 == end:
                    spans.append((first, s + 1, d))
                    first, size = s + 1, 0
        if self.kind == "order":
            spans = [s for s in spans if s[1] - s[0] > 1]
        elif len(documents) < 2:
            raise ValueError("[sentence_pairs] documents must be at least 2 for the next sentence: others are drawn.")
        if not spans:
            raise ValueError("[sentence_pairs] documents must have two sentences in succession that fit the context.")
        return Chunks(documents, np.array(spans, np.int64), limit)

    def __call__(self, chunks: Chunks, seed: int = 0, step: Any = 0, numbers: Any = None) -> EncoderBatch:
        """The rows of chunks `numbers`, default all."""
        v = self.masked.vocabulary
        numbers = np.arange(len(chunks)) if numbers is None else np.asarray(numbers)
        if self.copies is not None:
            step = np.asarray(step) % self.copies
        rows, segments, labels = [], [], []
        for number, rng in zip(numbers, draws(seed, step, numbers, len(numbers), stream=2), strict=True):
            a, b, label = self.pair(chunks, int(number), rng)
            rows.append(np.concatenate([[v.cls], a, [v.sep], b, [v.sep]]).astype(np.int32))
            segments.append(np.repeat([0, 1], [len(a) + 2, len(b) + 1]))
            labels.append(label)
        sentences = np.array(labels, np.int32)
        if self.tokens:
            batch = self.masked.batch(rows, seed, step, numbers)
            return batch._replace(targets=(batch.targets, sentences), segments=padded(segments, 0)[0])
        ids, mask = padded(rows, v.pad or 0)
        return EncoderBatch(ids, sentences, mask, padded(segments, 0)[0])

    def pair(self, chunks: Chunks, number: int, rng: np.random.Generator) -> tuple[Ints, Ints, int]:
        """One chunk's two pieces, and 0 where they stand as in the text."""
        d, (first, last, document) = chunks.documents, (int(x) for x in chunks.spans[number])
        limit = int(rng.integers(2, chunks.limit + 1)) if rng.random() < self.short else chunks.limit
        cut = first + 1 + int(rng.integers(0, max(last - first - 1, 1)))
        other = bool(rng.random() < 0.5)
        a, b = d.text(first, cut), d.text(cut, last)
        if self.kind == "next" and (other or cut == last):
            drawn = int(rng.integers(0, len(d) - 1))
            drawn += drawn >= document
            start, end = int(d.documents[drawn]), int(d.documents[drawn + 1])
            begin = int(rng.integers(start, end))
            b, other = d.text(begin, end)[: chunks.limit], True
        a, b = _cut_to(a, b, limit, rng)
        return (b, a, 1) if self.kind == "order" and other else (a, b, int(other))


def _cut_to(a: Ints, b: Ints, limit: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The longer loses tokens at one end, drawn each time, until both fit together."""
    pieces, ends = [a, b], [[0, len(a)], [0, len(b)]]
    sizes = [len(a), len(b)]
    for coin in rng.random(max(len(a) + len(b) - limit, 0)):
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        ends[longer][int(coin >= 0.5)] += 1 if coin < 0.5 else -1
    return pieces[0][slice(*ends[0])], pieces[1][slice(*ends[1])]
