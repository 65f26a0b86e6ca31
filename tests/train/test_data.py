"""Packed tokens and batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastlm import data
from fastlm.data import corpus as corpus_module
from fastlm.tokenizers import Tokenizer, build

TEXT = "".join(f"line {i} of the text\n" for i in range(400))


def encode(text):
    return [ord(c) for c in text]


def test_prepare(tmp_path):
    corpus = data.prepare(TEXT, encode, tmp_path / "tokens", 256)
    assert bytes(corpus.train.astype(np.uint8)).decode() + bytes(corpus.validation.astype(np.uint8)).decode() == TEXT
    assert len(corpus.validation) == pytest.approx(len(TEXT) / 10, abs=1)
    assert corpus.train.dtype == np.uint16
    assert not corpus.train.flags.writeable
    again = data.open_corpus(tmp_path / "tokens")
    np.testing.assert_array_equal(again.train, corpus.train)
    wide = data.prepare(TEXT, encode, tmp_path / "tokens", 100_000, validation=0.0)
    assert wide.train.dtype == np.uint32
    assert len(wide.validation) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


def test_pieces_do_not_change_the_tokens(tmp_path, monkeypatch):
    seen = []

    def remember(text):
        seen.append(text)
        return encode(text)

    monkeypatch.setattr(corpus_module, "_PIECE", 100)
    monkeypatch.setattr(corpus_module, "_SHARED", 10)
    corpus = data.prepare(TEXT, remember, tmp_path / "tokens", 256, validation=0)
    pieces = [piece for piece in seen if len(piece) > 20]
    assert len(pieces) > 50
    assert max(map(len, seen)) < 200
    assert all(piece[9] == "\n" and not piece[10].isspace() for piece in seen[1:])
    assert corpus.train.tolist() == encode(TEXT)


def pieces_of(maker, text):
    """A tokenizer of the library, which puts something around a text or before it."""
    if maker == "words":
        backend = build.word_piece({t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", *sorted(set(text.lower().split()))])})
        return Tokenizer(backend)
    if maker == "bos and eos":
        bpe = Tokenizer.train_bpe([text], 300)
        build.surround(bpe.backend, "<|endoftext|>", "<|endoftext|>")
        return bpe
    letters = ["<unk>", "\u2581", *sorted(set(text) - {" "})]  # sentencepiece's, with a space before the text
    return Tokenizer(build.scored_pieces({t: i for i, t in enumerate(letters)}, {}, "<unk>"))


@pytest.mark.parametrize("maker", ["words", "bos and eos", "space before", "of its length", "by its place"])
def test_a_text_is_encoded_as_a_whole(tmp_path, monkeypatch, maker):
    """Every piece had its own [CLS] and [SEP], bos, or space. What depends on text that is far away is encoded at once."""
    text = "".join(f"The {i * i} words\nof line {i},  and more.\n\n" for i in range(200))
    if maker == "of its length":
        whole = lambda text: [len(text) % 251] * 3 + encode(text)  # noqa: E731
    elif maker == "by its place":
        whole = lambda text: [(ord(c) + i // 40) % 256 for i, c in enumerate(text)]  # noqa: E731
    else:
        whole = pieces_of(maker, text).encode
    monkeypatch.setattr(corpus_module, "_PIECE", 500)
    monkeypatch.setattr(corpus_module, "_SHARED", 60)
    longest = []
    corpus = data.prepare(text, lambda t: longest.append(len(t)) or whole(t), tmp_path / "tokens", 1000)
    cut = round(len(text) * 0.9)
    assert corpus.train.tolist() == whole(text[:cut])
    assert corpus.validation.tolist() == whole(text[cut:])
    assert (max(longest) < 800) == (maker not in ("of its length", "by its place"))


def test_prepare_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"\[prepare\] ids must be from 0 to 99, got 10 to 120"):
        data.prepare(TEXT, encode, tmp_path / "tokens", 100)
    assert not list(tmp_path.iterdir())  # nothing is left behind
    with pytest.raises(ValueError, match="must not be empty"):
        data.prepare("", encode, tmp_path / "tokens", 256)
    for given, error, message in (
        ({"text": TEXT.encode()}, TypeError, r"text must be a str, got bytes: read a file with Path\.read_text"),
        ({"vocab_size": 0}, ValueError, r"vocab_size must be an integer from 1 to 2\^32, got 0"),
        ({"encode": lambda text: [1.5] * len(text)}, ValueError, r"encode must give a list of integers, got float64"),
        ({"encode": lambda text: [[1, 2], [3, 4]]}, ValueError, r"encode must give a list of integers, got int64 \(2, 2\)"),
        ({"encode": lambda text: None}, ValueError, r"encode must give a list of integers, got object \(\)"),
    ):
        with pytest.raises(error, match=message):
            data.prepare(**({"text": TEXT, "encode": encode, "folder": tmp_path / "tokens", "vocab_size": 256} | given))
    assert not list(tmp_path.iterdir())
    assert data.prepare(TEXT, encode, tmp_path / "numpy", np.int64(256)).vocab_size == 256  # JSON has no numbers of NumPy
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="something other than tokens"):
        data.prepare(TEXT, encode, tmp_path / "tokens", 256)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        data.open_corpus(tmp_path)


@pytest.mark.parametrize("change", [{"train": 1}, {"dtype": "<f4"}, {"version": 9}, {"train": -1}, {"train": "x"}])
def test_manifest_that_lies(tmp_path, change):
    data.prepare(TEXT, encode, tmp_path / "tokens", 256)
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=r"\[open_corpus\]"):
        data.open_corpus(tmp_path / "tokens")


def test_loader():
    tokens = np.arange(1000, dtype=np.uint16)
    loader = data.Loader(tokens, 4, 16, seed=3)
    a, b = loader.batch(7), data.Loader(tokens, 4, 16, seed=3).batch(7)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.targets, a.ids + 1)
    assert a.ids.shape == (4, 16)
    assert a.ids.dtype == np.int32
    assert not np.array_equal(a.ids, loader.batch(8).ids)
    assert not np.array_equal(a.ids, data.Loader(tokens, 4, 16, seed=4).batch(7).ids)
    for n in (17, 18, 32, 33, 50):  # small arrays: never beyond the end
        for number in range(9):
            batch = data.Loader(tokens[:n], 8, 16).batch(number)
            np.testing.assert_array_equal(batch.targets, batch.ids + 1)
            assert batch.targets.max() < n
    with pytest.raises(ValueError, match="at least 17, what a row of 16 reads, got 16"):
        data.Loader(tokens[:16], 4, 16)


def test_loader_visits_every_window_once_an_epoch():
    loader = data.Loader(np.arange(1000, dtype=np.uint16), 7, 16, seed=3)
    assert loader.per_epoch == 61
    starts = np.concatenate([loader.batch(n).ids[:, 0] for n in range(18)])
    first, second = starts[:61], starts[61:122]
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 61
        assert len(set((epoch % 16).tolist())) == 1
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(loader.batch(2).ids[:, 0], starts[14:21])  # back again


def test_windows():
    tokens = np.arange(100, dtype=np.uint16)
    batches = list(data.windows(tokens, 4, 9))
    targets = np.concatenate([b.targets.reshape(-1) for b in batches])
    np.testing.assert_array_equal(targets, np.arange(1, 100))
    assert [len(b.ids) for b in batches] == [4, 4, 3]
    assert len(list(data.windows(tokens, 4, 9, limit=2))) == 2
    assert not list(data.windows(tokens[:9], 4, 9))
