"""Switch Transformers against transformers: logits, gradients, training, generation, files, counts. See tests/data/make_switch.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastlm
from fastlm import generate, hub, models, ops
from fastlm.checkpoint import read_safetensors, write_safetensors
from fastlm.models import convert
from fastlm.models.base import names
from fastlm.models.switch import sparse
from fastlm.nn import Context, Declared, count_parameters

DATA = Path(__file__).parents[1] / "data" / "switch"
GOLDEN = np.load(DATA / "golden.npz")
GENERATION = json.loads((DATA / "generation.json").read_text())
COUNTS = json.loads((DATA / "counts.json").read_text())
EACH = pytest.mark.parametrize("name", ["tied", "untied"])


def load(name):
    return hub.load_folder_or_gguf(DATA / name)[0]


def batch(name):
    return [GOLDEN[f"{name}.{key}"] for key in ("source", "mask", "ids", "targets")]


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |logit|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


@EACH
def test_logits(name):
    """Tokens beyond an expert's capacity pass by, also where nothing is learned; padding after a text takes no place from it."""
    source, mask, ids, _ = batch(name)
    lm = fastlm.LM(load(name))
    close(lm.logits(source, ids, mask=mask), GOLDEN[f"{name}.logits"])
    close(lm.logits(source[1, :13], ids[1]), GOLDEN[f"{name}.logits"][1])


def test_full_experts():
    """The tiny checkpoint does drop tokens, and another capacity gives other logits."""
    source, mask, ids, targets = batch("tied")
    model = load("tied")
    model.loss(source, ids, targets, mask)
    assert model.expert_counts.shape == (4, 5)
    assert model.dropped > 0
    assert model.expert_counts.sum() + model.dropped == 2 * 2 * (19 + 15)
    assert model.expert_counts.max() <= 2 * model.config.capacity
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.mlp.capacity = None
    assert np.abs(model.logits(source, ids, mask) - GOLDEN["tied.logits"]).max() > 1e-2


@EACH
def test_decode(name):
    """One position at a time nothing is dropped: the same as a model with room for all."""
    model = load(name)
    source, mask, ids, _ = batch(name)
    cache = model.new_cache(model.encode(source, mask), ids.shape[1])
    got = np.concatenate([model.decode(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], axis=1)
    for block in model.decoder.blocks:
        block.mlp.capacity = None
    close(got, model.logits(source, ids, mask))
    if name == "untied":
        close(got, GOLDEN["untied.logits"])


@EACH
def test_first_gradients(name):
    model = load(name).train()
    source, mask, ids, targets = batch(name)
    loss = model.loss(source, ids, targets, mask)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}.loss"]), rel=1e-6)
    loss.backward()
    for ours, theirs in names(convert.table_of(models.module_of(model), model.config), model).items():
        want, p = GOLDEN[f"{name}.gradient.{theirs}"], model.named_parameters()[ours]
        got = np.zeros(p.shape) if p.grad is None else p.grad
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), ours


@EACH
def test_router_losses(name):
    """Each by its name, and left out where the config says so."""
    model, (source, mask, ids, targets) = load(name), batch(name)
    encoder, decoder = Context(*source.shape, mask=mask), Context(*ids.shape, memory=model.encode(source, mask))
    model.encode_hidden(source, encoder)
    model.decode_hidden(ids, decoder)
    for stack, context in {"encoder": encoder, "decoder": decoder}.items():
        balance = ops.switch_load_balancing_loss(context.routings, groups=2).item()
        assert balance == pytest.approx(float(GOLDEN[f"{name}.{stack}_aux_loss"]), rel=1e-5)
        assert ops.router_z_loss(context.routings).item() == pytest.approx(float(GOLDEN[f"{name}.{stack}_z_loss"]), rel=1e-5)
    total = sum(0.05 * GOLDEN[f"{name}.{s}_aux_loss"] + 0.02 * GOLDEN[f"{name}.{s}_z_loss"] for s in ("encoder", "decoder"))
    object.__setattr__(model.config, "router_losses", False)
    plain = model.loss(source, ids, targets, mask).item()
    assert plain == pytest.approx(float(GOLDEN[f"{name}.loss"] - total), rel=1e-5)


