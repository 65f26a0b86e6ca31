"""Objectives: counts, statistics, what is never touched, round trips, and the reference's own constructions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastlm import data, models, train
from fastlm.data.objectives import pairs
from fastlm.data.objectives.base import continuing
from fastlm.data.objectives.masked import words

V = 300
CONTINUES = np.zeros(V, bool)
CONTINUES[200:290] = True
VOCABULARY = data.Vocabulary(
    V, frozenset({5}), pad=0, cls=1, sep=2, mask=3, eos=4, first_sentinel=299, sentinels=9, continues=CONTINUES
)
SPECIAL = {0, 1, 2, 3, 4, 5, *range(291, 300)}
RNG = np.random.default_rng(0)


def text(*shape, seed=0):
    return np.random.default_rng(seed).integers(6, 291, shape)


def same(a, b):
    for name, x in a._asdict().items():
        y = getattr(b, name)
        for u, w in zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]:
            np.testing.assert_array_equal(u, w, err_msg=name)


def take(batch, rows):
    """Those rows of a batch."""
    return type(batch)(*(None if x is None else tuple(t[rows] for t in x) if isinstance(x, tuple) else x[rows] for x in batch))


def story(seed=0, count=40):
    """Documents of sentences; every token says its place: sentence number in the low digits is not needed, values are unique."""
    rng, at, documents = np.random.default_rng(seed), 0, []
    for _ in range(count):
        document = []
        for _ in range(int(rng.integers(1, 9))):
            n = int(rng.integers(1, 12))
            document.append(np.arange(at, at + n))
            at += n
        documents.append(document)
    return documents, at


DOCUMENTS, TOKENS = story()
UNIQUE = data.Vocabulary(TOKENS + 10, pad=TOKENS, cls=TOKENS + 1, sep=TOKENS + 2, mask=TOKENS + 3)

# Draws


def makers():
    masked = data.Masked(VOCABULARY)
    pairing = data.SentencePairs(data.Masked(UNIQUE))
    chunks = pairing.chunks(data.Documents(DOCUMENTS), 32)
    rows = text(6, 40)
    yield "masked", lambda s, t, n: masked(rows[n], s, t, n)
    yield "whole word", lambda s, t, n: data.Masked(VOCABULARY, whole_word=True)(rows[n], s, t, n)
    yield "replaced", lambda s, t, n: data.Replaced.of(VOCABULARY)(rows[n], s, t, n)
    yield "spans", lambda s, t, n: data.SpanCorruption(VOCABULARY)(rows[n], s, t, n)
    yield "original", lambda s, t, n: data.Permutation(VOCABULARY)(rows[n], s, t, n)
    yield "huggingface", lambda s, t, n: data.Permutation(VOCABULARY, "huggingface")(rows[n], s, t, n)
    yield "pairs", lambda s, t, n: pairing(chunks, s, t, n)


@pytest.mark.parametrize(("name", "make"), list(makers()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_row_depends_on_seed_step_and_its_number_alone(name, make):
    whole = make(7, 3, np.arange(6))
    same(whole, make(7, 3, np.arange(6)))
    some = np.array([4, 1])
    if name != "pairs":
        same(take(whole, some), make(7, 3, some))
    else:  # the padding is as wide as the batch's longest row
        part = make(7, 3, some)
        n = part.ids.shape[1]
        np.testing.assert_array_equal(part.ids, whole.ids[some][:, :n])
        np.testing.assert_array_equal(part.targets[1], whole.targets[1][some])
    for other in (make(8, 3, np.arange(6)), make(7, 4, np.arange(6))):
        assert any(not np.array_equal(a, b) for a, b in zip(whole, other, strict=True) if not isinstance(a, tuple))


def test_draws_have_streams_of_their_own():
    """Neither steps, numbers, seeds nor streams meet, nor what else uses Philox with the seed."""
    seen = set()
    for seed in (0, 1, 2):
        for stream in (0, 1):
            for step in (0, 1, 2):
                for rng in pairs.draws(seed, step, None, 3, stream):
                    seen.add(rng.integers(0, 1 << 62))
        for epoch in range(3):
            seen.add(np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 1 << 62))
    assert len(seen) == 3 * (2 * 3 * 3 + 3)
    with pytest.raises(ValueError, match=r"\[objective\] numbers must be \(B,\) = \(2,\)"):
        data.Masked(VOCABULARY)(text(2, 9), numbers=[1, 2, 3])


def test_seeds_are_64_bits():
    """Those from 2^63 on went through float64."""
    rows, made = text(1, 400), data.Masked(VOCABULARY)
    seeds = (0, 1 << 63, (1 << 63) + 1, (1 << 64) - 1)
    assert len({made(rows, seed).ids.tobytes() for seed in seeds}) == 4
    assert len({data.Loader(rows[0], 4, 8, seed).batch(1).ids.tobytes() for seed in seeds}) == 4
    same(made(rows, -1), made(rows, (1 << 64) - 1))
    for seed in (1 << 64, -(1 << 63) - 1, 1.5, None, True):
        with pytest.raises(ValueError, match=rf"\[data\] seed must be an integer of 64 bits, got {seed!r}"):
            made(rows, seed)
        with pytest.raises(ValueError, match=rf"\[data\] seed must be an integer of 64 bits, got {seed!r}"):
            data.Loader(rows[0], 4, 8, seed)


# Causal


def test_causal():
    rows = text(3, 9)
    batch = data.Causal()(rows)
    np.testing.assert_array_equal(batch.ids, rows[:, :-1])
    np.testing.assert_array_equal(batch.targets, rows[:, 1:])
    assert (batch.ids.dtype, batch.targets.dtype) == (np.int32, np.int32)


# Masked


@pytest.mark.parametrize("n", [1, 2, 3, 10, 22, 61, 126])
def test_masked_counts_exactly(n):
    batch = data.Masked(VOCABULARY)(text(50, n))
    assert batch.ids.shape == (50, n + 2)
    counts = (batch.targets != -100).sum(1)
    assert set(counts.tolist()) == {min(n, max(1, round(0.15 * (n + 2))))}


def test_masked_statistics():
    """80 / 10 / 10 within five standard deviations, every position and token as likely, random tokens uniform and never special."""
    rows = text(4000, 126)
    batch = data.Masked(VOCABULARY)(rows, seed=1)
    whole = np.concatenate([np.full((4000, 1), 1), rows, np.full((4000, 1), 2)], 1)
    asked = batch.targets != -100
    np.testing.assert_array_equal(batch.targets[asked], whole[asked])
    np.testing.assert_array_equal(batch.ids[~asked], whole[~asked])
    assert not asked[:, [0, -1]].any()
    n = int(asked.sum())
    assert n == 4000 * 19
    drawn = 290 - 6 + 1  # ordinary ids
    hidden, kept = batch.ids[asked] == 3, batch.ids[asked] == batch.targets[asked]
    for share, count in ((0.8, hidden.sum()), (0.1 + 0.1 / drawn, kept.sum()), (0.1 * (1 - 1 / drawn), (~hidden & ~kept).sum())):
        assert abs(count - share * n) < 5 * math.sqrt(n * share * (1 - share)), share
    put = batch.ids[asked][~hidden & ~kept]
    assert not set(put.tolist()) & SPECIAL
    expected = len(put) / drawn
    counts = np.bincount(put, minlength=V)[6:291]
    assert (np.square(counts - expected) / expected).sum() < drawn + 5 * math.sqrt(2 * drawn)
    places = asked[:, 1:-1].sum(0)
    assert np.abs(places - n / 126).max() < 5 * math.sqrt(n / 126)


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_masked(whole_word):
    rows = text(200, 30)
    rows[RNG.random(rows.shape) < 0.5] = RNG.choice([5, 2, 298])
    batch = data.Masked(VOCABULARY, rate=1.0, whole_word=whole_word)(rows)
    free = ~np.isin(rows, list(SPECIAL))
    asked = batch.targets[:, 1:-1] != -100
    np.testing.assert_array_equal(asked, free)  # a rate of 1 takes all that may be taken
    np.testing.assert_array_equal(batch.ids[:, 1:-1][~free], rows[~free])
    nothing = data.Masked(VOCABULARY)(np.full((2, 5), 5))
    assert (nothing.targets == -100).all()


def naive_words(row):
    groups, before = [], None
    for i, t in enumerate(row):
        if t in SPECIAL:
            before = None
            continue
        if CONTINUES[t] and before is not None:
            groups[-1].append(i)
        else:
            groups.append([i])
        before = t
    return groups


def test_whole_words_all_or_nothing():
    rows = text(400, 60)
    rows[:, 30] = 5
    batch = data.Masked(VOCABULARY, whole_word=True)(rows)
    lengths = []
    for row, targets in zip(rows, batch.targets[:, 1:-1], strict=True):
        groups = naive_words(row)
        assert [g.tolist() for g in words(row.astype(np.int32), VOCABULARY)] == groups
        asked = set(np.flatnonzero(targets != -100).tolist())
        taken = [g for g in groups if asked & set(g)]
        assert asked == {i for g in taken for i in g}
        assert 0 < len(asked) <= 9 or len(taken) == 1  # round(0.15 * 62); one word where none fits
        # No word that was left out would have fitted.
        assert len(asked) > 9 or all(len(asked) + len(g) > 9 for g in groups if g not in taken)
        lengths.append(len(asked))
    assert np.mean(lengths) > 8


def test_whole_word_longer_than_the_count():
    row = np.array([[6, *[200] * 8, 7, *[200] * 5]])
    batch = data.Masked(VOCABULARY, whole_word=True)(row)
    assert (batch.targets[0] != -100).nonzero()[0].tolist() == list(range(10, 16))  # the shorter of two words


def test_how_vocabularies_write_words():
    assert continuing(["un", "##able", "##", "[MASK]"]).tolist() == [False, True, False, False]
    assert continuing(["Ġun", "able", "!", "Ċ", ""]).tolist() == [False, True, False, False, False]
    assert continuing(["▁un", "able", " ", "é"]).tolist() == [False, True, False, True]


def test_static_and_dynamic():
    rows = text(4, 60)
    static = data.Masked(VOCABULARY, copies=10)
    batches = [static(rows, seed=2, step=step) for step in range(30)]
    for step in range(20):
        same(batches[step], batches[step + 10])
    assert len({b.ids.tobytes() for b in batches}) == 10
    dynamic = [data.Masked(VOCABULARY)(rows, seed=2, step=step) for step in range(30)]
    assert len({b.ids.tobytes() for b in dynamic}) == 30


@pytest.mark.parametrize("copies", [None, 3])
def test_loader_masks_texts_anew_or_from_copies(copies):
    """Static: a text meets `copies` maskings, however often it comes. Dynamic: another each time. Both whatever the batch size."""
    tokens = np.arange(6, 6 + 240) % 280 + 6
    objective = data.Masked(VOCABULARY, copies=copies)
    loader = data.Loader(tokens, 6, 26, seed=5, objective=objective)
    assert (loader.count, loader.stride) == (10 if copies else 9, 24)
    seen: dict[int, set[bytes]] = {}
    rows = []
    for n in range(loader.count * 9 // 6):
        batch = loader.batch(n)
        rows.append(batch.ids)
        whole = np.where(batch.targets == -100, batch.ids, batch.targets)
        for ids, text_ in zip(batch.ids, whole, strict=True):
            seen.setdefault(text_.tobytes(), set()).add(ids.tobytes())
    if copies:
        assert len(seen) == 10
        assert {len(s) for s in seen.values()} == {3}
    else:
        assert len(seen) > 50  # cut at other places in each epoch
    other = data.Loader(tokens, 9, 26, seed=5, objective=objective)
    np.testing.assert_array_equal(np.concatenate(rows)[:54], np.concatenate([other.batch(n).ids for n in range(6)]))


def test_padding_and_ragged_rows():
    rows = [text(n, seed=n) for n in (3, 9, 1)]
    batch = data.Masked(VOCABULARY)(rows)
    np.testing.assert_array_equal(batch.mask.sum(1), [5, 11, 3])
    assert (batch.ids[~batch.mask] == 0).all()
    assert (batch.targets[~batch.mask] == -100).all()
    assert (batch.targets != -100).sum(1).tolist() == [1, 2, 1]
    alone = data.Masked(VOCABULARY)([rows[2]], numbers=[2])
    np.testing.assert_array_equal(alone.ids[0], batch.ids[2, :3])


# Replaced tokens


def test_replaced_tokens():
    rows = text(300, 40)
    b = data.Replaced.of(VOCABULARY)(rows)
    asked = b.targets != -100
    assert (b.ids[asked] == 3).all()
    assert ((b.uniforms >= 0) & (b.uniforms < 1)).all()
    assert abs(b.uniforms[asked].mean() - 0.5) < 5 * math.sqrt(1 / 12 / asked.sum())
    samples = np.where(RNG.random(b.ids.shape) < 0.3, b.targets, text(*b.ids.shape, seed=9))
    found = data.replaced(data.EncoderBatch(b.ids, b.targets, b.mask), samples)
    for r, i in np.ndindex(b.ids.shape):
        if asked[r, i]:
            assert found.ids[r, i] == samples[r, i]
            assert found.targets[r, i] == (samples[r, i] != b.targets[r, i])
        else:
            assert (found.ids[r, i], found.targets[r, i]) == (b.ids[r, i], 0)
    assert 0 < found.targets.sum() < asked.sum()
    short = data.Masked(VOCABULARY)([rows[0], rows[1, :9]])
    assert (data.replaced(short, short.ids).targets[1, 11:] == -100).all()
    with pytest.raises(ValueError, match=r"\[replaced\] samples must be \(B, T\) = \(2, 42\) integers, got int64 \(2, 41\)"):
        data.replaced(short, np.zeros((2, 41), int))


# Sentence pairs


def whole_text(batch, row):
    tokens, _ = batch.targets
    ids = np.where(tokens[row] == -100, batch.ids[row], tokens[row])
    return ids if batch.mask is None else ids[batch.mask[row]]


@pytest.mark.parametrize("kind", ["next", "order"])
def test_sentence_pairs(kind):
    documents = data.Documents(DOCUMENTS)
    owner = np.concatenate([np.full(sum(map(len, d)), i) for i, d in enumerate(DOCUMENTS)])
    begins = {int(s[0]) for d in DOCUMENTS for s in d}
    objective = data.SentencePairs(data.Masked(UNIQUE), kind)
    chunks = objective.chunks(documents, 32)
    labels, forced, whole = [], 0, 0
    for step in range(20):
        batch = objective(chunks, seed=1, step=step)
        assert batch.ids.shape[1] <= 32
        for row, label in enumerate(batch.targets[1]):
            ids = whole_text(batch, row)
            n = len(ids)
            first, last = np.flatnonzero(ids == UNIQUE.sep)
            assert (ids[0], last) == (UNIQUE.cls, n - 1)
            a, b = ids[1:first], ids[first + 1 : last]
            np.testing.assert_array_equal(batch.segments[row, :n], [0] * (first + 1) + [1] * (len(b) + 1))
            assert len(a)
            assert len(b)
            assert (np.diff(a) == 1).all()  # tokens of consecutive sentences, cut at their ends only
            assert (np.diff(b) == 1).all()
            one, two = (b, a) if kind == "order" and label else (a, b)
            alike = len(set(owner[ids[ids < TOKENS]].tolist())) == 1
            if kind == "next" and label:
                assert owner[a[0]] != owner[b[0]]
            else:
                assert alike
                assert one[-1] < two[0]
            span = documents.sentences[chunks.spans[row, :2]]
            if not (kind == "next" and label) and len(a) + len(b) == span[1] - span[0]:  # nothing was dropped
                assert (one[0], two[-1]) == (documents.tokens[span[0]], documents.tokens[span[1] - 1])
                assert int(two[0]) in begins
                whole += 1
            single = chunks.spans[row, 1] - chunks.spans[row, 0] == 1
            forced += single
            if not single:
                labels.append(int(label))
    assert whole > 100
    n = len(labels)
    assert abs(sum(labels) - n / 2) < 5 * math.sqrt(n / 4)
    assert (forced > 0) == (kind == "next")  # one sentence has no next; then it is always another's


def test_sentence_order_swaps_halves():
    """The two labels of one chunk are the same two pieces, one way and the other."""
    documents = data.Documents([[[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]]])
    vocabulary = data.Vocabulary(20, pad=0, cls=11, sep=12, mask=13)
    objective = data.SentencePairs(data.Masked(vocabulary), "order", short=0.0, tokens=False)
    assert objective.trains == "next_sentence"
    chunks = objective.chunks(documents, 16)
    seen = set()
    for step in range(20):
        batch = objective(chunks, step=step)
        seen |= {(int(y), *map(int, row)) for row, y in zip(batch.ids, batch.targets, strict=True)}
    assert seen == {
        (0, 11, 1, 2, 3, 12, 4, 5, 12), (1, 11, 4, 5, 12, 1, 2, 3, 12),
        (0, 11, 6, 7, 12, 8, 9, 10, 12), (1, 11, 8, 9, 10, 12, 6, 7, 12),
    }  # fmt: skip


def test_short_pairs_and_truncation():
    long = [[np.arange(i * 100 + j * 20, i * 100 + j * 20 + 20) for j in range(5)] for i in range(30)]
    vocabulary = data.Vocabulary(3010, pad=3000, cls=3001, sep=3002, mask=3003)
    for short, low, high in ((0.0, 0, 0), (0.1, 0.05, 0.15)):
        objective = data.SentencePairs(data.Masked(vocabulary), short=short, tokens=False)
        chunks = objective.chunks(data.Documents(long), 39)
        batches = [objective(chunks, step=step) for step in range(20)]
        lengths = np.concatenate([b.mask.sum(1) if b.mask is not None else np.full(len(b.ids), b.ids.shape[1]) for b in batches])
        assert lengths.max() == 39
        two = lengths[np.tile(chunks.spans[:, 1] - chunks.spans[:, 0] > 1, 20)]
        assert low <= (two < 39).mean() <= high


def test_documents_are_cut_at_ends():
    tokens = np.array([7, 8, 1, 9, 1, 1, 7, 1, 1, 1, 5, 6], np.uint16)
    documents = data.Documents.cut(tokens, [1])
    assert documents.sentences.tolist() == [0, 3, 6, 10, 12]
    assert documents.documents.tolist() == [0, 2, 3, 4]
    assert len(documents) == 3
    assert documents.tokens is tokens
    assert documents.text(1, 3).tolist() == [9, 1, 1, 7, 1, 1, 1]
    same_ = data.Documents([[[7, 8, 1], [9, 1, 1]], [[], [7, 1, 1, 1]], [], [[5, 6]]])
    np.testing.assert_array_equal(same_.sentences, documents.sentences)
    np.testing.assert_array_equal(same_.documents, documents.documents)


# Span corruption


def test_span_corruption_lengths():
    """568 tokens give 512 and 114, as published."""
    objective = data.SpanCorruption(data.Vocabulary(32128, pad=0, eos=1, first_sentinel=32099, sentinels=100))
    assert objective.window(512) == 568
    batch = objective(np.random.default_rng(0).integers(3, 32000, (3, 568)))
    assert batch.source_ids.shape == (3, 512)
    assert batch.targets.shape == batch.decoder_ids.shape == (3, 114)
    assert batch.mask is None
    assert (batch.source_ids[:, -1] == 1).all()
    assert (batch.targets[:, -1] == 1).all()
    for row in (*batch.source_ids, *batch.targets):
        np.testing.assert_array_equal(row[(row >= 32000)], np.arange(32099, 32099 - 28, -1))  # descending, each once
    np.testing.assert_array_equal(batch.decoder_ids[:, 0], 0)
    np.testing.assert_array_equal(batch.decoder_ids[:, 1:], batch.targets[:, :-1])
    for context in range(4, 200):
        n = objective.window(context)
        assert objective.lengths(n)[0] <= context < objective.lengths(n + 1)[0]


def rebuilt(source, target):
    """The text from both sides, by reading sentinels."""
    pieces, sentinel = {}, None
    for t in target[: target.index(4)]:
        if t >= 291:
            sentinel, pieces[t] = t, []
        else:
            pieces[sentinel].append(t)
    assert source[-1] == 4
    return [x for t in source[:-1] for x in (pieces[t] if t >= 291 else [t])]


def test_span_corruption_round_trip():
    rows = [text(n, seed=n) for n in range(2, 61)]
    batch = data.SpanCorruption(VOCABULARY, mean_span=2.0)(rows)
    for i, row in enumerate(rows):
        there = slice(None) if batch.mask is None else batch.mask[i]
        source = batch.source_ids[i][there].tolist()
        target = [t for t in batch.targets[i].tolist() if t != -100]
        assert rebuilt(source, target) == row.tolist()
        assert source[0] < 291 <= source[-2]  # begins with what stays, ends with a span
        out, spans = data.SpanCorruption(VOCABULARY, mean_span=2.0).counts(len(row))
        assert (len(source), len(target)) == (len(row) - out + spans + 1, out + spans + 1)
    pad = batch.targets == -100
    assert (batch.decoder_ids[:, 1:][pad[:, :-1]] == 0).all()


def test_spans_are_equally_likely():
    """Of 12 tokens 4 in 2 spans: every mask, 3 ways to part the spans times 7 to part the text, as often as the others."""
    objective = data.SpanCorruption(VOCABULARY, rate=1 / 3, mean_span=2.0)
    masks = [objective.noise(12, rng).tobytes() for rng in pairs.draws(3, 0, None, 21000)]
    _, counts = np.unique(masks, return_counts=True)
    assert len(counts) == 21
    assert (np.square(counts - 1000) / 1000).sum() < 20 + 5 * math.sqrt(40)


# Labels, vocabularies, refusals


def test_labelled():
    examples = data.Labelled([[5, 6, 7], [8], [9, 10]], [1, 0, 1])
    batch = examples.batch([2, 0])
    np.testing.assert_array_equal(batch.ids, [[9, 10, 0], [5, 6, 7]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(batch.targets, [1, 1])
    several = data.Labelled([[5, 6], [8]], [[0.5, 1.0], [1, 0]])
    assert [several.batch(numbers).targets.dtype.kind for numbers in ([0], [1], [0, 1])] == ["f"] * 3  # else 1 of 2 single labels
    tokens = data.Labelled([[5, 6], [8]], [[1, 2], [0]], segments=[[0, 1], [0]], per_token=True)
    batch = tokens.batch([0, 1])
    np.testing.assert_array_equal(batch.targets, [[1, 2], [0, -100]])
    np.testing.assert_array_equal(batch.segments, [[0, 1], [0, 0]])
    for arguments, message in (
        (([[5]], [1, 2]), "labels must be as many as ids, 1, got 2"),
        (([[]], [1]), "lists of at least 1 integers"),
        (([[5, 6]], [[1]], None, True), r"labels must be one for each token, 2 in number 0, got the shape \(1,\)"),
        (([[5, 6]], [1], [[0]]), "segments must be one for each token"),
        (([[5, 6]], [[0.5, 1.5]], None, True), r"labels must be integers, got \[0\.5, 1\.5\] in number 0"),
        (([[5], [6]], [1, "no"]), "labels must be numbers, got 'no' in number 1"),
        (
            ([[5], [6, 7]], [[1], [0, 1]]),
            r"labels must have one shape, got \(1,\) in number 0 and \(2,\) in number 1: .*per_token=True",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            data.Labelled(*arguments)
    with pytest.raises(TypeError, match="labels must be a list or an array"):
        data.Labelled([[5]], iter([1]))


def test_shortest_permutations_ask_for_something():
    for K in range(2, 9):
        least = max(4, K + K % 2)
        objective = data.Permutation(VOCABULARY, K=K)
        assert (objective(text(5, objective.window(least))).targets != -100).any(1).all()
        with pytest.raises(ValueError, match=rf"context must be at least {least}, got {least - 1}"):
            objective.window(least - 1)


def test_vocabulary():
    assert VOCABULARY.special == SPECIAL
    np.testing.assert_array_equal(VOCABULARY.ordinary, np.arange(6, 291))
    for arguments, message in (
        ({"size": 10, "mask": 10}, "mask must be an id from 0 to 9, got 10"),
        ({"size": 10, "first_sentinel": 3, "sentinels": 5}, "the last sentinel must be an id from 0 to 9, got -1"),
        ({"size": 2, "mask": 0, "pad": 1}, "size must be more than the 2 special ids"),
        ({"size": 9, "special": frozenset({9})}, "special must be ids from 0 to 8, got 9"),
        ({"size": 9, "continues": np.zeros(8, bool)}, r"continues must be \(size,\) = \(9,\)"),
    ):
        with pytest.raises(ValueError, match=rf"\[vocabulary\] {message}"):
            data.Vocabulary(**arguments)


def test_refusals():
    bare = data.Vocabulary(50)
    for make, message in (
        (lambda: data.Masked(bare), r"\[masked\] vocabulary must have mask"),
        (lambda: data.Masked(VOCABULARY, rate=0.0), r"\[masked\] rate must be above 0.0 and at most 1.0, got 0.0"),
        (lambda: data.Masked(VOCABULARY, replace=0.9, random=0.2), "replace and random must be shares of 1"),
        (lambda: data.Masked(VOCABULARY, copies=0), "copies must be None or at least 1, got 0"),
        (lambda: data.Masked(VOCABULARY)([[5, 300]]), "rows must hold ids from 0 to 299, got 5 to 300 in number 0"),
        (lambda: data.Masked(VOCABULARY)([[5.0]]), "rows must be lists of at least 1 integers, got float64"),
        (lambda: data.Masked(VOCABULARY)([]), "rows must have a sequence, got none"),
        (lambda: data.SpanCorruption(bare), "vocabulary must have eos, pad, first_sentinel"),
        (lambda: data.SpanCorruption(VOCABULARY)([[7]]), "at least 2 integers"),
        (lambda: data.SpanCorruption(VOCABULARY)(text(1, 400)), "a sentinel for each of 20 spans, got 9"),
        (lambda: data.SpanCorruption(VOCABULARY).window(2), "context must be at least 3, got 2"),
        (lambda: data.Permutation(VOCABULARY, "other"), "style must be one of original, huggingface, got 'other'"),
        (lambda: data.Permutation(VOCABULARY).window(5), "context must be at least 6"),
        (lambda: data.Permutation(VOCABULARY, "huggingface").window(3), "context must be at least 4"),
        (lambda: data.SentencePairs(data.Masked(VOCABULARY), "last"), "kind must be one of next, order"),
        (
            lambda: data.SentencePairs(data.Masked(VOCABULARY)).chunks(data.Documents([[[7, 8]]]), 9),
            "at least 2 for the next sentence",
        ),
        (
            lambda: data.SentencePairs(data.Masked(VOCABULARY), "order").chunks(data.Documents([[[7, 8]]]), 9),
            "two sentences in succession",
        ),
        (lambda: data.Causal()(np.zeros((2, 3))), r"rows must be \(B, T \+ 1\) integers"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_mistakes_are_said_by_name():
    """These were errors of Python's own, or of other arguments."""
    masked, gpt = data.Masked(VOCABULARY), models.create("gpt-char")
    bert = models.create(models.bert.BertConfig(60, context=32, d_model=32, n_layer=1, n_head=2, d_ff=64, head="masked_lm"))
    for wrong, error, message in (
        (lambda: data.Masked(VOCABULARY, rate="x"), ValueError, r"\[masked\] rate must be above 0\.0 and at most 1\.0, got 'x'"),
        (
            lambda: data.Masked(VOCABULARY, replace="x"),
            ValueError,
            r"\[masked\] replace and random must be shares of 1, got 'x' and 0\.1",
        ),
        (
            lambda: data.Masked(VOCABULARY, copies=2.5),
            ValueError,
            r"\[masked\] copies must be None or at least 1, got 2\.5: an integer",
        ),
        (
            lambda: data.SentencePairs(masked, ends=5),
            TypeError,
            r"\[sentence_pairs\] ends must be the ids .*, \(5,\), not one alone",
        ),
        (
            lambda: data.Documents([[5, 6], [7, 8]]),
            TypeError,
            r"\[documents\] documents must be lists of sentences, and these lists of ids",
        ),
        (
            lambda: data.Loader(np.arange(50), 2, 2, 0, masked),
            ValueError,
            r"context must be more than the 2 places that are .* got 2",
        ),
        (lambda: train.Distilled(gpt), TypeError, r"\[distilled\] a model must be an encoder of fastlm\.models, got GPT"),
        (lambda: train.Electra(gpt, bert), TypeError, r"\[electra\] a model must be an encoder"),
        (lambda: train.teacher(gpt), TypeError, r"\[teacher\] a model must be an encoder"),
        (lambda: train.student_of(gpt), TypeError, r"\[student_of\] a model must be an encoder"),
        (lambda: train.student_of(bert, 3), TypeError, r"\[student_of\] layers must be numbers of layers, such as .*, got 3"),
    ):
        with pytest.raises(error, match=message):
            wrong()
