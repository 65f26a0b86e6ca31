"""Folders, llama2.c, training, saving, the stream decoder, and files that are broken on purpose."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from fastlm.tokenizers import Tokenizer, TokenizerError
from tests.tokenizers.test_gguf import fuzzed, gpt2_metadata, subset

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside. 12 34, caf\u00e9 \u4f60\u597d \U0001f600!\n"
    * 4
)


def make(name: str) -> Tokenizer:
    if name == "gpt-2":
        return Tokenizer.from_gguf(gpt2_metadata())
    if name == "tok512":
        return Tokenizer.from_llama2c(STORIES / "tok512.bin")
    if name == "characters":
        return Tokenizer.characters(TEXT)
    if name == "trained":
        return Tokenizer.train_bpe([TEXT], 300)
    return Tokenizer.from_gguf(subset(name)[1])


ALL = ["gpt-2", "llama-bpe", "llama-spm", "bert-bge", "tok512", "characters", "trained"]


@pytest.mark.parametrize("name", ALL)
def test_stream_adds_up_to_decode(name: str) -> None:
    tokenizer = make(name)
    r = random.Random(1)
    sequences = [[r.randrange(tokenizer.vocab_size) for _ in range(r.randrange(24))] for _ in range(500)]
    if name == "tok512":  # dense in byte tokens, valid UTF-8 and not
        sequences += [[r.choice([r.randrange(3, 259), r.randrange(512)]) for _ in range(r.randrange(24))] for _ in range(500)]
    if name != "characters":
        sequences += [tokenizer.encode(text) for text in fuzzed(200)]
    for special in (False, True):
        for ids in sequences:
            stream = tokenizer.decode_stream(special_tokens=special)
            pieces = [stream.put(i) for i in ids]
            assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, special_tokens=special), ids


@pytest.mark.parametrize("name", [name for name in ALL if name != "characters"])
def test_refuses_half_a_surrogate_pair(name: str) -> None:
    """As sys.argv and sys.stdin have it of bytes that are not UTF-8; a chat too, whose template would put other characters there."""
    tokenizer = make(name)
    tokenizer.chat_template = "{{ messages[0].content }}"
    said = r"text must be Unicode, got the lone surrogate '\\udce9' at 3"
    with pytest.raises(TokenizerError, match=rf"\[encode\] {said}"):
        tokenizer.encode("caf\udce9")
    with pytest.raises(TokenizerError, match=rf"\[chat\] {said}"):
        tokenizer.chat([{"role": "user", "content": "caf\udce9"}])
    with pytest.raises(TokenizerError, match=rf"\[characters\] {said}"):
        Tokenizer.characters("caf\udce9")


def test_refuses_a_vocabulary_that_cannot_be() -> None:
    for size in (256, 1 << 31, 1 << 80):
        with pytest.raises(TokenizerError, match=rf"vocab_size must be at least 257, .* and below 2\^31, got {size}"):
            Tokenizer.train_bpe([TEXT], size)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "tok512", "trained"])
def test_stream_shows_nothing_half(name: str) -> None:
    tokenizer = make(name)
    ids = tokenizer.encode("caf\u00e9 \u4f60\u597d \U0001f600 end")
    stream = tokenizer.decode_stream()
    assert all("\ufffd" not in stream.put(i) for i in ids)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "tok512", "bert-bge", "trained"])
def test_stream_after_a_prompt_keeps_the_space(name: str) -> None:
    tokenizer = make(name)
    ids = tokenizer.encode("Hello, world! Hello", special_tokens=False)
    for cut in range(1, len(ids)):
        stream = tokenizer.decode_stream(ids[:cut])
        new = "".join(stream.put(i) for i in ids[cut:]) + stream.finish()
        assert tokenizer.decode(ids[:cut]) + new == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_saved_and_read_again(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    texts = [TEXT] if name == "characters" else list(fuzzed(300))
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    for what in ("vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "end_ids", "special_ids", "chat_template"):
        assert getattr(again, what) == getattr(tokenizer, what), what
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_another_eos_ends_a_text(tmp_path: Path) -> None:
    """The old one did, and the new one did not before it was saved and loaded."""
    tokenizer = make("trained").with_special({"eos": "</s>"})
    assert tokenizer.end_ids == (tokenizer.eos_id,) == (tokenizer.id("</s>"),)
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).end_ids == tokenizer.end_ids
    tokenizer.end_ids = (7, *tokenizer.end_ids)
    assert tokenizer.with_special({"eos": "[E]"}).end_ids == (7, tokenizer.vocab_size)
    assert tokenizer.with_special({"pad": "[P]"}).end_ids == tokenizer.end_ids
    assert Tokenizer.characters("ab").with_special({"eos": "[E]"}).end_ids == (2,)


def test_roles_of_other_names_are_saved(tmp_path: Path) -> None:
    """They were written, and left out when read."""
    tokenizer = make("trained").with_special({"pad": "[PAD]", "eot": "[E]"})
    tokenizer.chat_template = "{{ eot_token }}{{ pad_token }}"
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.from_folder(tmp_path / "a")
    assert again.special == tokenizer.special
    assert again.chat([{"role": "user", "content": ""}]) == "[E][PAD]"
    path = tmp_path / "a" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"add_bos_token": True, "image_token": None, "lost_token": "[not there]", "video": "[E]"}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):  # as transformers 4 and 5 write them
        found = {k: v for k, v in config.items() if k != "eot_token"} | {key: {"eot_token": {"content": "[E]"}}}
        path.write_text(json.dumps(found))
        again = Tokenizer.from_folder(tmp_path / "a")
        assert again.special == tokenizer.special
        again.with_special({"eot": "[F]"}).save(tmp_path / "b")
        assert Tokenizer.from_folder(tmp_path / "b").special["eot"] == "[F]"
        assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())[key] == {"eot_token": "[F]"}
    path.write_text(json.dumps(config | {"extra_special_tokens": ["[E]"]}))
    assert Tokenizer.from_folder(tmp_path / "a").special == tokenizer.special
    for role in ("add_bos", "", "end of turn"):
        with pytest.raises(TokenizerError, match=f"a role must be a word that does not begin with add_, got '{role}'"):
            tokenizer.with_special({role: "[X]"})


def test_saved_over_another(tmp_path: Path) -> None:
    """Nothing of the tokenizer that was in the folder is read with the new one: its template, special tokens and ends were."""
    old = make("trained").with_special({"pad": "a"})
    old.chat_template, old.end_ids = "of the old", (7, 0)
    old.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "b"}')
    (tmp_path / "added_tokens.json").write_text('{"[OLD]": 999}')
    ends = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(ends | {"temperature": 0.6}))
    new = make("trained")
    new.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.special, again.end_ids, again.chat_template) == (new.special, new.end_ids, None)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    characters = Tokenizer.characters("abc")  # no token ends a text
    characters.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).end_ids == ()


def test_saving_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is whole, the old or the new: each was emptied before it was written."""
    tokenizer = make("trained")
    tokenizer.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    wider = tokenizer.with_special({"pad": "[PAD]"})
    wider.chat_template = "caf\udce9"
    with pytest.raises(TokenizerError, match=r"\[save\] chat_template\.jinja: text must be Unicode"):
        wider.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    wider.chat_template = None

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        wider.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is a file: give a folder"):
        wider.save(tmp_path / "tokenizer.json")


