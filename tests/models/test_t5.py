"""T5 against transformers: logits, gradients, training, generation, files, counts. See tests/data/make_t5.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastlm
from fastlm import generate, hub, models, ops
from fastlm.models import convert
from fastlm.models.base import names
from fastlm.models.t5 import RelativePosition, buckets

DATA = Path(__file__).parents[1] / "data" / "t5"
GOLDEN = np.load(DATA / "golden.npz")
GENERATION = json.loads((DATA / "generation.json").read_text())
COUNTS = json.loads((DATA / "counts.json").read_text())
NAMES = ("v1.0", "v1.1", "v1.1-tied")
EACH = pytest.mark.parametrize("name", NAMES)


def load(name):
    return hub.load_folder_or_gguf(DATA / name)[0]


def batch(name):
    return [GOLDEN[f"{name}.{key}"] for key in ("source", "mask", "ids", "targets")]


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |logit|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


def test_forms():
    """Both forms of v1.1 are read as what they are."""
    config = {name: load(name).config for name in NAMES}
    assert [(c.tied, c.scaled) for c in config.values()] == [(True, True), (False, False), (True, False)]


@EACH
def test_logits(name):
    source, mask, ids, _ = batch(name)
    lm = fastlm.LM(load(name))
    close(lm.logits(source, ids, mask=mask), GOLDEN[f"{name}.logits"])
    close(lm.logits(source[1, :13], ids[1]), GOLDEN[f"{name}.logits"][1])


@EACH
def test_left_padding(name):
    """Relative positions know only differences: padding before the source changes nothing."""
    source, _, ids, _ = batch(name)
    padded = np.concatenate([np.full((1, 6), 3), source[1:, :13]], axis=1)
    mask = np.arange(19)[None] >= 6
    close(load(name).logits(padded, ids[1:], mask), GOLDEN[f"{name}.logits"][1:])


@EACH
def test_decode(name):
    """One position at a time, the cross-attention's keys and values computed once."""
    model = load(name)
    source, mask, ids, _ = batch(name)
    cache = model.new_cache(model.encode(source, mask), ids.shape[1])
    got = [model.decode(ids[:, :4], cache)] + [model.decode(ids[:, t : t + 1], cache) for t in range(4, ids.shape[1])]
    close(np.concatenate(got, axis=1), GOLDEN[f"{name}.logits"])


@EACH
def test_first_gradients(name):
    model = load(name).train()
    source, mask, ids, targets = batch(name)
    loss = model.loss(source, ids, targets, mask)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}.loss"]), rel=1e-6)
    loss.backward()
    module = models.module_of(model)
    theirs = names(convert.table_of(module, model.config), model)
    written = {k: next(iter(module.hf_write({v: None}, model))) for k, v in theirs.items()}
    for ours, p in model.named_parameters().items():
        want = GOLDEN[f"{name}.gradient.{written[ours]}"]
        assert np.linalg.norm(p.grad - want) <= 1e-5 * np.linalg.norm(want), ours


@EACH
def test_training(name):
    """100 steps of AdamW with clipping, every loss within 1e-5 of torch's in float64. Rate and seeds: tests/data/conditioning.py."""
    model = load(name).train()
    source, mask, ids, targets = batch(name)
    parameters = list(model.named_parameters().values())
    m, v = ([np.zeros(p.shape, np.float32) for p in parameters] for _ in range(2))
    for step, want in enumerate(GOLDEN[f"{name}.losses"], 1):
        model.zero_grad()
        loss = model.loss(source, ids, targets, mask)
        loss.backward()
        scale = min(1.0, 1.0 / (ops.global_norm([p.grad for p in parameters]) + 1e-6))
        assert abs(loss.item() - want) <= 1e-5 * max(1.0, abs(want)), step
        for i, p in enumerate(parameters):
            options = {"step": step, "lr": 2e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
            ops.adamw(p.data, p.grad, m[i], v[i], scale=scale, **options)


@EACH
@pytest.mark.parametrize("setting", ["greedy", "beam", "beam-eos", "beam-long", "beam-early", "beam-never", "penalty", "no-repeat"])
def test_generation(name, setting):
    """The ids of transformers' generate, for both sources at once."""
    # fmt: off
    options = {
        "greedy": {}, "beam": {"beams": 3}, "beam-eos": {"beams": 4, "eos": 7},
        "beam-long": {"beams": 3, "length_penalty": 2.0, "eos": 7}, "beam-early": {"beams": 3, "early_stopping": True, "eos": [7, 9]},
        "beam-never": {"beams": 2, "early_stopping": "never", "eos": 7, "length_penalty": 0.5},
        "penalty": {"repetition_penalty": 1.3}, "no-repeat": {"no_repeat_ngram": 2, "beams": 2},
    }[setting]
    # fmt: on
    source = GOLDEN[f"{name}.source"]
    prompts = [source[0].tolist(), source[1, :13].tolist()]
    got = fastlm.LM(load(name)).generate_ids(prompts, max_tokens=14, **{"eos": 60} | options)
    assert got == GENERATION[name][setting]


@EACH
def test_alone_and_in_a_batch(name):
    """The same bits: logits of the decoder's steps of a source alone, and beside a longer one."""
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
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(source, ids, mask), model.logits(source, ids, mask))


