"""Decoder families against transformers: logits, first gradients, greedy ids, files, counts. See tests/data/make_decoders.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm import generate, hub, models
from fastlm.checkpoint import FormatError, read_json, write_json
from fastlm.models import convert
from fastlm.models.base import names
from fastlm.nn import Declared, count_parameters
from fastlm.train import AdamW

DATA = Path(__file__).parents[1] / "data" / "decoders"
GOLDEN = np.load(DATA / "golden.npz")
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
PUBLISHED = json.loads((DATA / "counts.json").read_text())


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |logit|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


def load(name):
    return hub.load_folder_or_gguf(DATA / name)[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model, ids = load(name), GOLDEN[f"{name}.ids"]
    close(model.logits(ids), GOLDEN[f"{name}.logits"])
    close(model.logits(ids, last=True), GOLDEN[f"{name}.logits"][:, -1])


@pytest.mark.parametrize("name", NAMES)
def test_cache(name):
    """Prefill beyond the window, then one token at a time; and rows of different lengths."""
    model, ids, want = load(name), GOLDEN[f"{name}.ids"], GOLDEN[f"{name}.logits"]
    cache = model.new_cache(2, 24)
    parts = [model.logits(ids[:, :13], cache)] + [model.logits(ids[:, t : t + 1], cache) for t in range(13, 24)]
    close(np.concatenate(parts, axis=1), want)
    cache = model.new_cache(2, 24)
    model.logits(ids[:1, :5], cache.row(0))
    model.logits(ids[1:, :14], cache.row(1))
    got = model.logits(np.stack([ids[0, 5:8], ids[1, 14:17]]), cache)
    close(got, np.stack([want[0, 5:8], want[1, 14:17]]))


@pytest.mark.parametrize("name", NAMES)
def test_first_gradients(name):
    model, ids = load(name).train(), GOLDEN[f"{name}.ids"]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}.loss"]), rel=1e-6)
    loss.backward()
    theirs = names(convert.table_of(models.module_of(model), model.config), model)
    for ours, p in model.named_parameters().items():
        want = GOLDEN[f"{name}.gradient.{theirs[ours]}"]
        if ours.endswith(convert_transposed(model)):
            want = want.T
        norm, error = np.linalg.norm(want), np.linalg.norm(p.grad - want)
        # A constant added to all scores of a query changes nothing: the gradient of such a key bias is zero but for rounding.
        assert error <= (1e-5 * norm if norm > 1e-12 else 1e-6), (ours, norm, error)


def convert_transposed(model):
    return tuple(models.module_of(model).HF_TRANSPOSED) or ("\0",)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_100_steps(name):
    model, curves = load(name).train(), np.load(DATA / "curves.npz")
    optimizer, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), []
    for tokens in curves["tokens"].astype(np.int32):
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.update(1e-3, None)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, curves[name], rtol=0, atol=1e-5)
    assert curves[name][-10:].mean() < curves[name][:10].mean() - 0.3


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    prompt, want = GOLDEN[f"{name}.prompt"], GOLDEN[f"{name}.greedy"]
    settings = generate.Settings(temperature=0.0, max_tokens=len(want))
    output = generate.generate(load(name), [prompt[0].tolist()], settings)[0]
    assert list(output.ids) == want.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_saved_twice(name, tmp_path):
    """The same bytes, the same logits, and the config that transformers wrote."""
    model, ids = load(name), GOLDEN[f"{name}.ids"]
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    hub.save(again, None, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))


@pytest.mark.parametrize("name", NAMES)
def test_saved_for_transformers(name, tmp_path):
    """Where transformers is installed: it loads what is saved, and computes the same."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hub.save(load(name), None, tmp_path / "a")
    theirs = getattr(hf, models.module_of(load(name)).HF_CLASS).from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        close(theirs(torch.tensor(GOLDEN[f"{name}.ids"].astype(np.int64))).logits.numpy(), GOLDEN[f"{name}.logits"])


@pytest.mark.parametrize("preset", PUBLISHED)
def test_counts(preset):
    model = models.declare(preset)
    assert count_parameters(model) == PUBLISHED[preset]
    assert all(isinstance(p.data, Declared) for p in model.named_parameters().values())


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gpt1"])
def test_file_without_model_type(name, tmp_path):
    """The class that it names says what it is."""
    (tmp_path / "model.safetensors").write_bytes((DATA / name / "model.safetensors").read_bytes())
    raw = read_json(DATA / name / "config.json")
    del raw["model_type"]
    write_json(tmp_path / "config.json", raw)
    assert hub.load_folder_or_gguf(tmp_path)[0].config == load(name).config


def test_gpt1_count():
    assert PUBLISHED["gpt1"] == 116_534_784


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 3}, r"layer_types\[1\] must be 'sliding_attention'"),
        ("mistral", {"sliding_window": 0}, "window must be an integer from 1"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type must be one of"),
        ("phi3-partial", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "rotary .* must be at most 1"),
        (
            "phi3-partial",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.1}},
            r"\(partial_rotary_factor\) .* turn from 1 to 8 of its 8 dimensions, got 0.1, which is 0",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_scaling of Phi-3 must be None: .* 'yarn'",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of Phi-3 must be None: .* 'linear'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt1", {"afn": "tanh"}, "'afn' must be one of gelu"),
        ("qwen3", {"q_norm": True}, "unknown key 'q_norm'"),
    ],
)
def test_refuses(name, changes, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((DATA / name / "model.safetensors").read_bytes())
    write_json(tmp_path / "config.json", read_json(DATA / name / "config.json") | changes)
    with pytest.raises((FormatError, ValueError), match=message):
        hub.load_folder_or_gguf(tmp_path)
