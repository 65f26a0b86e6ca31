"""Mixtral against transformers: logits, first gradients with the auxiliary loss, losses, generation, files. See make_experts.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlm import generate, hub, models
from fastlm.checkpoint import read_safetensors, write_safetensors
from fastlm.generate import BeamSettings, Settings, beam_search
from fastlm.models import convert
from fastlm.models.base import names
from fastlm.nn import count_parameters
from fastlm.train import AdamW

DATA = Path(__file__).parents[1] / "data" / "experts"
FOLDER, GOLDEN = DATA / "mixtral", np.load(DATA / "golden.npz")


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |value|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


def load(folder=FOLDER):
    return hub.load_folder_or_gguf(folder)[0]


def test_logits():
    model, ids = load(), GOLDEN["ids"]
    close(model.logits(ids), GOLDEN["logits"])
    np.testing.assert_array_equal(model.logits(ids)[1], model.logits(ids[1:2])[0])
    cache = model.new_cache(3, ids.shape[1])
    parts = [model.logits(ids[:, :9], cache)] + [model.logits(ids[:, t : t + 1], cache) for t in range(9, ids.shape[1])]
    close(np.concatenate(parts, axis=1), GOLDEN["logits"])


def test_loss_and_first_gradients():
    model, ids = load().train(), GOLDEN["ids"]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(float(GOLDEN["loss"]), rel=1e-6)
    loss.backward()
    theirs, E = names(models.module_of(model).HF_NAMES, model), model.config.n_expert
    for ours, p in model.named_parameters().items():
        name = theirs[ours].replace("block_sparse_moe", "mlp")
        want = GOLDEN.get(f"gradient.{name}")
        if want is None:
            layer, _, rest = name.partition(".experts.")
            e, matrix = int(rest.split(".")[0]), rest.split(".")[1]
            stacked = GOLDEN[f"gradient.{layer}.experts.{'down' if matrix == 'w2' else 'gate_up'}_proj"][e]
            half = model.config.d_ff
            want = {"w2": stacked, "w1": stacked[:half], "w3": stacked[half:]}[matrix]
        assert np.linalg.norm(p.grad - want) <= 1e-5 * np.linalg.norm(want), ours
    assert model.expert_counts.shape == (2, E)
    np.testing.assert_array_equal(model.expert_counts.sum(1), 2 * ids[:, 1:].size)
    assert model.dropped == 0


def test_losses_of_25_steps():
    model = load().train()
    optimizer, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), []
    for ids in GOLDEN["curve.ids"]:
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.update(2e-3, None)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, GOLDEN["curve.losses"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("entry", json.loads((DATA / "generation.json").read_text()))
def test_generation(entry):
    model, prompt = load(), entry["prompt"]
    if beams := entry["settings"].get("num_beams"):
        got = beam_search(model, prompt, BeamSettings(beams=beams, max_tokens=14))
    else:
        got = generate.generate(model, [prompt], Settings(max_tokens=14))[0]
    assert list(got.ids) == entry["ids"]


def test_stacked_experts_are_read(tmp_path):
    """The form that transformers 5 holds in memory, for layer 0."""
    kept = {k: v for k, v in read_safetensors(FOLDER).items() if "layers.0.block_sparse_moe" not in k}
    shutil.copy(FOLDER / "config.json", tmp_path)
    write_safetensors(tmp_path / "model.safetensors", kept | dict(read_safetensors(DATA / "fused.safetensors")))
    np.testing.assert_array_equal(load(tmp_path).logits(GOLDEN["ids"]), load().logits(GOLDEN["ids"]))


def test_bfloat16_experts():
    model = hub.load_folder_or_gguf(FOLDER, dtype="bfloat16")[0]
    wide = load()
    for name, p in wide.named_parameters().items():
        p.data = model.named_parameters()[name].data.astype(np.float32)
    np.testing.assert_array_equal(model.logits(GOLDEN["ids"]), wide.logits(GOLDEN["ids"]))


def test_save_gives_back_the_bytes(tmp_path):
    model = load()
    hub.save(model, None, tmp_path / "out")
    before, after = read_safetensors(FOLDER), read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    again = load(tmp_path / "out")
    assert again.config == model.config
    hub.save(again, None, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_transformers_loads_what_is_saved(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    hub.save(load(), None, tmp_path)
    theirs, info = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        got = theirs.eval()(torch.tensor(GOLDEN["ids"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(load().logits(GOLDEN["ids"]), got, rtol=2e-5, atol=2e-5)


def test_counts():
    model = models.declare("mixtral-8x7b")
    assert count_parameters(model) == 46_702_792_704
    assert model.active_parameters() == 12_879_925_248


def test_refuses():
    with pytest.raises(ValueError, match="router_jitter_noise"):
        convert.config_from_hf(models.module_of(load()), {"model_type": "mixtral", "router_jitter_noise": 0.1})


@pytest.mark.parametrize("name", ["mixtral-8x7b", "switch-base-8", "glam-0.1b-64e"])
def test_weight_of_nothing(name):
    """A loss that counts nothing: router_aux_loss_coef 0.0 in the files of some."""
    model = models.declare(models.preset(name, n_layer=2, balance_weight=0.0))
    raw = convert.config_to_hf(models.module_of(model), model.config)
    assert raw["router_aux_loss_coef"] == 0.0
    assert convert.config_from_hf(models.module_of(model), raw) == model.config
    with pytest.raises(ValueError, match="balance_weight must be a number of at least 0, got -1"):
        models.declare(models.preset(name, balance_weight=-1))