@EACH
def test_training(name):
    """100 steps of AdamW with clipping, every loss within 1e-5 of torch's."""
    model = load(name).train()
    source, mask, ids, targets = batch(name)
    parameters = list(model.named_parameters().values())
    m, v = ([np.zeros(p.shape, np.float32) for p in parameters] for _ in range(2))
    for p in parameters:
        p.grad = np.zeros(p.shape, np.float32)  # an expert may have no token in a step
    for step, want in enumerate(GOLDEN[f"{name}.losses"], 1):
        model.zero_grad()
        loss = model.loss(source, ids, targets, mask)
        loss.backward()
        scale = min(1.0, 1.0 / (ops.global_norm([p.grad for p in parameters]) + 1e-6))
        assert abs(loss.item() - want) <= 1e-5 * max(1.0, abs(want)), step
        for i, p in enumerate(parameters):
            options = {"step": step, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
            ops.adamw(p.data, p.grad, m[i], v[i], scale=scale, **options)


@EACH
@pytest.mark.parametrize("setting", ["greedy", "beam", "beam-eos"])
def test_generation(name, setting):
    """The ids of transformers' generate, for both sources at once."""
    options = {"greedy": {}, "beam": {"beams": 3}, "beam-eos": {"beams": 4, "eos": 7, "length_penalty": 2.0}}[setting]
    source = GOLDEN[f"{name}.source"]
    prompts = [source[0].tolist(), source[1, :13].tolist()]
    got = fastlm.LM(load(name)).generate_ids(prompts, max_tokens=14, **{"eos": 60} | options)
    assert got == GENERATION[name][setting]


@EACH
def test_alone_and_in_a_batch(name):
    """The same bits for a source alone, and beside a longer one."""
    model, source = load(name), GOLDEN[f"{name}.source"]
    rows = [source[0].tolist(), source[1, :13].tolist()]
    together, alone = generate.Reading(model, rows), generate.Reading(model, rows[1:])
    caches = together.new_cache(2, 4), alone.new_cache(1, 4)
    for id in (0, 5, 9):
        both = together.logits(np.array([[id], [id]]), caches[0], last=True)
        np.testing.assert_array_equal(both[1:], alone.logits(np.array([[id]]), caches[1], last=True))


@EACH
def test_saved_twice(name, tmp_path):
    model = load(name)
    source, mask, ids, _ = batch(name)
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    hub.save(again, None, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    before, after = read_safetensors(DATA / name), read_safetensors(tmp_path / "a")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(source, ids, mask), model.logits(source, ids, mask))


@EACH
def test_saved_for_transformers(name, tmp_path):
    """Where transformers is installed: it loads what is saved, and computes the same."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hub.save(load(name), None, tmp_path / "a")
    theirs, info = hf.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    source, mask, ids, _ = (torch.tensor(x) for x in batch(name))
    with torch.no_grad():
        logits = theirs.eval()(input_ids=source, attention_mask=mask, decoder_input_ids=ids).logits
    close(logits.numpy(), GOLDEN[f"{name}.logits"])


@pytest.mark.parametrize("preset", [name for name in models.PRESETS if name.startswith("switch-")])
def test_counts(preset):
    """transformers' own counts, of the declared model; the gated 395B one, which it has not, by a sum by hand."""
    model = models.declare(preset)
    c = model.config
    attention, expert = 4 * c.d_model * c.n_head * c.head_dim, (3 if "gated" in c.activation else 2) * c.d_model * c.d_ff
    n_sparse = sum(sparse(c.n_layer, c.n_sparse))
    dense = 2 * c.n_layer * (attention + expert) + c.n_layer * attention + c.vocab_size * c.d_model + 2 * c.n_bucket * c.n_head
    norms, routers = (5 * c.n_layer + 2) * c.d_model, 2 * n_sparse * c.d_model * c.n_expert
    assert model.active_parameters() == dense + norms + routers
    total = dense + norms + routers + 2 * n_sparse * (c.n_expert - 1) * expert
    assert count_parameters(model) == total == COUNTS.get(preset, total)
    assert preset in COUNTS or round(total / 1e9) == 395
    assert all(isinstance(p.data, Declared) for p in model.named_parameters().values())


def test_sparse_layers():
    """The reference's rule, with its edges."""
    assert sparse(5, 2) == [False, True, False, True, False]
    assert sparse(3, 3) == [True] * 3
    assert sparse(4, 0) == [False, True, False, False]
    assert sparse(1, 0) == [True]
    assert sparse(3, 4) == [False] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_bias": True}, "'router_bias' must be False, got True"),
        ({"router_dtype": "bfloat16"}, "'router_dtype' must be 'float32'"),
        ({"dense_act_fn": "swish"}, "'dense_act_fn' must be one of relu"),
        ({"shared_experts": 2}, "unknown key 'shared_experts' = 2"),
    ],
)
def test_refuses(changes, message):
    raw = json.loads((DATA / "tied" / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        convert.config_from_hf(models.module_of(load("tied")), raw)


def test_gated_experts(tmp_path):
    """The largest one's feed-forward parts, which transformers has not: trained a step, saved and loaded."""
    small = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "n_layer": 2, "n_encoder_layer": 2, "n_head": 2, "head_dim": 8}
    model = models.create(models.preset("switch-xxl-128", **small, n_expert=4, n_sparse=1, n_encoder_sparse=1)).train()
    ids = np.random.default_rng(0).integers(2, 32, (2, 9))
    model.loss(ids, ids[:, :5], ids[:, :5]).backward()
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(ids, ids), model.logits(ids, ids))


def test_refuses_a_scale_without_a_tie():
    with pytest.raises(ValueError, match="scaled must be what tied is, False"):
        models.declare(models.preset("switch-base-8", tied=False))


def test_refuses_embeddings_of_its_own_for_a_stack(tmp_path):
    """What the reference makes of tie_word_embeddings false from the start; published models have copies of the shared one."""
    hub.save(load("untied"), None, tmp_path / "a")
    tensors = dict(read_safetensors(tmp_path / "a"))
    name = "decoder.embed_tokens.weight"
    write_safetensors(tmp_path / "a" / "model.safetensors", tensors | {name: tensors[name] + 1})
    with pytest.raises(ValueError, match=rf"have {name} that differ from shared.weight: fastlm has one embedding for both stacks"):
        hub.load_folder_or_gguf(tmp_path / "a")
