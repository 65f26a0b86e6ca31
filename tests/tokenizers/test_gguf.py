"""The GGUF tokenizer path: llama.cpp's golden tokenizations, and GPT-2 against the tokenizers library on fuzzed text."""

from __future__ import annotations

import json
import lzma
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from fastlm.tokenizers import Tokenizer, TokenizerError
from fastlm.tokenizers.patterns import PATTERNS
from fastlm.tokenizers.stream import byte_alphabet

DATA = Path(__file__).parents[1] / "data" / "vocab"
NAMES = ["gpt-2", "llama-bpe", "llama-spm", "bert-bge"]
WHOLE = os.environ.get("FASTLM_TEST_VOCAB")  # a folder with llama.cpp's models/ggml-vocab-*.gguf


def golden(name: str) -> list[tuple[str, list[int]]]:
    texts = (DATA / "cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (DATA / f"{name}.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    return [(t, [int(i) for i in line.split()]) for t, line in zip(texts, lines, strict=True)]


def subset(name: str) -> tuple[list[int], dict[str, Any]]:
    loaded = json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))
    return loaded["ids"], loaded["metadata"]


def gpt2_metadata() -> dict[str, Any]:
    """GPT-2's vocabulary from its merges: 256 bytes, one token a merge, and the end of text."""
    merges = lzma.decompress((DATA / "gpt-2.bpe.xz").read_bytes()).decode().split("\n")[1:-1]
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 1) + [3], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": np.uint32(50256),
        "tokenizer.ggml.eos_token_id": 50256,
    }


def fuzzed(n: int, seed: int = 0) -> Iterator[str]:
    """Random Unicode, runs of white space, digits, controls, emoji, and what tokenizers trip over."""
    r = random.Random(seed)
    words = [
        " the",
        " don't",
        "'LL",
        "'s",
        " hello",
        "...",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "\u00e9",
        "e\u0301",
        "\u00df",
        "\u0130",
        "<0x41>",
    ]
    pools = [
        lambda: chr(r.randrange(32, 127)),
        lambda: r.choice(" \t\n\r\u00a0\u3000 \u2003"),
        lambda: chr(r.randrange(0, 32)),
        lambda: r.choice("0123456789\u0663\u00bd\u00b2\u2167"),
        lambda: chr(r.choice([r.randrange(0x1F300, 0x1FAFF), 0x200D, 0xFE0F])),
        lambda: chr(r.choice([r.randrange(0, 0xD800), r.randrange(0xE000, 0x110000)])),
        lambda: chr(r.randrange(0x80, 0x600)),
        lambda: chr(r.randrange(0x4E00, 0x9FFF)),
        lambda: r.choice(words),
    ]
    for _ in range(n):
        some = r.sample(pools, r.randrange(1, 4))
        yield "".join(r.choice(some)() * r.choice([1, 1, 1, 2, 5]) for _ in range(r.randrange(24)))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.from_gguf(gpt2_metadata())


@pytest.mark.parametrize("name", NAMES)
def test_golden_with_the_tokens_they_need(name: str) -> None:
    ids, metadata = subset(name)
    tokenizer = Tokenizer.from_gguf(metadata)
    for text, expected in golden(name):
        got = tokenizer.encode(text, special_tokens=False)
        assert [ids[i] for i in got] == expected, repr(text)
        if name != "bert-bge":
            assert tokenizer.decode(got) == text


@pytest.mark.parametrize("name", NAMES)
def test_golden_with_the_whole_vocabulary(name: str, gpt2: Tokenizer) -> None:
    if name == "gpt-2":
        tokenizer = gpt2
    elif WHOLE is None:
        pytest.skip("set FASTLM_TEST_VOCAB to a folder with llama.cpp's models/ggml-vocab-*.gguf")
    else:
        from gguf import GGUFReader

        fields = GGUFReader(Path(WHOLE) / f"ggml-vocab-{name}.gguf").fields
        tokenizer = Tokenizer.from_gguf({k: v.contents() for k, v in fields.items() if k.startswith("tokenizer.")})
    for text, expected in golden(name):
        assert tokenizer.encode(text, special_tokens=False) == expected, repr(text)


