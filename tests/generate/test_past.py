"""What a Past keeps changes no bit, spares what was read, and what has changed is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastlm
from fastlm import backend, generate, models
from fastlm.generate import Past, Settings, engine, kept, recorded
from fastlm.models.quantize import quantize
from tests.generate.test_recorded import EVERY, SETTINGS, tiny

CAUSAL = [name for name in EVERY if name not in ("t5", "switch")]
NEW = [[5, 9, 2, 40, 41], [7], [11, 3, 96, 1, 0, 2, 8]]  # what is said after each answer


class Reads:
    """How many positions of prompts each call reads, and the bits of the logits that follow them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.positions = 0
        self.logits: list[bytes] = []
        prefill, read = engine.prefill, kept.Session.read

        def counted_prefill(model: Any, prompts: Any, cache: Any) -> Any:
            return self._seen(prompts, prefill(model, prompts, cache))

        def counted_read(this: Any, model: Any, prompt: Any) -> Any:
            return self._seen([prompt], read(this, model, prompt))

        monkeypatch.setattr(engine, "prefill", counted_prefill)
        monkeypatch.setattr(kept.Session, "read", counted_read)

    def _seen(self, prompts: Any, logits: Any) -> Any:
        self.positions += sum(len(ids) for ids in prompts)
        self.logits.append(logits.tobytes())
        return logits

    def take(self) -> tuple[int, list[bytes]]:
        seen, self.positions, self.logits = (self.positions, self.logits), 0, []
        return seen


def talk(
    model: Any, settings: Settings, past: Past | None, reads: Reads, new: Any = NEW
) -> list[tuple[int, list[bytes], list[int]]]:
    """Positions read, bits and ids of a talk whose every prompt is all that was said before and something new."""
    prompt: list[int] = [1, 2, 3, 4]
    found = []
    for more in new:
        prompt = prompt + more
        ids = generate.generate(model, [prompt], settings, 3, past=past)[0].ids
        found.append((*reads.take(), ids))
        prompt = prompt + ids
    return found


