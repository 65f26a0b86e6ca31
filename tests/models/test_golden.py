"""Tiny checkpoints written by transformers: its logits, with and without a cache, and under every kind of RoPE scaling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm import backend, hub, models
from fastlm.checkpoint import read_safetensors
from fastlm.models import convert

MODELS = Path(__file__).parents[1] / "data" / "models"
NAMES = ("gpt2", "gpt2-untied", "llama", "llama-tied", "llama-bias")
GOLDEN = np.load(MODELS / "logits.npz")


def close(got, want):
    """The bar for float32 against the reference: 1e-5 x max(1, |logit|)."""
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    model, tokenizer = hub.load_folder_or_gguf(MODELS / request.param)
    assert tokenizer is None
    return model, GOLDEN[f"{request.param}.ids"], GOLDEN[f"{request.param}.logits"]


def test_logits(golden):
    model, ids, want = golden
    close(model.logits(ids), want)
    close(model(ids).numpy(), want)
    close(model.logits(ids, last=True), want[:, -1])


def test_bits_alone_and_in_batch(golden):
    model, ids, _ = golden
    np.testing.assert_array_equal(model.logits(ids)[1], model.logits(ids[1:])[0])


def test_bits_do_not_depend_on_threads(golden, threads):
    model, ids, _ = golden
    found = []
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        found.append(model.logits(ids))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_cache(golden):
    """Prefill, then one token at a time; positions come from the cache."""
    model, ids, want = golden
    cache = model.new_cache(2, ids.shape[1])
    parts = [model.logits(ids[:, :20], cache)] + [model.logits(ids[:, t : t + 1], cache) for t in range(20, ids.shape[1])]
    close(np.concatenate(parts, axis=1), want)
    assert cache.lengths.tolist() == [ids.shape[1]] * 2
    with pytest.raises(ValueError, match=r"\[cache\] capacity|\[gpt\] ids must end within the context"):
        model.logits(ids[:, :1], cache)


def test_cache_of_different_lengths(golden):
    """Row 0 is 4 tokens behind row 1. What the cache holds beyond a row's length must not matter: here it is nan."""
    model, ids, want = golden
    cache = model.new_cache(2, ids.shape[1])
    for array in (*cache.keys, *cache.values):
        array.fill(np.nan)
    model.logits(ids[:1, :5], cache.row(0))
    model.logits(ids[1:, :9], cache.row(1))
    for t in (0, 1, 4, 5):
        n = 3 if t == 1 else 1
        rows = np.stack([ids[0, 5 + t : 5 + t + n], ids[1, 9 + t : 9 + t + n]])
        got = model.logits(rows, cache)
        close(got[0], want[0, 5 + t : 5 + t + n])
        close(got[1], want[1, 9 + t : 9 + t + n])
    assert cache.lengths.tolist() == [11, 15]
    cache.select([1, 1])
    close(model.logits(np.repeat(ids[1:, 15:16], 2, axis=0), cache), np.repeat(want[1:, 15:16], 2, axis=0))


def test_loss_is_that_of_the_logits(golden):
    model, ids, want = golden
    z = want[:, :-1].astype(np.float64)
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, ids[:, 1:, None].astype(int), -1).mean()
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", json.loads((MODELS / "rope.json").read_text()))
def test_rope_scaling(kind):
    golden = np.load(MODELS / "rope.npz")
    parameters = json.loads((MODELS / "rope.json").read_text())[kind]
    raw = json.loads((MODELS / "llama" / "config.json").read_text())
    model = models.declare(convert.config_from_hf(models.llama, raw | {"rope_parameters": parameters}))
    convert.load_tensors(model, read_safetensors(MODELS / "llama"), models.llama.HF_NAMES)
    close(model.logits(golden["ids"]), golden[kind])
    # The form of before transformers 5: rope_theta apart, rope_scaling with `type`.
    del raw["rope_parameters"]
    raw |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": {"type": parameters.pop("rope_type"), **parameters}}
    older = models.declare(convert.config_from_hf(models.llama, raw))
    assert older.blocks[0].attention.position.scaling == model.blocks[0].attention.position.scaling
    assert older.config.rope_base == model.config.rope_base


def test_refuses_ids():
    model, _ = hub.load_folder_or_gguf(MODELS / "gpt2")
    with pytest.raises(ValueError, match=r"ids must be \(B, T\) with T at least 1, got \(3,\)"):
        model.logits(np.zeros(3, int))
    with pytest.raises(ValueError, match="T at least 1"):
        model.logits(np.zeros((1, 0), int))
    with pytest.raises(TypeError, match="integers, got float64"):
        model.logits(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="from 0 to 96"):
        model.logits(np.full((1, 2), 97))
    with pytest.raises(ValueError, match="context of 48 positions, got 49"):
        model.logits(np.zeros((1, 49), int))
    with pytest.raises(ValueError, match=r"targets must be \(B, T\) = \(1, 4\), the shape of ids, got \(1, 3\)"):
        model.loss(np.zeros((1, 4), int), np.zeros((1, 3), int))
    with pytest.raises(ValueError, match="ids must fit into 32 bits, got 4294967299"):
        model.logits(np.full((1, 2), (1 << 32) + 3))
    with pytest.raises(ValueError, match="targets must fit into 32 bits, got 4294967296"):
        model.loss(np.zeros((1, 2), int), np.array([[0, 1 << 32]]))