@EACH
def test_saved_for_transformers(name, tmp_path):
    """Where transformers is installed: it loads what is saved, and computes the same."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hub.save(load(name), None, tmp_path / "a")
    theirs = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "a").eval()
    source, mask, ids, _ = (torch.tensor(x) for x in batch(name))
    with torch.no_grad():
        logits = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=ids).logits
    close(logits.numpy(), GOLDEN[f"{name}.logits"])


def test_buckets():
    """Near keys one by one, then logarithmically, those beyond max_distance together; after the query: the other half, or bucket 0."""
    row = buckets(np.array([200]), np.arange(401), 32, 128, both=True)[0]
    assert row[200] == 0
    assert row[199:191:-1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row[201:208].tolist() == [17, 18, 19, 20, 21, 22, 23]
    assert set(row[: 200 - 127]) == {15}
    assert set(row[328:]) == {31}
    one_way = buckets(np.array([200]), np.arange(401), 32, 128, both=False)[0]
    assert set(one_way[200:]) == {0}
    assert one_way[200 - 16] == 16
    assert set(one_way[: 200 - 127]) == {31}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bucket": 3}, "n_bucket must be at least 4, .* got 3"),
        ({"n_bucket": 32, "max_distance": 16}, "max_distance must be greater than 16, .* of n_bucket = 32, got 16"),
        ({"n_bucket": 32, "max_distance": 10}, "max_distance must be greater than 16, .* got 10"),
        ({"n_bucket": 32, "max_distance": 8}, "max_distance must be greater than 8, .* got 8"),
    ],
)
def test_buckets_that_mean_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        models.declare(models.preset("t5-small", n_layer=1, n_encoder_layer=1, **changes))


@pytest.mark.parametrize("both", [False, True])
def test_position_bias(both):
    """The table over distances says what the reference's rule says of each pair, far beyond the largest distance."""
    config = models.preset("t5-small", n_bucket=8, max_distance=12, n_head=3)
    position = RelativePosition(config, both)
    position.weight.data = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    at = np.arange(40, dtype=np.int32)
    index = buckets(at, np.arange(50), 8, 12, both)
    np.testing.assert_array_equal(position(at, 50).data[0], position.weight.data[index].transpose(2, 0, 1))


def test_learns_to_reverse():
    """A small T5 learns to write ten symbols backwards: 95 of 100 unseen sequences right."""
    config = models.preset("t5-small", vocab_size=16, d_model=64, d_ff=128, n_layer=2, n_encoder_layer=2, n_head=4, head_dim=16)
    model = models.create(config, seed=1).train()
    parameters = list(model.named_parameters().values())
    m, v = ([np.zeros(p.shape, np.float32) for p in parameters] for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(1, 2001):
        source = rng.integers(2, 16, (32, 10))
        targets = np.concatenate([source[:, ::-1], np.ones((32, 1), np.int64)], axis=1)
        ids = np.concatenate([np.zeros((32, 1), np.int64), targets[:, :-1]], axis=1)
        model.zero_grad()
        model.loss(source, ids, targets).backward()
        gradients = [p.grad for p in parameters]
        scale = min(1.0, 1.0 / (ops.global_norm(gradients) + 1e-6))
        options = {"lr": 3e-3 * min(1.0, step / 50, (2001 - step) / 1000), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        for i, p in enumerate(parameters):
            ops.adamw(p.data, p.grad, m[i], v[i], step=step, scale=scale, weight_decay=0.0, **options)
    unseen = rng.integers(2, 16, (100, 10)).tolist()
    out = fastlm.LM(model.freeze()).generate_ids(unseen, max_tokens=11, eos=1)
    right = sum(got == [*row[::-1], 1] for got, row in zip(out, unseen, strict=True))
    assert right >= 95, right