def test_llama2c() -> None:
    tokenizer = make("tok512")
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("Once upon a time")[:2] == [1, 403]  # "▁Once"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert [tokenizer.token(i) for i in tokenizer.encode("\u4f60", special_tokens=False)][1:] == ["<0xE4>", "<0xBD>", "<0xA0>"]
    for text in fuzzed(500, seed=2):
        if "<" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters() -> None:
    tokenizer = Tokenizer.characters("hello\n")
    assert tokenizer.encode("\nehlo") == [0, 1, 2, 3, 4]
    assert tokenizer.decode([2, 1, 3, 3, 4, 0]) == "hello\n"
    with pytest.raises(TokenizerError, match="not in the vocabulary: 'x', 'é'"):
        tokenizer.encode("hexé")
    with pytest.raises(TokenizerError, match="empty"):
        Tokenizer.characters("")


def test_characters_with_special_tokens_in_the_text() -> None:
    """A special token that is written out is one id, as in other vocabularies; what is left of its letters is not dropped in silence."""
    tokenizer = Tokenizer.characters("abc").with_special({"mask": "[MASK]", "pad": "[PAD]"})
    assert tokenizer.encode("a[MASK]b[PAD]") == [0, 3, 1, 4]
    for text in ("a[MASK", "[[MASK]PAD]", "x[MASK]"):
        with pytest.raises(TokenizerError, match="characters that are not in the vocabulary"):
            tokenizer.encode(text)


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 and what is no str, whatever reads them first."""
    half = b"ab\xff".decode("utf-8", "surrogateescape")
    tokenizer = Tokenizer.train_bpe(["ab"], 257)
    for use in (tokenizer.encode, Tokenizer.characters, lambda text: Tokenizer.train_bpe([text], 257)):
        with pytest.raises(
            TokenizerError, match=r"text must be Unicode, got the lone surrogate '\\udcff' at 2: .*errors=\"replace\""
        ):
            use(half)
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    with pytest.raises(TokenizerError, match=r"\[train_bpe\] .*latin\.txt is not UTF-8 text: byte 3"):
        Tokenizer.train_bpe([tmp_path / "latin.txt"], 257)
    with pytest.raises(TokenizerError, match=r"\[train_bpe\] texts must be strs and Paths, got int"):
        Tokenizer.train_bpe([3], 257)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"\[characters\] text must be a str, got bytes"):
        Tokenizer.characters(b"ab")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\[encode\] texts must be a list of strs, got one str"):
        tokenizer.encode_batch("ab")
    with pytest.raises(TokenizerError, match=r"\[decode\] ids must be from 0 to 4294967295, got 1099511627776"):
        tokenizer.decode([1 << 40])


def test_train_bpe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    one, other = Tokenizer.train_bpe([tmp_path / "a.txt"], 300), Tokenizer.train_bpe([TEXT], 300)
    assert one.vocab_size == 300
    assert one.encode(TEXT) == other.encode(TEXT)
    assert len(one.encode(TEXT)) < 0.6 * len(TEXT.encode())
    assert one.token(one.eos_id or 0) == "<|endoftext|>"
    for text in fuzzed(200):
        assert one.decode(one.encode(text), special_tokens=True) == text
    with pytest.raises(TokenizerError, match="vocab_size must be at least"):
        Tokenizer.train_bpe([TEXT], 100)


def sentencepiece_model(names: list[str], scores: list[float], kinds: list[int], kind: int) -> bytes:
    """A tokenizer.model as sentencepiece writes it, with LLaMA's normaliser: identity, a space in front."""

    def message(field: int, body: bytes) -> bytes:
        size = bytes([len(body)]) if len(body) < 128 else bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
        return bytes([field << 3 | 2]) + size + body

    pieces = b"".join(
        message(1, message(1, n.encode()) + b"\x15" + struct.pack("<f", s) + bytes([3 << 3, k]))
        for n, s, k in zip(names, scores, kinds, strict=True)
    )
    trainer = bytes([3 << 3, kind, 35 << 3 & 0x7F | 0x80, 2, 1, 41 << 3 & 0x7F | 0x80, 2, 1, 42 << 3 & 0x7F | 0x80, 2, 2])
    return pieces + message(2, trainer) + message(3, bytes([3 << 3, 1, 4 << 3, 0]))


