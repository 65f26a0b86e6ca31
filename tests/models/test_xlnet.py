"""XLNet against transformers: logits, memories, losses, first gradients, files, generation. See tests/data/make_xlnet.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastlm
from fastlm import generate, hub, models
from fastlm.checkpoint import FormatError, read_json, read_safetensors, write_json, write_safetensors
from fastlm.cli.verify import observe
from fastlm.models import convert
from fastlm.models.base import names
from fastlm.nn import count_parameters
from fastlm.train import AdamW, train

DATA = Path(__file__).parents[1] / "data" / "xlnet"
GOLDEN = np.load(DATA / "golden.npz")
NAMES = ["bi", "tanh", "uni"]
CASES = sorted(key.removesuffix(".logits").split(".") for key in GOLDEN if key.endswith(".logits"))
GRADIENTS = [case for case in CASES if case[1] in ("memory", "padded", "all")]
INPUTS = ("mask", "segments", "perm_mask", "target_mapping", "mems")


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |value|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


def given(name, case):
    return {k: GOLDEN[f"{name}.{case}.{k}"] for k in INPUTS if f"{name}.{case}.{k}" in GOLDEN}


def load(name):
    return hub.load_folder_or_gguf(DATA / name)[0]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_memories(name, case):
    model, key = load(name), f"{name}.{case}"
    logits, mems = model.logits_and_mems(GOLDEN[f"{key}.ids"], **given(name, case))
    close(logits, GOLDEN[f"{key}.logits"])
    close(np.stack(mems), GOLDEN[f"{key}.kept"])
    np.testing.assert_array_equal(model.logits(GOLDEN[f"{key}.ids"], **given(name, case)), logits)


@pytest.mark.parametrize(("name", "case"), GRADIENTS)
def test_loss_and_first_gradients(name, case):
    model, key = load(name).train(), f"{name}.{case}"
    loss = model.loss(GOLDEN[f"{key}.ids"], GOLDEN[f"{key}.targets"], **given(name, case))
    assert loss.item() == pytest.approx(float(GOLDEN[f"{key}.loss"]), rel=1e-6)
    loss.backward()
    theirs = names(convert.table_of(models.module_of(model), model.config), model)
    for ours, p in model.named_parameters().items():
        want = GOLDEN[f"{key}.gradient.{theirs[ours]}"]
        if ours.endswith(tuple(models.module_of(model).HF_TRANSPOSED)):
            want = want.reshape(len(want), -1).T
        got = np.zeros(p.shape, np.float32) if p.grad is None else p.grad
        norm, error = np.linalg.norm(want), np.linalg.norm(got - want.reshape(got.shape))
        assert error <= (1e-5 * norm if norm > 1e-12 else 1e-6), (ours, norm, error)


@pytest.mark.parametrize("name", NAMES)
def test_generates_the_same_ids(name):
    model = load(name)
    prompts = [GOLDEN[f"{name}.prompt{i}"].tolist() for i in range(3)]
    together = generate.generate(model, prompts, generate.Settings(max_tokens=12, temperature=0.0))
    for i, prompt in enumerate(prompts):
        assert together[i].ids == GOLDEN[f"{name}.greedy{i}"].tolist()
        alone = generate.generate(model, [prompt], generate.Settings(max_tokens=12, temperature=0.0))
        assert alone[0].ids == together[i].ids
        if f"{name}.beam{i}" in GOLDEN:
            beams = generate.beam_search(model, prompt, generate.BeamSettings(beams=3, max_tokens=12))
            assert beams.ids == GOLDEN[f"{name}.beam{i}"].tolist()


def test_a_long_prompt_is_read_at_once(monkeypatch):
    """Its tokens see one another, so pieces would give something else."""
    monkeypatch.setattr("fastlm.generate.engine.CHUNK", 4)
    ids = generate.generate(load("bi"), [GOLDEN["bi.prompt2"].tolist()], generate.Settings(max_tokens=12, temperature=0.0))[0].ids
    assert ids == GOLDEN["bi.greedy2"].tolist()


def test_segments_through_memory_are_the_whole():
    """Causal: the second half with the memories of the first gives what the whole gives."""
    model, ids = load("uni"), GOLDEN["uni.plain.ids"]
    _, mems = model.logits_and_mems(ids[:, :6])
    close(model.logits(ids[:, 6:], mems=mems), model.logits(ids)[:, 6:])


@pytest.mark.parametrize("name", NAMES)
def test_save_gives_back_the_bytes(name, tmp_path):
    model = load(name)
    hub.save(model, None, tmp_path / "out")
    before, after = read_safetensors(DATA / name), read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[k].shape == after[k].shape and before[k].tobytes() == after[k].tobytes() for k in before)
    again, _ = hub.load_folder_or_gguf(tmp_path / "out")
    assert again.config == model.config
    hub.save(again, None, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_saved(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model, ids = load(name), GOLDEN[f"{name}.plain.ids"]
    hub.save(model, None, tmp_path / "out")
    theirs, info = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        got = theirs.eval()(torch.tensor(ids.astype(np.int64))).logits
    np.testing.assert_allclose(model.logits(ids), got, rtol=1e-5, atol=1e-5)


def test_bare_model(tmp_path):
    raw, tensors = read_json(DATA / "bi" / "config.json"), dict(read_safetensors(DATA / "bi"))
    write_json(tmp_path / "config.json", raw | {"architectures": ["XLNetModel"]})
    write_safetensors(tmp_path, {k.removeprefix("transformer."): v for k, v in tensors.items() if not k.startswith("lm_loss")})
    model, _ = hub.load_folder_or_gguf(tmp_path)
    ids = GOLDEN["bi.plain.ids"]
    np.testing.assert_array_equal(model.run(ids)[0].data, load("bi").run(ids)[0].data)
    with pytest.raises(ValueError, match="has no head"):
        model.logits(ids)
    write_json(tmp_path / "config.json", raw | {"architectures": ["XLNetModel"], "same_length": True})
    with pytest.raises(FormatError, match="'same_length' must be False"):
        hub.load_folder_or_gguf(tmp_path)


@pytest.mark.parametrize(("preset", "count"), [("xlnet-base-cased", 116_750_336), ("xlnet-large-cased", 360_300_800)])
def test_counts(preset, count):
    assert count_parameters(models.declare(models.preset(preset))) == count


def test_a_step_of_permutation_lm_lowers_the_loss():
    config = models.xlnet.XLNetConfig(vocab_size=31, d_model=24, n_layer=2, n_head=3, d_ff=40)
    model, rng = models.create(config, seed=3), np.random.default_rng(0)
    ids, order = rng.integers(0, 31, (4, 12)), rng.permutation(12)
    perm_mask = np.broadcast_to(np.argsort(order)[:, None] <= np.argsort(order)[None], (4, 12, 12))
    mapping = np.zeros((4, 5, 12), np.int32)
    mapping[:, np.arange(5), order[-5:]] = 1
    optimizer, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), []
    for _ in range(8):
        model.zero_grad()
        loss = model.loss(ids, ids[:, order[-5:]], perm_mask=perm_mask, target_mapping=mapping)
        loss.backward()
        optimizer.update(1e-2, None)
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.5, losses


def test_a_target_does_not_see_itself():
    """Another token at the place that is asked leaves the prediction as it is, to the bit."""
    model, ids = load("bi"), GOLDEN["bi.streams.ids"].copy()
    asked = given("bi", "streams")
    at = asked["target_mapping"][0, 1].argmax()
    before = model.logits(ids, **asked)[0, 1]
    ids[0, at] = (ids[0, at] + 1) % 41
    np.testing.assert_array_equal(model.logits(ids, **asked)[0, 1], before)


def test_lm_logits():
    lm, key = fastlm.load(DATA / "bi"), "bi.all"
    ids, extra = GOLDEN[f"{key}.ids"], given("bi", "all")
    close(lm.logits(ids, **extra), GOLDEN[f"{key}.logits"])
    one = {k: v[:, 1:2] if k == "mems" else v[1] for k, v in extra.items()}
    np.testing.assert_array_equal(lm.logits(ids[1], **one), lm.logits(ids, **extra)[1])
    with pytest.raises(TypeError, match="XLNet takes no past"):
        lm.logits(ids, past=3)
    with pytest.raises(ValueError, match="XLNet predicts in any order"):
        lm.perplexity(ids[0].tolist())


def test_losses_of_100_steps():
    """Permutation LM with AdamW, against float64."""
    curve, model = {k.removeprefix("curve."): v for k, v in GOLDEN.items() if k.startswith("curve.")}, load("bi").train()
    optimizer, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), []
    for step in range(100):
        model.zero_grad()
        extra = {k: curve[k][step] for k in ("segments", "perm_mask", "target_mapping")}
        loss = model.loss(curve["ids"][step], curve["targets"][step], **extra)
        loss.backward()
        optimizer.update(2e-3, None)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, curve["losses"], rtol=0, atol=1e-5)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_verify_sees_the_layers():
    model, ids = load("bi"), GOLDEN["bi.plain.ids"]
    found = observe(model, ids)
    assert list(found) == ["embedding", "layer.0", "layer.1", "layer.2", "final", "logits"]
    np.testing.assert_array_equal(found["layer.2"], found["final"])
    close(found["logits"], GOLDEN["bi.plain.logits"])


def test_refuses():
    model, ids = load("bi"), GOLDEN["bi.plain.ids"]
    with pytest.raises(ValueError, match="objective must be given: XLNet learns by"):
        train(model, np.arange(200, dtype=np.int32) % 41, steps=1, batch=2, context=8)
    mapping = np.zeros((3, 2, 11))
    mapping[:, :, 4] = 1
    with pytest.raises(ValueError, match=r"\[xlnet\] target_mapping must have at most one 1"):
        model.logits(ids, target_mapping=mapping)
    with pytest.raises(ValueError, match=r"\[xlnet\] perm_mask must be \(3, 11, 11\) for ids \(3, 11\), got \(11, 11\)"):
        model.logits(ids, perm_mask=np.zeros((11, 11)))
    with pytest.raises(ValueError, match=r"\[xlnet\] mems must be 3 arrays"):
        model.logits(ids, mems=[np.zeros((3, 2, 18), np.float32)])
    with pytest.raises(ValueError, match="last must be True"):
        model.logits(ids[:1], model.new_cache(1, 20))
