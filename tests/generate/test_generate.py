"""Generation against transformers (tests/data/models/generation.json), and what the engine promises: the same bits everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlm import backend, generate, hub, models
from fastlm.generate import BeamSettings, Settings, beam_search, engine, kept, steps
from fastlm.generate.processors import process

DATA = Path(__file__).parents[1] / "data" / "models"
GOLDEN = json.loads((DATA / "generation.json").read_text())
_models: dict[str, Any] = {}


def model(name: str) -> Any:
    if name not in _models:
        _models[name] = hub.load_folder_or_gguf(DATA / name)[0]
    return _models[name]


class Recorder:
    """A model that remembers its logits."""

    def __init__(self, model: Any) -> None:
        self.config, self.new_cache, self.model = model.config, model.new_cache, model
        self.seen: list[np.ndarray] = []

    def logits(self, ids: Any, cache: Any = None, last: bool = False) -> Any:
        out = self.model.logits(ids, cache, last)
        self.seen.append(np.array(out))
        return out


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The logits that generation sees: of each prompt, then of each step. Nothing is kept from call to call: test_kept.py has that."""
    found: list[np.ndarray] = []
    monkeypatch.setattr(engine, "take", kept.unkept)

    def watched(f: Any) -> Any:
        def call(*arguments: Any) -> Any:
            logits = f(*arguments)
            found.append(np.array(logits))
            return logits

        return call

    monkeypatch.setattr(engine, "prefill", watched(engine.prefill))
    monkeypatch.setattr(engine.Decoder, "step", watched(engine.Decoder.step))
    return found


def prompts(m: Any, count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, m.config.vocab_size, rng.integers(1, 20)).tolist() for _ in range(count)]