def test_sentencepiece_bpe_equals_the_same_pieces_of_llama2c(tmp_path: Path) -> None:
    ours = make("tok512")
    names = [ours.token(i) or "" for i in range(512)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 253
    data = sentencepiece_model(names, [0.0] * 259 + [-float(i) for i in range(253)], kinds, kind=2)
    (tmp_path / "tokenizer.model").write_bytes(data)
    read = Tokenizer.from_folder(tmp_path)
    assert (read.vocab_size, read.bos_id, read.eos_id, read.unk_id) == (512, 1, 2, 0)
    for text in [TEXT, "", *fuzzed(500, seed=4)]:
        assert read.encode(text) == ours.encode(text)
        assert read.decode(read.encode(text)) == ours.decode(ours.encode(text))
    r = random.Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(data[: r.randrange(1, len(data))] if r.random() < 0.5 else data)
        for _ in range(r.randrange(1, 6)):
            broken[r.randrange(len(broken))] = r.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(broken)
        try:
            Tokenizer.from_folder(tmp_path).encode("Once upon a time")
        except TokenizerError:
            refused += 1
    assert refused > 30


def test_sentencepiece_unigram(tmp_path: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "c"]
    data = sentencepiece_model(names, [0, 0, 0, -3, -2, -2, -3.5, -4, -2], [2, 3, 3] + [1] * 6, kind=1)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ab", special_tokens=False) == [7]  # -4 beats -3 - 3.5 and -3 - 2 - 2
    assert tokenizer.encode("cab") == [1, 3, 8, 6]  # -3.5 beats -2 - 2
    assert tokenizer.decode([1, 3, 8, 6, 7]) == "cab ab"


def test_word_piece_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "!", ""]))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("UNaffable! x") == [2, 5, 6, 7, 8, 1, 3]
    assert tokenizer.decode([2, 5, 6, 7, 8, 3]) == "unaffable!"
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, None, None)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_folder(tmp_path).encode("UNaffable") == [2, 1, 3]


