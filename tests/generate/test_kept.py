"""What is kept between calls of a small model, and steps made ahead, change no id; what has changed is seen."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from fastlm import backend, generate, ops
from fastlm.generate import Settings, engine, kept, recorded
from fastlm.lm import LM
from fastlm.models.quantize import convert, quantize
from tests.generate.test_recorded import EVERY, PROMPTS, SETTINGS, tiny

LONG = [[(7 * i * i + 3 * i) % 97 for i in range(n)] for n in (45, 31, 1)]


def in_python(model: Any, prompts: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """The same call with neither recording nor anything kept."""
    monkeypatch.setenv("FASTLM_RECORD", "0")
    found = generate.generate(model, prompts, settings, **more)
    monkeypatch.setenv("FASTLM_RECORD", "1")
    return found


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an item for each recording."""
    made: list[int] = []
    record = backend.Recording.__init__

    def counted(this: Any, *given: Any) -> None:
        made.append(1)
        record(this, *given)

    monkeypatch.setattr(backend.Recording, "__init__", counted)
    return made


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("t5", "switch")])
def test_again_and_again(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on nothing is recorded, and readers and steps run whose first use was compared with Python."""
    model = tiny(name)
    calls = [PROMPTS[1:2], LONG[:1], PROMPTS[:1], LONG[1:2], PROMPTS[1:2], LONG[2:]]
    expected = [in_python(model, prompts, SETTINGS[kind], monkeypatch, seeds=3) for prompts in calls]
    made = recordings(monkeypatch)
    for turn in range(3):
        for prompts, ids in zip(calls, expected, strict=True):
            assert generate.generate(model, prompts, SETTINGS[kind], seeds=3) == ids
        if turn == 1:
            made.clear()
    assert made == [], "what was recorded was not kept"
    assert recorded.why_not(model) == []


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_small_caches_and_weights(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.cache_dtype = cache
    quantize(model, "Q8_0", "int8")
    for prompts in (LONG[:1], PROMPTS):
        expected = in_python(model, prompts, SETTINGS["drawn"], monkeypatch, seeds=[4] * len(prompts))
        for _ in range(3):
            assert generate.generate(model, prompts, SETTINGS["drawn"], seeds=[4] * len(prompts)) == expected


def test_what_changes_is_seen(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Weights in place, other weights, another attribute, other settings, another number of threads."""
    model = tiny("llama")
    settings = Settings(max_tokens=15, temperature=1.5)

    def in_place() -> None:
        for p in model.named_parameters().values():
            p.data[:] = p.data[::-1].copy()

    def other_array() -> None:
        model.head.weight.data = model.head.weight.data[::-1].copy()

    def other_scale() -> None:
        model.blocks[0].attention.scale = 5.0

    def other_part() -> None:
        model.blocks.reverse()

    def other_threads() -> None:
        backend.set_num_threads(1)

    def shared_head() -> None:
        model.head = None

    for change in (in_place, other_array, other_scale, other_part, other_threads, shared_head, in_place):
        before = [generate.generate(model, [LONG[0]], settings) for _ in range(3)]
        assert before[0] == before[1] == before[2]
        change()
        expected = in_python(model, [LONG[0]], settings, monkeypatch)
        assert generate.generate(model, [LONG[0]], settings) == expected
        if change is not other_threads:
            assert expected != before[0], f"{change.__name__} must change an id for this test to mean anything"


def test_other_choices_on_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt")
    many = [Settings(max_tokens=20, temperature=t, top_k=k, min_tokens=m) for t in (0.0, 1.2, 2.0) for k in (0, 9) for m in (0, 3)]
    for _ in range(2):
        for n, settings in enumerate(many):
            assert generate.generate(model, [[5, 6]], settings, seeds=n) == in_python(
                model, [[5, 6]], settings, monkeypatch, seeds=n
            )


def test_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are made ahead, but none is seen after an end: eos, stop, the limit, a loop that is left."""
    monkeypatch.setattr(engine, "AHEAD", 1e9)
    model = tiny("llama")
    settings = Settings(max_tokens=30, temperature=1.0)
    free = generate.generate(model, [[1, 2]], settings, seeds=1)[0].ids
    eos = Settings(max_tokens=30, temperature=1.0, eos=(free[17],))
    first = free.index(free[17]) + 1
    for _ in range(3):
        found = generate.generate(model, [[1, 2]], eos, seeds=1)[0]
        assert (found.ids, found.reason) == (free[:first], "eos")
        found = generate.generate(model, [[1, 2]], settings, seeds=1, stop=lambda row, id: id == free[17])[0]
        assert (found.ids, found.reason) == (free[:first], "stop")
        for n, (_, id) in enumerate(generate.steps(model, [[1, 2]], settings, 1)):
            assert id == free[n]
            if n == 5:
                break
    rows = [[1, 2], [3], [4, 5, 6]]
    for stop in (None, lambda row, id: id % 5 == row):
        for settings in (eos, SETTINGS["drawn"]):
            expected = in_python(model, rows, settings, monkeypatch, seeds=[1, 2, 3], stop=stop)
            for _ in range(3):
                assert generate.generate(model, rows, settings, seeds=[1, 2, 3], stop=stop) == expected


def test_nan_is_refused_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a kept step become nan at one position: the ids before it are given, then it raises as one step does."""
    monkeypatch.setattr(engine, "AHEAD", 1e9)
    model = tiny("gpt")
    for _ in range(3):
        expected = generate.generate(model, [[1, 2]], Settings(max_tokens=20))[0].ids
    model.position_embedding.weight.data[9] = np.nan
    found: list[int] = []

    def follow() -> None:
        for _, id in generate.steps(model, [[1, 2]], Settings(max_tokens=20)):
            found.append(id)

    with pytest.raises(ValueError, match="nan"):
        follow()
    assert found == expected[:8]


def test_side_by_side_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls at once have a session each."""
    model = tiny("llama")
    settings = Settings(max_tokens=25, temperature=1.1)
    expected = [in_python(model, [[n + 1, 7]], settings, monkeypatch, seeds=n)[0].ids for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            if generate.generate(model, [[n + 1, 7]], settings, seeds=n)[0].ids != expected[n]:
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    iterators = [generate.steps(model, [[n + 1, 7]], settings, n) for n in range(4)]
    found = list(zip(*iterators, strict=True))
    assert [[pairs[n][1] for pairs in found] for n in range(4)] == expected
    assert len(model._shelf.sessions) <= kept.MOST


@pytest.mark.parametrize("name", ["gpt", "llama", "glam", "mixtral"])
def test_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit of readers and steps, recorded, compared and run, is that of the model in Python."""
    model = tiny(name)
    cache = model.new_cache(1, 64)
    for turn in range(4):
        session = kept.take(model, 1, 60)
        cache.lengths[:] = 0
        prompt = LONG[0] if turn % 2 else [*LONG[0][1:], 5]
        assert session.read(model, prompt).tobytes() == model.logits(np.array([prompt]), cache, last=True).tobytes()
        decoder, _ = session.decoder(model, None, lambda: (None, []))
        for id in (3, 3, 9, turn, 50):
            decoder.ids[:] = id
            assert decoder.step().tobytes() == model.logits(np.array([[id]]), cache, last=True).tobytes()
        assert decoder.recording is not None
        kept.give(model, session)
    assert recorded.why_not(model) == []


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shelf keeps no model alive, is not copied, and takes no large caches."""
    model = tiny("llama")
    generate.generate(model, [[1, 2]])
    assert len(model._shelf.sessions) == 1
    assert copy.deepcopy(model)._shelf.sessions == []
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
    model = tiny("llama")
    with monkeypatch.context() as m:
        m.setattr(kept, "LARGEST", 40_000)
        for length, kept_ones in ((1, [1]), (2, [2]), (3, [2])):  # a sequence takes 16,384 bytes
            generate.generate(model, [[1, 2]] * length)
            assert [s.cache.batch for s in model._shelf.sessions] == kept_ones
    lm = LM(model)
    for change in (lambda: model.to("cpu", "bfloat16"), lambda: convert(model, "float32"), lambda: lm.quantize("Q8_0")):
        lm.generate_ids([1, 2])
        old = weakref.ref(model.blocks[0].mlp.up.weight.data)
        change()
        assert old() is None, "the shelf holds weights that were replaced"


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("t5", "switch")])
def test_large_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded of a large model outlives the call as well; its prompts are read as ever, and its weights are not copied."""
    monkeypatch.setattr(kept, "SMALL", 0)
    model = tiny(name)
    calls = [PROMPTS[1:2], PROMPTS[:1], LONG[:1], PROMPTS[:2]]
    expected = [in_python(model, prompts, SETTINGS["drawn"], monkeypatch, seeds=3) for prompts in calls]
    made = recordings(monkeypatch)
    for turn in range(3):
        made.clear()
        for prompts, output in zip(calls, expected, strict=True):
            assert generate.generate(model, prompts, SETTINGS["drawn"], seeds=3) == output
        assert len(made) <= (9, 9, 2)[turn]  # a batch of which one ends early begins anew
    assert all(not session.small for session in model._shelf.sessions)
    assert all(not d.recording._turned for session in model._shelf.sessions for d, _ in session._steps.values())


def test_turned_weights() -> None:
    """A recording that keeps transposed copies has the bits of the weights as they lie, awkward sizes too."""
    rng = np.random.default_rng(0)
    for K, sizes in ((1, (1, 1)), (17, (33, 5, 16)), (64, (172, 172)), (33, (1,))):
        x = rng.standard_normal((1, 1, K), np.float32)
        weights = [rng.standard_normal((n, K), np.float32) for n in sizes]
        bias, residual = rng.standard_normal(sizes[0], np.float32), rng.standard_normal((1, 1, sizes[0]), np.float32)

        def step(x: Any = x, weights: Any = weights, bias: Any = bias, residual: Any = residual) -> Any:
            return [*ops.linears(x, weights), ops.linear(x, weights[0], bias, "gelu", residual)]

        recording = backend.Recording(step, turned=True)
        for _ in range(2):
            recording.spoil()
            recording.run()
            for found, expected in zip(recording.result, step(), strict=True):
                assert found.shape == expected.shape
                assert found.tobytes() == expected.tobytes()
            for w in weights:
                w *= np.float32(1.5)
            recording.refresh()


def test_positions() -> None:
    starts = np.array([3, 0, 7], np.int32)
    np.testing.assert_array_equal(ops.positions(starts, 4), starts[:, None] + np.arange(4))
    with pytest.raises(TypeError, match=r"\[positions\] starts must be a contiguous array"):
        ops.positions(starts.astype(np.int64), 2)