@pytest.fixture(params=[True, False], ids=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's prompts are read by recorded steps, a large one's are not."""
    if not request.param:
        monkeypatch.setattr(kept, "SMALL", 0)
        monkeypatch.setattr("fastlm.generate.past.SMALL", 0)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_talk(name: str, kind: str, size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = tiny(name), Reads(monkeypatch)
    plain = talk(model, SETTINGS[kind], None, reads)
    past = Past()
    for _ in range(2):  # the second time the prompt begins with less than what is there
        kept_one = talk(model, SETTINGS[kind], past, reads)
        assert [x[1:] for x in kept_one] == [x[1:] for x in plain]
    assert all(some[0] <= len(more) + 1 for some, more in zip(kept_one[1:], NEW[1:], strict=True))  # + 1: the last answer's last id
    assert all(all_[0] > some[0] for some, all_ in zip(kept_one[1:], plain[1:], strict=True))
    assert recorded.why_not(model) == []


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_small_caches_and_weights(cache: str, size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = tiny("llama"), Reads(monkeypatch)
    model.cache_dtype = cache
    quantize(model, "Q8_0", "int8")
    plain = talk(model, SETTINGS["drawn"], None, reads)
    assert [x[1:] for x in talk(model, SETTINGS["drawn"], Past(), reads)] == [x[1:] for x in plain]


def test_long_prompts_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a chunk of 512 positions, more than the cache had room for, up to the context's end."""
    model, reads = tiny("llama", context=1400), Reads(monkeypatch)
    new = [[(7 * i * i + 3 * i) % 97 for i in range(n)] for n in (30, 300, 700, 330, 9)]
    plain = talk(model, Settings(max_tokens=6), None, reads, new)
    assert len(plain[-1][2]) == 3  # where the context ends
    past = Past()
    assert [x[1:] for x in talk(model, Settings(max_tokens=6), past, reads, new)] == [x[1:] for x in plain]
    assert len(past) == 1399


def test_other_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads, past = tiny("gpt"), Reads(monkeypatch), Past()
    settings = Settings(max_tokens=5)
    for prompt, read in [
        ([1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5, 6], 1),  # the same again
        ([1, 2, 3], 1),  # less of it
        ([1, 2, 9, 4, 5, 6], 4),
        ([8], 1),
        ([8, 7], 1),
    ]:
        ids = generate.generate(model, [prompt], settings, past=past)[0].ids
        assert reads.take()[0] == read, prompt
        assert generate.generate(model, [prompt], settings)[0].ids == ids
        reads.take()


def test_what_changes_is_seen(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Other weights, another kind of cache, another number of threads, another model; in place only after `clear`."""
    model, reads, past = tiny("llama"), Reads(monkeypatch), Past()
    prompt, settings = [1, 2, 3, 4, 5, 6, 7], Settings(max_tokens=9)

    def other_array() -> None:
        weight = model.blocks[0].attention.v.weight
        weight.data = weight.data * np.float32(1.5)

    def in_place() -> None:
        model.blocks[0].attention.v.weight.data[:] *= np.float32(0.3)
        past.clear()
        assert len(past) == 0

    def other_cache() -> None:
        model.cache_dtype = "int8"

    def other_weights() -> None:
        quantize(model, "Q4_0")

    generate.generate(model, [prompt], settings, past=past)
    for change in (other_array, in_place, other_cache, other_weights, lambda: backend.set_num_threads(1)):
        change()
        reads.take()
        ids = generate.generate(model, [prompt], settings, past=past)[0].ids
        assert reads.take()[0] == len(prompt), change
        assert generate.generate(model, [prompt], settings)[0].ids == ids
    other = tiny("gpt")
    assert generate.generate(other, [prompt], settings, past=past) == generate.generate(other, [prompt], settings)


def test_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterator that is closed, or a stop, leaves what was read; steps that were made ahead are not taken for it."""
    model, reads, past = tiny("llama"), Reads(monkeypatch), Past()
    settings = Settings(max_tokens=30)
    steps = generate.steps(model, [[1, 2, 3]], settings, past=past)
    ids = [next(steps)[1] for _ in range(4)]
    with pytest.raises(RuntimeError, match="in use by a call that has not ended"):
        generate.generate(model, [[1, 2, 3]], settings, past=past)
    with pytest.raises(RuntimeError, match="in use"):
        past.clear()
    steps.close()
    reads.take()
    for prompt in ([1, 2, 3, *ids, 9], [1, 2, 3, *ids[:2], 10, 11]):
        found = generate.generate(model, [prompt], settings, past=past)[0].ids
        assert reads.take()[0] <= 3
        assert generate.generate(model, [prompt], settings)[0].ids == found
        reads.take()

    def fails(index: int, id: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate.generate(model, [[1, 2, 3, 5]], settings, stop=fails, past=past)
    assert generate.generate(model, [[1, 2, 3, 5, 6]], settings, past=past) == generate.generate(model, [[1, 2, 3, 5, 6]], settings)


def test_refusals() -> None:
    lm = fastlm.LM(tiny("llama"))
    past = fastlm.Past()
    with pytest.raises(ValueError, match=r"past must be None for 2 prompts.*call for each"):
        lm.generate_ids([[1], [2]], past=past)
    with pytest.raises(ValueError, match="past must be None with beams"):
        lm.generate_ids([1], past=past, beams=2)
    with pytest.raises(TypeError, match=r"past must be a fastlm\.Past or None, got list"):
        lm.generate_ids([1], past=[1])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="past must be None: T5 keeps"):
        fastlm.LM(tiny("t5")).generate_ids([1, 2], past=past)
    xlnet = models.create(models.xlnet.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_ff=32))
    with pytest.raises(ValueError, match="past must be None: XLNet keeps"):
        fastlm.LM(xlnet).generate_ids([1, 2], past=past)
    assert lm.generate_ids([1], past=past) == lm.generate_ids([1])  # none of these has left it in use
