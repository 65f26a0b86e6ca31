"""LM on a real model that was published with its text (stories260K), and on checkpoints of transformers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastlm
from fastlm import _C, LM, Tokenizer, data, evaluate, train
from fastlm.checkpoint import convert_llama2c
from fastlm.lm import Text, _parts
from fastlm.train import evaluate as mean_loss

DATA = Path(__file__).parent / "data"
STORIES = DATA / "stories260k"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tmp_path_factory.mktemp("stories") / "model"
    convert_llama2c(STORIES / "stories260K.bin", folder)
    Tokenizer.from_llama2c(STORIES / "tok512.bin").save(folder)
    return fastlm.load(folder)


@pytest.fixture(scope="module")
def gpt2() -> LM:
    return fastlm.load(DATA / "models" / "gpt2")


def test_the_published_text(stories: LM) -> None:
    page = (STORIES / "stories260K.md").read_text()
    published = re.search(r"-t 0\.0\n(.*?)\n```", page, re.DOTALL)
    assert published is not None
    assert stories.generate("", max_tokens=256) == published[1]  # run.c makes 256 steps from bos


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.2}])
def test_stream_adds_up_to_generate(stories: LM, options: dict) -> None:
    pieces = list(stories.stream(PROMPT, max_tokens=40, **options))
    assert len(pieces) > 20
    assert "".join(pieces) == stories.generate(PROMPT, max_tokens=40, **options)


def test_a_list_gives_what_each_gives_alone(stories: LM) -> None:
    prompts = [PROMPT, "The dog", "", "Lily and Tom went to the big park. They saw"]
    for options in ({}, {"temperature": 1.0, "seed": 11}, {"beams": 3}, {"temperature": 1.0, "stop": [".", "!"]}):
        assert stories.generate(prompts, max_tokens=20, **options) == [
            stories.generate(p, max_tokens=20, **options) for p in prompts
        ]
    assert stories.generate([], max_tokens=3) == []
    samples = stories.generate([PROMPT] * 3, temperature=1.0, seed=[0, 1, 2])
    assert len(set(samples)) == 3


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_smaller_cache(stories: LM, cache: str) -> None:
    """A text hardly differs, and has the same bits alone, in a list and by beams of one; half or a third of the memory."""
    plain, prompts = stories.perplexity(PROMPT + stories.generate(PROMPT, max_tokens=200)), [PROMPT, "The dog"]
    size = sum(a.nbytes for a in stories.model.new_cache(1, 10).keys)
    text = PROMPT + stories.generate(PROMPT, max_tokens=200)
    try:
        stories.cache = cache
        assert stories.cache == cache
        assert sum(a.nbytes for a in stories.model.new_cache(1, 10).keys) <= size / 2
        assert stories.perplexity(text) == pytest.approx(plain, rel=0.01)
        assert stories.perplexity(text) != plain
        assert stories.generate(prompts, max_tokens=40) == [stories.generate(p, max_tokens=40) for p in prompts]
        assert stories.generate(PROMPT, max_tokens=40, beams=2) != ""
    finally:
        stories.cache = "float32"
    with pytest.raises(ValueError, match=r"\[cache\] dtype must be one of 'float32', 'bfloat16', 'int8', got 'fp8'"):
        stories.cache = "fp8"
    bert = fastlm.load(DATA / "encoders" / "bert.bare")
    with pytest.raises(ValueError, match=r"\[cache\] Bert keeps no keys and values: cache must be 'float32', got 'int8'"):
        bert.cache = "int8"


def test_stop_strings_are_cut(stories: LM) -> None:
    text = stories.generate(PROMPT, max_tokens=40)
    assert text.startswith(", there was a little girl named Lily.")
    for start in range(1, 30):
        for length in (1, 2, 5, 9):
            stop = text[start : start + length]
            expected = text[: text.find(stop)]
            assert stories.generate(PROMPT, max_tokens=40, stop=stop) == expected, stop
            assert "".join(stories.stream(PROMPT, max_tokens=40, stop=[stop, "never said"])) == expected
    assert stories.generate(PROMPT, max_tokens=40, stop=[" Lily", " girl"]) == text[: text.find(" girl")]
    assert stories.generate(PROMPT, max_tokens=40, stop="no such text") == text
    beams = stories.generate(PROMPT, max_tokens=40, beams=2, stop=".")
    assert "." not in beams
    assert stories.generate(PROMPT, max_tokens=40, beams=2).startswith(beams)


def test_a_possible_stop_string_is_held_back_and_given_at_the_end(stories: LM) -> None:
    text = stories.generate(PROMPT, max_tokens=12)
    pieces = list(stories.stream(PROMPT, max_tokens=12, stop=text[-3:] + "..."))
    assert "".join(pieces) == text
    assert pieces[-1].endswith(text[-3:])


def test_text_of_ids_that_split_characters() -> None:
    tokenizer = Tokenizer.from_llama2c(STORIES / "tok512.bin")
    ids = tokenizer.encode("x\u4f60\u597d END y", special_tokens=False)
    text = Text(tokenizer, [], ["\u597d"], [])
    assert text.all(ids) == ("x\u4f60", True)
    text = Text(tokenizer, [], ["END"], [])
    assert text.all(ids) == ("x\u4f60\u597d ", True)
    assert Text(tokenizer, [], [], [ids[-1]]).all(ids)[0] == "x\u4f60\u597d END"


def test_eos_ends_the_text(stories: LM) -> None:
    assert stories.tokenizer is not None
    text = stories.generate(PROMPT, max_tokens=40)
    ids = stories.generate_ids(stories.tokenizer.encode(PROMPT), max_tokens=40)
    assert (
        stories.generate(PROMPT, max_tokens=40, eos=ids[5]) == text[: len(stories.generate(PROMPT, max_tokens=ids.index(ids[5])))]
    )
    assert stories.generate_ids(stories.tokenizer.encode(PROMPT), max_tokens=40, eos=ids[5]) == ids[: ids.index(ids[5]) + 1]
    assert stories.generate(PROMPT, max_tokens=3, eos=()) == stories.generate(PROMPT, max_tokens=3)


def test_chat(stories: LM) -> None:
    assert stories.tokenizer is not None
    with pytest.raises(ValueError, match="no chat template"):
        stories.chat("hello")
    lm = LM(stories.model, Tokenizer.from_llama2c(STORIES / "tok512.bin"))
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    expected = lm.generate(PROMPT, max_tokens=20)
    assert lm.chat(PROMPT, max_tokens=20) == expected
    assert lm.chat([{"role": "user", "content": PROMPT}], max_tokens=20) == expected
    assert "".join(lm.chat_stream(PROMPT, max_tokens=20)) == expected


def test_ids_without_a_tokenizer(gpt2: LM) -> None:
    assert gpt2.tokenizer is None
    one = gpt2.generate_ids([1, 2, 3], max_tokens=5)
    assert gpt2.generate_ids([[1, 2, 3], [4]], max_tokens=5) == [one, gpt2.generate_ids([4], max_tokens=5)]
    assert gpt2.generate_ids(np.array([1, 2, 3]), max_tokens=5) == one  # type: ignore[call-overload]
    assert len(gpt2.generate_ids([1, 2, 3], max_tokens=5, beams=3, length_penalty=0.5, temperature=0.0)) == 5
    with pytest.raises(ValueError, match="no tokenizer: give ids"):
        gpt2.generate("text")
    with pytest.raises(ValueError, match="no tokenizer: give ids"):
        gpt2.logits("text")


def test_logits(stories: LM, gpt2: LM) -> None:
    assert stories.tokenizer is not None
    ids = stories.tokenizer.encode(PROMPT)
    assert stories.logits(ids).shape == (len(ids), 512)
    np.testing.assert_array_equal(stories.logits(PROMPT), stories.logits(ids))
    np.testing.assert_array_equal(stories.logits([ids, ids])[1], stories.logits(ids))
    golden = np.load(DATA / "models" / "logits.npz")
    got, expected = gpt2.logits(golden["gpt2.ids"]), golden["gpt2.logits"]
    assert np.all(np.abs(got - expected) <= 1e-5 * np.maximum(1, np.abs(expected)))
    with pytest.raises(ValueError, match=r"ids must be \(T,\) or \(B, T\)"):
        gpt2.logits([])


@pytest.mark.parametrize(("context", "stride"), [(None, None), (48, 48), (48, 24), (20, 7), (20, 20), (2, 1), (48, 1), (33, 32)])
def test_perplexity(gpt2: LM, context: int | None, stride: int | None) -> None:
    ids = np.random.default_rng(3).integers(0, 97, 101)
    c = context or 48
    s = stride or c // 2
    total, count, done = 0.0, 0, 0
    for begin in range(0, 101, s):
        end = min(begin + c, 101)
        logits = gpt2.logits(ids[begin:end]).astype(np.float64)
        top = logits.max(-1)
        for t in range(max(done, begin + 1), end):
            row = logits[t - begin - 1]
            total += top[t - begin - 1] + np.log(np.exp(row - top[t - begin - 1]).sum()) - row[ids[t]]
            count += 1
        done = end
        if end == 101:
            break
    assert gpt2.perplexity(ids.tolist(), context, stride) == pytest.approx(np.exp(total / count), rel=1e-5)
    assert len(evaluate.negative_log_likelihood(gpt2.model, ids, context, stride)) == count


def test_perplexity_of_text_and_in_pieces(stories: LM, gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert 1.0 < stories.perplexity(story) < 1.5  # its own greedy text
    assert stories.perplexity(story[::-1]) > 50
    ids = np.random.default_rng(3).integers(0, 97, 101).tolist()
    whole = gpt2.perplexity(ids)
    monkeypatch.setattr("fastlm.evaluate.likelihood._LOGITS", 1)
    assert gpt2.perplexity(ids) == pytest.approx(whole, rel=1e-6)
    for wrong in ({"context": 49}, {"context": 1}, {"stride": 0}, {"context": 20, "stride": 21}):
        with pytest.raises(ValueError, match=r"\[perplexity\] (context|stride) must be"):
            gpt2.perplexity(ids, **wrong)
    for wrong in ({"context": 20.5}, {"context": "all"}, {"context": 20, "stride": 2.5}):
        with pytest.raises(ValueError, match=r"\[perplexity\] (context|stride) must be an integer from"):
            gpt2.perplexity(ids, **wrong)
    with pytest.raises(ValueError, match="at least 2 ids"):
        gpt2.perplexity([1])
    with pytest.raises(ValueError, match="ids must be from 0 to 96"):
        gpt2.perplexity([1, 97])


def test_perplexity_beyond_what_a_float_holds() -> None:
    """exp of a mean loss of thousands is inf, not an OverflowError."""
    model = fastlm.models.create(fastlm.models.GPTConfig(5, context=8, d_model=8, n_layer=1, n_head=1, tied=False), 1)
    model.final_norm.weight.data *= 1e7
    assert LM(model).perplexity([0, 1, 2, 3, 4, 3]) == np.inf


def test_save_and_load(stories: LM, tmp_path: Path) -> None:
    stories.save(tmp_path / "copy")
    again = fastlm.load(tmp_path / "copy")
    assert again.generate(PROMPT, max_tokens=30) == stories.generate(PROMPT, max_tokens=30)
    assert again.tokenizer is not None
    assert stories.tokenizer is not None
    assert again.tokenizer.end_ids == stories.tokenizer.end_ids == (2, 1)
    np.testing.assert_array_equal(again.logits(PROMPT), stories.logits(PROMPT))


def test_repr(stories: LM) -> None:
    for part in ("LM(Llama", "0.3M parameters", "float32", "context 512", "vocab_size=512"):
        assert part in repr(stories)


def test_wrong_options(stories: LM) -> None:
    with pytest.raises(TypeError, match="unknown option temprature; there are beams, early_stopping"):
        stories.generate(PROMPT, temprature=1.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="unknown option stop"):
        stories.generate_ids([1], stop="x")
    with pytest.raises(ValueError, match=r"temperature must be 0\.0 with beams, got 1\.0"):
        stories.generate(PROMPT, beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="beams must be 1"):
        list(stories.stream(PROMPT, beams=2))
    with pytest.raises(ValueError, match="stop must be strings that are not empty"):
        stories.generate(PROMPT, stop="")
    with pytest.raises(ValueError, match="stop must be strings that are not empty, got 3"):
        stories.generate(PROMPT, stop=3)  # type: ignore[call-overload]
    for prompt in (None, 5, b"bytes", {"a": 1}):
        with pytest.raises(TypeError, match=r"\[generate\] prompt must be a str, or a list of them, got"):
            stories.generate(prompt)  # type: ignore[call-overload]
    for ids in (None, 5, "text", np.array(3)):
        with pytest.raises(TypeError, match=r"\[generate\] ids must be a list of ids, or of such lists, got"):
            stories.generate_ids(ids)
    with pytest.raises(ValueError, match=r"\[logits\] ids must be .*, got sequences of different lengths"):
        stories.logits([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"\[cache\] dtype must be one of .*, got \[\]"):
        stories.cache = []  # type: ignore[assignment]
    with pytest.raises(ValueError, match="shorter than the model's context of 512"):
        stories.generate("x " * 600)


def test_embed_refuses() -> None:
    lm = fastlm.load(DATA / "encoders" / "bert.bare")
    assert lm.embed([]).shape == (0, lm.model.config.d_model)
    for batch in (0, -5, 2.5, "a"):
        with pytest.raises(ValueError, match=r"\[embed\] batch_tokens must be an integer of at least 1, got"):
            lm.embed([[1, 2], [3]], batch)  # type: ignore[arg-type]
    for texts in (None, 5):
        with pytest.raises(TypeError, match=r"\[embed\] texts must be a str, or a list of them or of lists of ids, got"):
            lm.embed(texts)  # type: ignore[arg-type]
    for texts in ([1, 2], [[1.7]], [["a"]], [[1], "a"]):
        with pytest.raises(TypeError, match=r"\[embed\] texts must all be str or all lists of ids, got .* as number"):
            lm.embed(texts)  # type: ignore[arg-type]


def test_no_prompts_of_an_encoder_decoder_model() -> None:
    lm = fastlm.load(DATA / "t5" / "v1.1")
    lm.tokenizer = Tokenizer.characters("abc")
    assert lm.generate([]) == lm.generate([], beams=2) == []
    with pytest.raises(ValueError, match="temperature must be a number"):
        lm.generate([], temperature=-1.0)


def test_import_is_quick_and_brings_no_framework() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import fastlm; t = time.perf_counter() - t;"
        "fastlm.load, fastlm.ops.layer_norm, fastlm.train;"
        "print(t, [m for m in ('torch', 'transformers', 'jax', 'tensorflow') if m in sys.modules])"
    )
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert all(out.split(maxsplit=1)[1].strip() == "[]" for out in found)
    assert min(float(out.split()[0]) for out in found) < 0.2


def test_public_names() -> None:
    assert {"LM", "load", "train", "ops", "Tokenizer"} <= set(dir(fastlm))
    assert callable(fastlm.train)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        fastlm.no_such  # noqa: B018


def test_parts_are_about_equal_and_as_many_for_each_thread():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 90, 300)]
    for threads, batch in ((1, 1024), (2, 1024), (3, 500), (2, 10), (2, 1 << 20)):
        parts = list(_parts(lengths, batch, threads))
        assert [i for p in parts for i in range(p.start, p.stop)] == list(range(300))
        sizes = [sum(lengths[p]) for p in parts]
        assert all(size <= batch or p.stop - p.start == 1 for size, p in zip(sizes, parts, strict=True))
        if batch >= 500:
            assert len(parts) % threads == 0
            assert max(sizes) - min(sizes) < 2 * 90
    assert list(_parts([5, 5], 1024, 2)) == [slice(0, 2)]


def test_embeddings_are_the_same_on_any_number_of_threads(threads: None) -> None:
    lm = fastlm.load(DATA / "encoders" / "bert.bare")
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 37, n).tolist() for n in rng.integers(1, 15, 90)]
    _C.set_num_threads(1)
    alone = lm.embed(rows)
    _C.set_num_threads(3)
    np.testing.assert_array_equal(lm.embed(rows), alone)
    np.testing.assert_array_equal(lm.embed(rows, batch_tokens=100), alone)
    with pytest.raises(ValueError, match="ids"):
        lm.embed([*rows, [10**6]])


def test_what_is_mistaken_is_said(gpt2: LM, tmp_path: Path) -> None:
    """These were errors of Python's own, far from what had been given."""
    text, small = "First, Citizen. " * 40, Tokenizer.characters("abcd")
    model: Any = gpt2.model
    for wrong, error, message in (
        (lambda: fastlm.load(None), TypeError, r"\[load\] a folder, a \.gguf file or a Hugging Face id must be given, got None"),  # type: ignore[arg-type]
        (lambda: gpt2.save(None), TypeError, r"\[save\] the path of a folder must be given, got None"),  # type: ignore[arg-type]
        (lambda: LM("gpt2"), TypeError, r"\[lm\] model must be one of fastlm\.models, got 'gpt2'\. fastlm\.load reads"),  # type: ignore[arg-type]
        (lambda: LM(model, "folder"), TypeError, r"\[lm\] tokenizer must be a fastlm\.Tokenizer, got 'folder'"),  # type: ignore[arg-type]
        (lambda: Tokenizer.train_bpe([text], 300.0), TypeError, r"\[train_bpe\] vocab_size must be an integer, got 300\.0"),  # type: ignore[arg-type]
        (lambda: small.with_special("[PAD]"), TypeError, r"\[with_special\] roles must be a dict"),  # type: ignore[arg-type]
        (lambda: data.prepare(text, small, tmp_path / "t", 4), TypeError, "encode must be a function .*, got Tokenizer"),  # type: ignore[arg-type]
        (lambda: train(model, text, steps=1), ValueError, r"\[train\] data must be .*, got a text of 640 characters"),
        (lambda: train(model, [1, 2] * 50, steps=1, objective=data.Causal), ValueError, r"data\.Causal\(\.\.\.\), got the class"),
        (
            lambda: data.Masked(small),
            TypeError,
            r"\[masked\] vocabulary must be a data\.Vocabulary, Vocabulary\.of.*, got Tokenizer",
        ),  # type: ignore[arg-type]
        (lambda: data.SentencePairs(small), TypeError, r"\[sentence_pairs\] masked must be a data\.Masked, got Tokenizer"),  # type: ignore[arg-type]
        (lambda: data.Vocabulary.of("abc"), TypeError, r"\[vocabulary\] tokenizer must be a fastlm\.Tokenizer, got str"),
        (lambda: mean_loss(model, np.ones(100, int), 2.5, 8), ValueError, r"\[evaluate\] batch must be an integer of at least 1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            wrong()
    seeds = np.array([3, 4])
    drawn = gpt2.generate_ids([[1, 2], [3]], max_tokens=5, temperature=1.0, seed=seeds)  # type: ignore[arg-type]
    assert drawn == gpt2.generate_ids([[1, 2], [3]], max_tokens=5, temperature=1.0, seed=seeds.tolist())