def run_golden(entry: dict[str, Any]) -> generate.Output:
    s = dict(entry["settings"])
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_beams": "beams", "eos_token_id": "eos"}
    given = {names.get(k, k).replace("ngram_size", "ngram"): v for k, v in s.items()}
    if "beams" in given:
        return beam_search(model(entry["model"]), entry["prompt"], BeamSettings(**given))
    return generate.generate(model(entry["model"]), [entry["prompt"]], Settings(**given))[0]


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['model']}-{len(e['prompt'])}-{list(e['settings'].values())}")
def test_equals_transformers(entry: dict[str, Any]) -> None:
    output = run_golden(entry)
    assert output.ids == entry["ids"]
    assert output.reason == ("eos" if entry["ids"][-1] == entry["settings"]["eos_token_id"] else "length")
    if entry["score"] is not None:
        assert output.score == pytest.approx(entry["score"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_same_bits_alone_in_a_batch_and_at_any_number_of_threads(name: str, threads: None, seen: list[np.ndarray]) -> None:
    m = model(name)
    asked = prompts(m, 5)
    asked[2:2] = [asked[1][::-1], [*asked[1][1:], 5]]
    settings = Settings(max_tokens=12, temperature=1.3, top_p=0.95, repetition_penalty=1.1)

    def run(some: list[list[int]]) -> tuple[list[list[int]], np.ndarray]:
        seen.clear()
        outputs = generate.generate(m, some, settings, seeds=7)
        reads = len(list(engine.alike(None, [len(prompt) for prompt in some])))
        first = np.concatenate(seen[:reads])  # the prompts, those of one length together, then the steps of all
        return [o.ids for o in outputs], np.stack([first, *seen[reads:]])

    together = {}
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        together[n] = run(asked)
    for n in (2, 3):
        assert together[n][0] == together[1][0]
        np.testing.assert_array_equal(together[n][1].view(np.uint32), together[1][1].view(np.uint32))
    for i, prompt in enumerate(asked):
        ids, bits = run([prompt])
        assert ids[0] == together[1][0][i]
        np.testing.assert_array_equal(bits[:, 0].view(np.uint32), together[1][1][:, i].view(np.uint32))


def test_rows_drop_out_and_change_nothing() -> None:
    m = model("llama")
    asked = prompts(m, 6, seed=1)
    settings = Settings(max_tokens=25, temperature=1.0, eos=(3, 17, 44, 45, 46, 47, 48, 49, 50, 51, 52))
    outputs = generate.generate(m, asked, settings, seeds=[3, 1, 4, 1, 5, 9])
    assert len({len(o.ids) for o in outputs}) > 2, "the rows must end at different steps for this test to mean anything"
    assert {o.reason for o in outputs} >= {"eos"}
    for prompt, seed, output in zip(asked, [3, 1, 4, 1, 5, 9], outputs, strict=True):
        assert generate.generate(m, [prompt], settings, seeds=seed)[0] == output


def test_seeds() -> None:
    m = model("gpt2")
    settings = Settings(max_tokens=20, temperature=2.0)
    same = generate.generate(m, [[1, 2, 3]] * 3, settings, seeds=5)
    assert same[0].ids == same[1].ids == same[2].ids
    drawn = generate.generate(m, [[1, 2, 3]] * 3, settings, seeds=[5, 6, 7])
    assert drawn[0].ids == same[0].ids
    assert drawn[0].ids != drawn[1].ids != drawn[2].ids
    assert generate.generate(m, [[1, 2, 3]], Settings(max_tokens=20, temperature=2.0, top_k=1))[0].ids == (
        generate.generate(m, [[1, 2, 3]], Settings(max_tokens=20))[0].ids
    )


def test_prefill_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "take", kept.unkept)
    m = model("llama")
    prompt = prompts(m, 1)[0] * 3
    generate.generate(m, [prompt], Settings(max_tokens=6))  # after it no step is compared with Python any longer
    whole: Any = Recorder(m)
    expected = generate.generate(whole, [prompt], Settings(max_tokens=6))[0].ids
    monkeypatch.setattr(engine, "CHUNK", 4)
    pieces: Any = Recorder(m)
    assert generate.generate(pieces, [prompt], Settings(max_tokens=6))[0].ids == expected
    assert len(pieces.seen) == len(whole.seen) + (len(prompt) - 1) // 4
    np.testing.assert_allclose(pieces.seen[-1], whole.seen[-1], rtol=0, atol=1e-5)


def test_steps_streams_and_can_be_closed() -> None:
    m = model("gpt2")
    expected = generate.generate(m, [[5, 6], [7, 8, 9]], Settings(max_tokens=4))
    seen: list[list[int]] = [[], []]
    order = []
    for index, id in steps(m, [[5, 6], [7, 8, 9]], Settings(max_tokens=4)):
        seen[index].append(id)
        order.append(index)
    assert seen == [o.ids for o in expected]
    assert order == [0, 1] * 4
    recorder: Any = Recorder(m)
    for _ in steps(recorder, [[5, 6]], Settings(max_tokens=40)):
        break
    assert len(recorder.seen) == 1


def test_stop_by_callback() -> None:
    m = model("gpt2")
    full = generate.generate(m, [[5, 6], [7, 8, 9]], Settings(max_tokens=10))
    seen: list[int] = []

    def stop(index: int, id: int) -> bool:
        seen.append(index)
        return index == 0 and seen.count(0) == 3

    outputs = generate.generate(m, [[5, 6], [7, 8, 9]], Settings(max_tokens=10), stop=stop)
    assert (outputs[0].ids, outputs[0].reason) == (full[0].ids[:3], "stop")
    assert (outputs[1].ids, outputs[1].reason) == (full[1].ids, "length")
    third = beam_search(m, [5, 6], BeamSettings(beams=3, max_tokens=10), stop=lambda ids: len(ids) == 3)
    assert (len(third.ids), third.reason) == (3, "stop")


def test_the_context_is_the_end() -> None:
    m = model("gpt2")
    room = m.config.context
    outputs = generate.generate(m, [[1] * (room - 3), [1, 2]], Settings(max_tokens=10))
    assert [len(o.ids) for o in outputs] == [3, 10]
    assert len(beam_search(m, [1] * (room - 2), BeamSettings(beams=2, max_tokens=10)).ids) == 2
    assert generate.generate(m, [[1]], Settings(max_tokens=0)) == [generate.Output()]
    assert beam_search(m, [1], BeamSettings(max_tokens=0)).ids == []
    assert generate.generate(m, [], Settings()) == []


def test_processors() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4):
        ids = rng.integers(0, 4, 30).tolist()
        scores = rng.standard_normal(4).astype(np.float32)
        got = scores.copy()
        process(got, ids, 5, repetition_penalty=1.0, no_repeat_ngram=n, min_tokens=0, eos=())
        grams = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        for token in range(4):
            repeated = tuple([*ids, token][-n:]) in grams
            assert got[token] == (-np.inf if repeated else scores[token])
    got = np.array([2.0, -2.0, 3.0, 1.0], np.float32)
    process(got, [0, 1, 1, 0], 2, repetition_penalty=2.0, no_repeat_ngram=0, min_tokens=3, eos=(3,))
    assert got.tolist() == [1.0, -4.0, 3.0, -np.inf]
    process(got, [1], 3, repetition_penalty=1.0, no_repeat_ngram=5, min_tokens=3, eos=(2,))
    assert got[2] == 3.0


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one id"),
        ([[1, 2]], {}, "must be a list of ids"),
        ([1.5], {}, "must be a list of ids"),
        ([97], {}, "ids must be from 0 to 96, got 97"),
        ([-1], {}, "ids must be from 0 to 96, got -1"),
        ([1] * 48, {}, "shorter than the model's context of 48, got 48 ids"),
        ([1], {"eos": 97}, "eos must be from 0 to 96, got 97"),
        ([1], {"eos": "x"}, "eos must be an id, several, or None"),
        ([1], {"max_tokens": -1}, "max_tokens must be an integer of at least 0, got -1"),
        ([1], {"max_tokens": 1.0}, "max_tokens must be an integer"),
        ([1], {"temperature": -0.1}, "temperature must be a number at least 0"),
        ([1], {"temperature": float("nan")}, "temperature must be a number"),
        ([1], {"top_p": 0.0}, "top_p must be a number above 0.0 and at most 1.0, got 0.0"),
        ([1], {"min_p": 1.1}, "min_p must be a number at least 0.0 and at most 1.0"),
        ([1], {"top_k": -1}, "top_k must be an integer"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        (
            [1],
            {"repetition_penalty": 1e-46},
            "repetition_penalty must be a number at least 1.17.*e-38 and at most 3.4.*e.38, got 1e-46",
        ),
        ([1], {"repetition_penalty": 1e39}, "repetition_penalty must be a number .* at most 3.4.*e.38"),
        ([1], {"temperature": 10**400}, "temperature must be a number at least 0.0 and at most 3.4.*e.38"),
    ],
)
def test_refusals(prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate.generate(model("gpt2"), [prompt], Settings(**settings))


def test_refusals_of_beams_and_seeds() -> None:
    m = model("gpt2")
    for wrong, message in (
        ({"beams": 0}, "beams must be an integer of at least 1"),
        ({"length_penalty": float("inf")}, "length_penalty must be a number"),
        ({"length_penalty": 1000}, "length_penalty must be a number at least -6.0 and at most 6.0, got 1000"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never'"),
    ):
        with pytest.raises(ValueError, match=message):
            BeamSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be one number or 2"):
        generate.generate(m, [[1], [2]], Settings(temperature=1.0), seeds=[1])
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        generate.generate(m, [[1]], Settings(temperature=1.0), seeds=-1)


def test_numbers_may_be_numpys() -> None:
    """As training takes them; they were refused as no integers and no numbers."""
    m, settings = model("gpt2"), Settings(max_tokens=np.int64(3), top_k=np.int32(5), temperature=1.0)  # type: ignore[arg-type]
    assert type(settings.max_tokens) is int
    found = generate.generate(m, [[1]], settings, seeds=[np.uint64(7)])  # type: ignore[list-item]
    assert found == generate.generate(m, [[1]], Settings(max_tokens=3, top_k=5, temperature=1.0), seeds=7)
    assert BeamSettings(beams=np.int64(2), length_penalty=np.float32(0.5)) == BeamSettings(beams=2, length_penalty=0.5)  # type: ignore[arg-type]
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = getattr(Settings(**{name: np.float32(0.75)}), name)
        assert (type(value), value) == (float, 0.75)
        with pytest.raises(ValueError, match=f"{name} must be a number .*, got True"):
            Settings(**{name: True})


def test_an_exhausted_vocabulary_is_refused() -> None:
    """Where processors forbid every id, greedy gave id 0 again and again, and beams nothing, as if these had been chosen."""
    m = models.create(models.GPTConfig(5, context=16, d_model=8, n_layer=1, n_head=1), 0)
    for temperature in (0.0, 1.0):
        once = Settings(max_tokens=9, no_repeat_ngram=1, temperature=temperature)
        assert sorted(generate.generate(m, [[1]], replace(once, max_tokens=4))[0].ids) == [0, 2, 3, 4]
        with pytest.raises(ValueError, match=r"\[generate\] no id is possible after 3 new ones of prompt 1: no_repeat_ngram"):
            generate.generate(m, [[1], [1, 2]], once)
        with pytest.raises(ValueError, match=r"no id is possible after 0 new ones of prompt 0: .* Lower max_tokens or min_tokens"):
            generate.generate(m, [[1]], Settings(min_tokens=1, eos=tuple(range(5)), temperature=temperature))
    for beams in (1, 2, 4):
        assert sorted(beam_search(m, [1], BeamSettings(beams, 4, no_repeat_ngram=1)).ids) == [0, 2, 3, 4]
        with pytest.raises(ValueError, match=r"\[generate\] no id is possible after 4 new ones: no_repeat_ngram"):
            beam_search(m, [1], BeamSettings(beams, 9, no_repeat_ngram=1))
        ended = beam_search(m, [1], BeamSettings(beams, 9, no_repeat_ngram=1, eos=(0,)))  # before it comes to that
        assert (ended.reason, ended.ids[-1]) == ("eos", 0)
