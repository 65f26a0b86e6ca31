"""A recorded step gives the bits of the ordinary one, for every model that generates, and what cannot be recorded is found out."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastlm import _C, backend, generate, models, ops
from fastlm.generate import Settings, recorded
from fastlm.models.base import CausalLM
from fastlm.models.quantize import convert, quantize
from fastlm.nn import Context
from fastlm.tensor import data

WIDE = {"vocab_size": 97, "context": 64, "d_model": 32, "n_layer": 2, "n_head": 4}
ROPE = {**WIDE, "d_ff": 48, "n_kv_head": 2, "head_dim": 8}
T5 = {
    **{k: v for k, v in WIDE.items() if k != "context"},
    "d_ff": 48,
    "n_encoder_layer": 2,
    "head_dim": 8,
    "n_bucket": 8,
    "max_distance": 9,
}
TINY: dict[str, dict[str, Any]] = {
    "gpt": WIDE,
    "gpt1": WIDE,
    "gpt3": {**WIDE, "window": 5},
    "megatron": WIDE,
    "llama": ROPE,
    "mistral": {**ROPE, "window": 6},
    "gemma": ROPE,
    "qwen2": ROPE,
    "qwen3": ROPE,
    "phi3": {k: v for k, v in ROPE.items() if k != "head_dim"},
    "palm": {**WIDE, "head_dim": 8},
    "mixtral": {**ROPE, "n_expert": 5},
    "glam": {**WIDE, "d_ff": 48, "head_dim": 8, "n_expert": 6, "n_bucket": 8, "max_distance": 9},
    "t5": {**T5, "activation": "gated-gelu_tanh"},
    "switch": {**T5, "n_expert": 5, "n_sparse": 1, "n_encoder_sparse": 1},
}
EVERY = sorted(TINY)
GREEDY, DRAWN = Settings(max_tokens=40), Settings(max_tokens=40, temperature=1.0, top_k=1)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13]]
SETTINGS = {
    "greedy": Settings(max_tokens=14),
    "drawn": Settings(max_tokens=14, temperature=1.3, top_k=20, top_p=0.9, eos=tuple(range(0, 97, 9))),
    "processed": Settings(max_tokens=14, temperature=1.1, repetition_penalty=1.2, no_repeat_ngram=2),
}


def tiny(name: str, **changes: Any) -> Any:
    """Weights large enough that ids depend on what was read."""
    module = importlib.import_module(f"fastlm.models.{name}")
    model = models.create(module.Config(**{**TINY[name], **changes}), seed=3)
    for key, p in model.named_parameters().items():
        if p.ndim == 2:
            p.data *= np.float32(1 if "embedding" in key else 6)
    return model


class Watch:
    """Counts how steps were taken, and keeps their logits. Steps are taken one by one, and nothing is kept from call to call: what these
    add is tests/generate/test_kept.py's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = self.recordings = 0
        self.logits: list[bytes] = []
        run, step, record = backend.Recording.run, generate.engine.Decoder.step, backend.Recording.__init__

        def counted_run(this: Any) -> None:
            self.runs += 1
            run(this)

        def counted_record(this: Any, *given: Any) -> None:
            self.recordings += 1
            record(this, *given)

        def watched(this: Any) -> Any:
            logits = step(this)
            self.logits.append(logits.tobytes())
            return logits

        monkeypatch.setattr(backend.Recording, "run", counted_run)
        monkeypatch.setattr(backend.Recording, "__init__", counted_record)
        monkeypatch.setattr(generate.engine.Decoder, "step", watched)
        monkeypatch.setattr(generate.engine.Decoder, "ahead", lambda *given: [])
        monkeypatch.setattr(generate.engine, "take", generate.kept.unkept)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def both_ways(model: Any, prompts: Any, settings: Settings, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generates with recording and without, and compares ids, reasons and the bits of every logit."""
    reading = (lambda: generate.Reading(model, prompts)) if hasattr(model, "encode") else (lambda: model)
    first = [[model.config.start] for _ in prompts] if hasattr(model, "encode") else prompts
    monkeypatch.setenv("FASTLM_RECORD", "1")
    watch.logits.clear()
    outputs = generate.generate(reading(), first, settings, seeds=[5 + i for i in range(len(prompts))])
    bits, runs = list(watch.logits), watch.runs
    assert recorded.why_not(model) == []
    assert runs > 0, "nothing was run from a recording"
    monkeypatch.setenv("FASTLM_RECORD", "0")
    watch.logits.clear()
    expected = generate.generate(reading(), first, settings, seeds=[5 + i for i in range(len(prompts))])
    assert watch.runs == runs, "FASTLM_RECORD=0 still runs recordings"
    assert outputs == expected
    assert bits == watch.logits


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", EVERY)
def test_every_model(name: str, kind: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    for prompts in (PROMPTS, PROMPTS[:1], [[1, 2, 3], [7, 8, 9], [4, 5]]):
        both_ways(model, prompts, SETTINGS[kind], watch, monkeypatch)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "glam", "t5", "switch"])
def test_small_caches(name: str, cache: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    model.cache_dtype = cache
    both_ways(model, PROMPTS, SETTINGS["drawn"], watch, monkeypatch)


@pytest.mark.parametrize(("kind", "activations"), [("Q4_1", "float32"), ("Q8_0", "int8"), ("Q8_ROW", "int8"), ("bfloat16", "")])
@pytest.mark.parametrize("name", ["llama", "mixtral", "glam", "t5", "switch"])
def test_small_weights(name: str, kind: str, activations: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of experts that no prompt has used, and that are packed while a step is recorded."""
    model = tiny(name, **({"n_expert": 30} if "n_expert" in TINY[name] else {}))
    if kind == "bfloat16":
        convert(model, kind)
    else:
        quantize(model, kind, activations)
    both_ways(model, PROMPTS, SETTINGS["drawn"], watch, monkeypatch)
    both_ways(model, PROMPTS[2:3], SETTINGS["greedy"], watch, monkeypatch)


@pytest.mark.parametrize("name", ["glam", "t5", "llama"])
def test_many_positions(name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what attention takes at a time, and past the table of distances."""
    model = tiny(name, **({} if name == "t5" else {"context": 2 * _C.attention_chunk + 60}))
    settings = Settings(max_tokens=2 * _C.attention_chunk + 20, temperature=1.3)
    both_ways(model, PROMPTS[:3], settings, watch, monkeypatch)


def test_counts_in_memory() -> None:
    """The kernel takes the counts that it finds; garbage neither runs long nor writes behind the rows."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((6, 5), np.float32), rng.standard_normal((3, 4, 5), np.float32)
    counts = np.array([1, 2, 3], np.int64)
    recording = backend.Recording(lambda: ops.grouped_linear(x, weights, counts))
    for found, sizes in (
        ([4, 0, 2], [4, 0, 2]), ([-7, 2, 1], [0, 2, 1]), ([1 << 62, 1 << 62, 5], [6, 0, 0]), ([-(1 << 63), 5, 5], [0, 5, 1]),
    ):  # fmt: skip
        counts[:] = found
        recording.spoil()
        recording.run()
        y, rows = recording.result, sum(sizes)
        np.testing.assert_array_equal(y[:rows], ops.grouped_linear(x[:rows], weights, sizes))
        assert np.isnan(y[rows:]).all()


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "switch"])
def test_beams(name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beams change places in the cache that the recording reads, and all read one source."""
    model = tiny(name)
    encodes = hasattr(model, "encode")
    settings = generate.BeamSettings(beams=3, max_tokens=14, length_penalty=0.7)
    found = []
    for on in ("1", "0"):
        monkeypatch.setenv("FASTLM_RECORD", on)
        watch.logits.clear()
        reading = generate.Reading(model, PROMPTS[1:2]) if encodes else model
        prompt = [model.config.start] if encodes else PROMPTS[1]
        found.append((generate.beam_search(reading, prompt, settings), list(watch.logits), watch.runs))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == found[1][2] > 5
    assert recorded.why_not(model) == []


def test_rows_that_end_are_recorded_anew(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    settings = Settings(max_tokens=30, temperature=1.5, eos=tuple(range(0, 97, 8)))
    both_ways(model, PROMPTS, settings, watch, monkeypatch)
    assert watch.recordings > 1, "the rows must end at different steps for this test to mean anything"


def test_one_id_again_and_again(watch: Watch) -> None:
    """A model that repeats itself is looked at once all the same, with other ids; the look leaves no trace."""
    model = tiny("llama")
    cache = model.new_cache(2, 40)
    model.logits(np.array([[1, 2, 3], [3, 2, 1]]), cache, last=True)
    decoder = recorded.Decoder(model, cache)
    for n in range(20):
        decoder.ids[:] = 5
        logits = decoder.step()
        assert cache.lengths.tolist() == [4 + n] * 2
    assert watch.runs == 20  # the first step is recorded, the second run with its own ids and with others
    other = model.new_cache(2, 40)
    model.logits(np.array([[1, 2, 3], [3, 2, 1]]), other, last=True)
    for _ in range(20):
        expected = model.logits(np.full((2, 1), 5), other, last=True)
    assert logits.tobytes() == expected.tobytes()


def test_other_threads(watch: Watch, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    model = tiny("llama")
    cache = model.new_cache(1, 20)
    model.logits(np.array([[1, 2, 3]]), cache, last=True)
    decoder = recorded.Decoder(model, cache)
    for n in (1, 1, 1, 2, 2):
        backend.set_num_threads(n)
        decoder.step()
    assert watch.recordings == 2


class Planted(CausalLM):
    """A llama with something between its kernels that a recorder does not see."""

    def __init__(self, inner: Any, plant: Any) -> None:
        self.config, self.inner, self.plant = inner.config, inner, plant
        self.token_embedding, self.head = inner.token_embedding, inner.head

    def hidden(self, ids: Any, context: Context) -> Any:
        return self.plant(self.inner.hidden(ids, context), ids, context)


def numpy_temporary(x: Any, ids: Any, context: Context) -> Any:
    return data(x) * np.float32(1.5)


def numpy_in_place(x: Any, ids: Any, context: Context) -> Any:
    data(x)[...] *= np.float32(1.5)
    return x


def numpy_into_its_memory(x: Any, ids: Any, context: Context) -> Any:
    return np.multiply(data(x), np.float32(1.5), out=backend.empty(x.shape))


def host_length(x: Any, ids: Any, context: Context) -> Any:
    return ops.scale(x, 1.0 + float(context.cache.lengths[0]) if context.cache else 1.0)


def host_id(x: Any, ids: Any, context: Context) -> Any:
    return ops.scale(x, 1.0 + float(ids[0, 0]))


kept = np.zeros((1, 1, 32), np.float32)


def frozen(x: Any, ids: Any, context: Context) -> Any:
    """Into an array that outlives the step."""
    if x.shape == kept.shape:
        np.copyto(kept, data(x))
        return kept
    return x


@pytest.mark.parametrize("plant", [numpy_temporary, numpy_in_place, numpy_into_its_memory, host_length, host_id, frozen])
def test_planted_host_arithmetic_is_found(
    plant: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Planted(tiny("llama"), plant)
    settings = Settings(max_tokens=10)
    monkeypatch.setenv("FASTLM_RECORD", "0")
    expected = generate.generate(model, PROMPTS[:1], settings)
    bits = list(watch.logits)
    watch.logits.clear()
    monkeypatch.setenv("FASTLM_RECORD", "1")
    with caplog.at_level(logging.WARNING, logger="fastlm.generate"):
        assert generate.generate(model, PROMPTS[:1], settings) == expected
        assert generate.generate(model, PROMPTS[:1], settings) == expected
    assert watch.logits == bits * 2
    assert len(recorded.why_not(model)) == 1
    assert len(caplog.records) == 1
    assert "Planted: steps run in Python" in caplog.text
    assert watch.recordings == 1, "what was refused once is not tried again"


def test_dynamic_rope_is_refused(watch: Watch) -> None:
    model = tiny("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, context=16)
    generate.generate(model, [[1, 2, 3]], Settings(max_tokens=9))
    assert recorded.why_not(model) == []  # within the context its turns are fixed
    cache = model.new_cache(1, 40)
    model.logits(np.array([[1, 2, 3]]), cache, last=True)
    recorded.Decoder(model, cache).step()
    assert recorded.why_not(model) == ["dynamic rope_scaling turns by the length of the sequence"]


def test_an_error_of_the_step_stays_one() -> None:
    model = tiny("gpt")
    cache = model.new_cache(1, 3)
    model.logits(np.array([[1, 2]]), cache, last=True)
    decoder = recorded.Decoder(model, cache)
    decoder.step()
    with pytest.raises(ValueError, match=r"\[cache\] capacity must be at least 4"):
        decoder.step()
    cache = model.new_cache(1, 9)
    decoder = recorded.Decoder(model, cache)
    decoder.ids[:] = 97
    with pytest.raises(ValueError, match=r"\[embedding\] ids must be from 0 to 96"):
        decoder.step()
    assert cache.lengths.tolist() == [0]
    assert recorded.why_not(model) == []


def test_recording_alone() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = np.ones((4, 3), np.float32)
    recording = backend.Recording(lambda: ops.scale(ops.linear(x, weight), 2.0))
    assert len(recording) == 2
    assert [name for name, _ in recording.profile(1)] == ["Matmul", "ScaleAdd"]
    x += 1
    recording.spoil()
    recording.run()
    np.testing.assert_array_equal(recording.result, ops.scale(ops.linear(x, weight), 2.0))
    assert not backend.recording()
    with pytest.raises(backend.Unrecordable, match="made without a kernel"):
        backend.Recording(lambda: ops.linear(x + 1, weight))
    with pytest.raises(backend.Unrecordable, match="operation of the host"):
        backend.Recording(lambda: ops.global_norm([x]))
    with pytest.raises(RuntimeError, match="records already"):
        backend.Recording(lambda: backend.Recording(lambda: None))
    with pytest.raises(ZeroDivisionError):
        backend.Recording(lambda: 1 // 0)
    assert not backend.recording()


def counting(end: int, infinite: bool) -> Any:
    """A model that answers id i with i + 1, and `end` with logits that are all -inf, or all nan."""
    module = importlib.import_module("fastlm.models.llama")
    size = 64
    model = models.create(
        module.Config(vocab_size=size, context=64, d_model=size, n_layer=2, n_head=2, n_kv_head=2, d_ff=48, tied=False)
    )
    for name, p in model.named_parameters().items():
        p.data[...] = 1 if "norm" in name else 0  # every block adds nothing
    model.token_embedding.weight.data[...] = np.eye(size, dtype=np.float32)
    model.head.weight.data[...] = np.roll(np.eye(size, dtype=np.float32), 1, axis=0)
    model.head.weight.data[:, end] = -3e38  # times the root of 64
    if not infinite:
        model.token_embedding.weight.data[end] = np.nan
    return model


@pytest.mark.parametrize("record", ["1", "0"])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("settings", [GREEDY, DRAWN, replace(GREEDY, repetition_penalty=1.1)], ids=["greedy", "drawn", "processed"])
@pytest.mark.parametrize("infinite", [True, False])
def test_logits_without_a_token_are_refused(infinite: bool, settings: Settings, small: bool, record: str, monkeypatch: Any) -> None:
    """Greedy went on with id 0 where all were -inf."""
    monkeypatch.setenv("FASTLM_RECORD", record)
    monkeypatch.setattr("fastlm.generate.kept.SMALL", 4 << 20 if small else 0)
    message = "logits row {} is all -inf: no token is possible" if infinite else "logits row {} has nan"
    for end in (2, 3, 4, 5, 20):  # read in the prompt's pass, recorded, compared with the recording, then run by itself, ahead
        found: list[Any] = []
        with pytest.raises(ValueError, match=message.format(0)):
            list(generate.steps(counting(end, infinite), [[2]], settings, outputs=found))
        assert found[0].ids == list(range(3, end + 1))
    found = []
    with pytest.raises(ValueError, match=message.format(1)):
        list(generate.steps(counting(20, infinite), [[2], [9]], settings, outputs=found))
    assert [o.ids for o in found] == [list(range(3, 14)), list(range(10, 21))]
    for beams in (1, 3):
        with pytest.raises(ValueError, match=message.format(0)):
            generate.beam_search(counting(9, infinite), [2], generate.BeamSettings(beams, max_tokens=30))