def test_folder_configuration(tmp_path: Path) -> None:
    make("trained").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "from the configuration"}]
    config["pad_token"] = {"content": "<|pad|>", "special": True}
    config["added_tokens_decoder"] = {"300": {"content": "<|pad|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.pad_id, tokenizer.encode("<|pad|>"), tokenizer.end_ids) == (300, [300], (7, 0))
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_folder(tmp_path).chat([{"role": "user", "content": "x"}]) == "from the file"
    config["added_tokens_decoder"] = {"999": {"content": "<|pad|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="999"):
        Tokenizer.from_folder(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        Tokenizer.from_folder(tmp_path)
    tokenizer = make("trained")
    with pytest.raises(TypeError, match="text must be a str, got int"):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError):
        tokenizer.encode("\ud800")
    with pytest.raises(TokenizerError, match="ids must be from 0 to 4294967295, got -1"):
        tokenizer.decode([-1])
    for bad in ([1.7], [1, 2.0], ["1"], [None], [[1, 2]], np.array([1.5]), np.array([[1, 2]]), 3, "12"):
        with pytest.raises(TypeError, match=r"\[decode\] ids must be a list of integers, got"):  # fractions were cut off
            tokenizer.decode(bad)  # type: ignore[arg-type]
    for read in (tokenizer.token, tokenizer.decode_stream().put):
        with pytest.raises(TypeError, match=r"\[decode\] id must be an integer, got 1\.7"):
            read(1.7)  # type: ignore[arg-type]
    assert tokenizer.decode(np.array([5, 6])) == tokenizer.decode([5, 6]) == tokenizer.token(5) + tokenizer.token(np.int64(6))
    assert tokenizer.decode([299, 10**6]) == tokenizer.decode([299])
    assert (tokenizer.token(-1), tokenizer.token(10**12), tokenizer.id("no such")) == (None, None, None)
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tok512.bin"])
def test_mutated_files_give_typed_errors(name: str, tmp_path: Path) -> None:
    if name == "tok512.bin":
        good = (STORIES / name).read_bytes()
    else:
        tokenizer = make("trained")
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save(tmp_path)
        good = (tmp_path / name).read_bytes()
    r = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        kind = r.randrange(4)
        if kind == 0:
            del data[r.randrange(len(data)) :]
        for _ in range(r.randrange(1, 8)):
            at = r.randrange(len(data) + 1)
            if kind == 1:
                data[at : at + 1] = bytes([r.randrange(256)])
            elif kind == 2:
                del data[at : at + r.randrange(40)]
            else:
                data[at:at] = r.choice([b"{", b"[", b"null", b"-1", b"1e99", b'"', b"\xff\xff\xff\x7f", b"99999999999"])
        (tmp_path / name).write_bytes(data)
        try:
            broken = Tokenizer.from_llama2c(tmp_path / name) if name == "tok512.bin" else Tokenizer.from_folder(tmp_path)
            broken.decode(broken.encode("Once upon a time"))
        except TokenizerError:
            refused += 1
    assert refused > 30
