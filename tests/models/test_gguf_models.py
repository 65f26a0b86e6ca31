"""GGUF files of the families that people run: against float64, against llama.cpp where it is installed. See tests/data/make_gguf.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastlm import hub, models
from fastlm.checkpoint import QuantizedArray, read_gguf
from fastlm.generate import Settings, generate
from fastlm.models.gguf import config_from_gguf

DATA = Path(__file__).parents[1] / "data" / "gguf"
GOLDEN = np.load(DATA / "golden.npz")
KINDS = {"mistral": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "phi3": "Phi3"}
KINDS |= {"mixtral": "Mixtral", "mixtral-q8": "Mixtral"}
EACH = pytest.mark.parametrize("name", KINDS)


def load(name, dtype=None):
    return hub.load_folder_or_gguf(DATA / f"{name}.gguf", dtype=dtype)[0]


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |logit|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


@EACH
def test_logits(name):
    model, ids = load(name), GOLDEN["ids"]
    assert type(model).__name__ == KINDS[name]
    close(model.logits(ids), GOLDEN[name])
    cache = model.new_cache(2, ids.shape[1])
    parts = [model.logits(ids[:, :7], cache)] + [model.logits(ids[:, t : t + 1], cache) for t in range(7, ids.shape[1])]
    close(np.concatenate(parts, axis=1), GOLDEN[name])


def test_quantised_experts_are_their_dequantised_copies():
    """To the bit; each is a matrix out of the stack that the file holds."""
    model, wide, ids = load("mixtral-q8"), load("mixtral-q8", "float32"), GOLDEN["ids"]
    quantised = {key for key, p in model.named_parameters().items() if isinstance(p.data, QuantizedArray)}
    assert sum(".experts." in key for key in quantised) == 2 * 4 * 3
    assert not any(isinstance(p.data, QuantizedArray) for p in wide.named_parameters().values())
    np.testing.assert_array_equal(model.logits(ids), wide.logits(ids))
    prompts = [ids[0, :5].tolist(), ids[1, :9].tolist()]
    settings = Settings(temperature=0.0, max_tokens=12)
    assert [o.ids for o in generate(model, prompts, settings)] == [o.ids for o in generate(wide, prompts, settings)]


@EACH
def test_saved_as_a_folder(name, tmp_path):
    model = load(name)
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    assert again.config == model.config
    close(again.logits(GOLDEN["ids"]), GOLDEN[name])


@pytest.mark.parametrize("name", [name for name in KINDS if name != "mixtral-q8"])
def test_against_llama_cpp(name):
    """The same file there, which rounds activations, keys and values to float16."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(DATA / f"{name}.gguf"), logits_all=True, n_ctx=64, verbose=False)
    ids = GOLDEN["ids"][0].tolist()
    theirs.eval(ids)
    got = np.array(theirs.scores[: len(ids)])
    want = load(name).logits(np.array([ids]))[0]
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 2e-2, error.max()


def test_refuses():
    metadata, tensors = read_gguf(DATA / "qwen3.gguf")
    module = models.ARCHITECTURES["qwen3"]
    for change, message in (
        ({"qwen3.attention.value_length": 8}, "value_length must be the head size 16, got 8"),
        ({"qwen3.rope.dimension_count": 8}, "dimension_count must be the head size 16, got 8"),
        ({"qwen3.expert_count": 4}, "expert_count must be 0, got 4"),
        ({"qwen3.attention.sliding_window": 512}, r"unknown key qwen3\.attention\.sliding_window = 512"),
    ):
        with pytest.raises(ValueError, match=message):
            config_from_gguf(module, "qwen3", metadata | change, tensors)


def test_share_of_turned_dimensions():
    """44 times the float 30 / 44 is less than 30, and is cut."""
    metadata, tensors = read_gguf(DATA / "phi3.gguf")
    sizes = {"phi3.embedding_length": 88, "phi3.attention.head_count": 2, "phi3.rope.dimension_count": 30}
    config = config_from_gguf(models.phi3, "phi3", metadata | sizes, tensors)
    assert int(config.head_dim * config.rotary) == 30