def test_gpt2_equals_the_library_on_10000_fuzzed_strings(gpt2: Tokenizer, tmp_path: Path) -> None:
    metadata = gpt2_metadata()
    (tmp_path / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}))
    (tmp_path / "vocab.bpe").write_bytes(lzma.decompress((DATA / "gpt-2.bpe.xz").read_bytes()))
    library = ByteLevelBPETokenizer(str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe"))
    library.add_special_tokens(["<|endoftext|>"])
    texts = list(fuzzed(10_000))
    ids = gpt2.encode_batch(texts)
    assert ids == [e.ids for e in library.encode_batch(texts)]
    assert [gpt2.decode(i, special_tokens=True) for i in ids] == texts
    assert Tokenizer.from_folder(tmp_path).encode_batch(texts[:1000]) == ids[:1000]


def test_special_tokens_and_their_places() -> None:
    _, metadata = subset("llama-spm")
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.token(tokenizer.bos_id or -1), tokenizer.token(tokenizer.eos_id or -1)) == ("<s>", "</s>")
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_id
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("Hello", special_tokens=False)[0] != tokenizer.bos_id
    assert tokenizer.encode("</s>", special_tokens=False) == [tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode("Hello</s>")) == "Hello"
    off = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    assert off.encode("Hello") == [*tokenizer.encode("Hello")[1:], tokenizer.eos_id]
    _, bert = subset("bert-bge")
    ids = Tokenizer.from_gguf(bert).encode("hello")
    assert [Tokenizer.from_gguf(bert).token(i) for i in (ids[0], ids[-1])] == ["[CLS]", "[SEP]"]
    _, llama3 = subset("llama-bpe")
    assert Tokenizer.from_gguf(llama3).encode("Hello")[0] == Tokenizer.from_gguf(llama3).bos_id  # llama-bpe begins with bos unasked


@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_every_pre_tokenizer_compiles_and_keeps_the_text(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf({**gpt2_metadata(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    for text in fuzzed(200, seed=5):
        assert tokenizer.decode(tokenizer.encode(text), special_tokens=True) == text


def test_digits_are_split_as_the_file_says() -> None:
    def count(pre: str) -> int:
        metadata = {**gpt2_metadata(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        return len(Tokenizer.from_gguf(metadata).encode("1000000"))

    assert (count("smollm"), count("qwen2")) == (7, 7)
    assert count("gpt-2") < 3
    assert count("llama-bpe") == 3  # 100 000 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model must be a string, got nothing"),
        ({"model": "rwkv"}, "must be gpt2, llama or bert, got 'rwkv'"),
        ({"pre": "no-such"}, "tokenizer.ggml.pre is 'no-such'; known are"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": ["a", 3]}, "must be an array of strings"),
        ({"tokens": "abc"}, "must be an array of strings"),
        ({"token_type": [1, 2]}, "must be an array of 50257 numbers"),
        ({"token_type": ["x"] * 50257}, "must hold numbers"),
        ({"merges": ["ab"]}, "a merge must be two tokens and a space between, got 'ab'"),
        ({"merges": ["zzz qqq"]}, "byte-level BPE"),
        ({"merges": None}, "tokenizer.ggml.merges must be an array of strings"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id must be a token id"),
        ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id must be a token id"),
        ({"add_bos_token": np.array([1, 2])}, r"tokenizer.ggml.add_bos_token must be true or false, got ndarray array\(\[1, 2\]\)"),
        ({"add_eos_token": "no"}, "tokenizer.ggml.add_eos_token must be true or false, got str 'no'"),
        ({"model": "llama"}, "tokenizer.ggml.scores must be an array"),
        ({"model": "llama", "scores": [float("nan")] * 50257}, "scores must be finite"),
        (
            {"model": "llama", "scores": [0.0] * 50257, "tokens": ["x" * 1_000_000, *map(str, range(50256))]},
            "1024 characters at most",
        ),
        ({"model": "bert"}, r"must hold \[UNK\]"),
    ],
)
def test_corrupt_metadata_is_refused(change: dict[str, Any], message: str) -> None:
    metadata = {**gpt2_metadata(), **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf({k: v for k, v in metadata.items() if v is not None})


def test_a_repeated_token_keeps_its_id_apart() -> None:
    metadata = gpt2_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "!", "!"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1, 1]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.vocab_size == 50259
    assert tokenizer.encode("!") == [0]
