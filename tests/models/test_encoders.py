"""Encoders of every family and head against transformers: logits, losses, first gradients, files. See tests/data/make_encoders.py."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastlm import hub, models, ops
from fastlm.checkpoint import FormatError, read_json, read_safetensors, write_json, write_safetensors
from fastlm.lm import LM
from fastlm.models import convert, deferred
from fastlm.models.albert import group_of
from fastlm.models.base import names
from fastlm.nn import count_parameters
from fastlm.tensor import data, no_grad
from fastlm.train import AdamW

DATA = Path(__file__).parents[1] / "data" / "encoders"
GOLDEN = np.load(DATA / "golden.npz")
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir() and path.name != "bert.start")
HEADED = [name for name in NAMES if not name.endswith(".bare")]
COUNTS = {
    ("bert-base-uncased", None): 109_482_240,
    ("bert-base-uncased", "masked_lm"): 109_514_298,
    ("bert-large-uncased", None): 335_141_888,
    ("roberta-base", "masked_lm"): 124_697_433,
    ("roberta-large", "masked_lm"): 355_412_057,
    ("distilbert-base-uncased", None): 66_362_880,
    ("distilbert-base-uncased", "masked_lm"): 66_985_530,
    ("bert-base-cased", None): 108_310_272,
    ("bert-large-cased", None): 333_579_264,
    ("roberta-base", None): 124_645_632,
    ("distilbert-base-cased", None): 65_190_912,
    ("albert-base-v2", None): 11_683_584,
    ("albert-large-v2", None): 17_683_968,
    ("albert-xlarge-v2", None): 58_724_864,
    ("albert-xxlarge-v2", None): 222_595_584,
    ("electra-small", None): 13_483_008,
    ("electra-small", "replaced_token"): 13_549_057,
    ("electra-base", "replaced_token"): 109_483_009,
    ("electra-large", "replaced_token"): 335_142_913,
    ("all-minilm-l6-v2", None): 22_713_216,
}


def close(got, want):
    """The bar for float32 against the reference in float64: 1e-5 x max(1, |value|)."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


def digest(gradient):
    signs = np.random.default_rng(gradient.size).integers(0, 2, (16, gradient.size)) * 2.0 - 1.0
    return np.array([np.linalg.norm(gradient), *(signs @ gradient.reshape(-1).astype(np.float64))])


def inputs(name):
    return [GOLDEN.get(f"{name}.{k}") for k in ("ids", "mask", "segments")]


def wanted(name):
    targets = GOLDEN[f"{name}.targets"]
    return (targets, GOLDEN[f"{name}.sentences"]) if f"{name}.sentences" in GOLDEN else targets


def load(name):
    return hub.load_folder_or_gguf(DATA / name)[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".bare")])
def test_hidden_states(name):
    model, (ids, mask, segments) = load(name), inputs(name)
    x = model.states(ids, mask, segments)
    close(x, GOLDEN[f"{name}.hidden"])
    if f"{name}.pooled" in GOLDEN:
        close(model.pooler(x).data, GOLDEN[f"{name}.pooled"])
    with pytest.raises(ValueError, match="has no head"):
        model.logits(ids)


@pytest.mark.parametrize("name", HEADED)
def test_logits(name):
    model, (ids, mask, segments) = load(name), inputs(name)
    close(model.logits(ids, mask, segments), GOLDEN[f"{name}.logits"])
    if f"{name}.sentence_logits" in GOLDEN:
        with no_grad():
            close(model.head.sentence_logits(model, model.run(ids, mask, segments)).data, GOLDEN[f"{name}.sentence_logits"])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "electra"])
def test_padding_on_the_left(family):
    name = f"{family}.masked_lm"
    ids, mask, segments = (None if x is None else x[:, ::-1] for x in inputs(name))
    close(load(name).logits(ids, mask, segments), GOLDEN[f"{name}.left.logits"])


@pytest.mark.parametrize("name", HEADED)
def test_loss_and_first_gradients(name):
    model, (ids, mask, segments) = load(name).train(), inputs(name)
    loss = model.loss(ids, wanted(name), mask, segments)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}.loss"]), rel=1e-6)
    loss.backward()
    theirs = names(convert.table_of(models.module_of(model), model.config), model)
    for ours, p in model.named_parameters().items():
        if f"{name}.gradient.{theirs[ours]}" in GOLDEN:
            want = GOLDEN[f"{name}.gradient.{theirs[ours]}"]
            norm, error = np.linalg.norm(want), np.linalg.norm(p.grad - want)
        else:
            want = GOLDEN[f"{name}.digest.{theirs[ours]}"]
            norm, error = want[0], np.sqrt(np.square(digest(p.grad) - want)[1:].mean())
        # A constant added to all scores of a query, or to all logits, changes nothing: such gradients are zero but for rounding.
        assert error <= (1e-5 * norm if norm > 1e-12 else 1e-6), (ours, norm, error)


def test_losses_of_100_steps():
    """Masked tokens and next sentence with AdamW, against float64."""
    curve, model = np.load(DATA / "curve.npz"), load("bert.start").train()
    optimizer, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), []
    for step in range(100):
        model.zero_grad()
        targets = curve["targets"][step].astype(np.int32), curve["sentences"][step]
        loss = model.loss(curve["ids"][step], targets, None, curve["segments"][step])
        loss.backward()
        optimizer.update(2e-3, None)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, curve["losses"], rtol=0, atol=1e-5)
    assert curve["losses"][-1] < curve["losses"][0] - 1


@pytest.mark.parametrize("name", NAMES)
def test_save_gives_back_the_bytes(name, tmp_path):
    model = load(name)
    hub.save(model, None, tmp_path / "out")
    before, after = read_safetensors(DATA / name), read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    again, _ = hub.load_folder_or_gguf(tmp_path / "out")
    assert again.config == model.config
    hub.save(again, None, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_saved(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model, (ids, mask, segments) = load(name), inputs(name)
    hub.save(model, None, tmp_path / "out")
    kind = getattr(transformers, read_json(DATA / name / "config.json")["architectures"][0])
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    given = {"input_ids": ids, "attention_mask": mask} | ({} if segments is None else {"token_type_ids": segments})
    with torch.no_grad():
        got = theirs.eval()(**{k: torch.tensor(v.astype(np.int64)) for k, v in given.items()})
    if "last_hidden_state" in got:
        np.testing.assert_allclose(model.states(ids, mask, segments), got["last_hidden_state"], rtol=1e-5, atol=1e-5)
    elif "start_logits" in got:
        np.testing.assert_allclose(
            model.logits(ids, mask)[..., 0], got["start_logits"], rtol=1e-5, atol=1e-5
        ) if segments is None else None
    else:
        want = got.get("prediction_logits", got.get("logits"))
        np.testing.assert_allclose(model.logits(ids, mask, segments), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("preset", "head"), COUNTS)
def test_counts(preset, head):
    assert count_parameters(models.declare(models.preset(preset, head=head))) == COUNTS[preset, head]


def test_bits_alone_and_in_a_padded_batch():
    """From 16 positions on: attention sums in another order over fewer queries."""
    model, (ids, mask, segments) = load("bert.masked_lm"), inputs("bert.masked_lm")
    wide = [np.pad(x, ((0, 0), (0, 6))) for x in (ids, mask, segments)]
    whole = model.logits(*wide)
    for b, n in enumerate(mask.sum(1)):
        np.testing.assert_array_equal(whole[b, :n], model.logits(*(x[b : b + 1, :16] for x in wide))[0, :n])


@pytest.mark.parametrize("name", [name for name in NAMES if GOLDEN[f"{name}.ids"].ndim == 2])
def test_packed(name):
    """Sequences one behind the other: the states of a padded batch, and each sequence's bits as it has them alone."""
    model, (ids, mask, _) = load(name), inputs(name)
    ids = np.concatenate([ids, np.roll(ids, 1, axis=1)])
    lengths = [int(n) for n in (*mask.sum(1), *mask.sum(1)[::-1])]
    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    packed = np.split(model.packed_states(rows), np.cumsum(lengths)[:-1])
    whole = model.states(ids, np.arange(ids.shape[1]) < np.array(lengths)[:, None])
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(packed[b], model.packed_states([rows[b]]))
        close(packed[b], whole[b, :n])


@pytest.mark.parametrize("name", [name for name in NAMES if GOLDEN[f"{name}.ids"].ndim == 2])
def test_passes_in_one_go(name, monkeypatch):
    """Kernels that are put off until Python has returned give the bits of the ordinary pass, with and without padding."""
    model, (ids, mask, segments) = load(name), inputs(name)
    rows = [row[: 3 + b] for b, row in enumerate(ids)]
    passes = [lambda: model.states(ids, mask, segments), lambda: model.states(ids), lambda: model.packed_states(rows)]
    monkeypatch.setenv("FASTLM_RECORD", "0")
    ordinary = [each() for each in passes]
    monkeypatch.setenv("FASTLM_RECORD", "1")
    for _ in range(2):  # the first compares, the second relies on it
        for each, want in zip(passes, ordinary, strict=True):
            np.testing.assert_array_equal(each(), want)
    assert deferred.why_not(model) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x + x, "it computes outside kernels"),
        (lambda x: x * np.float32(2 if ops.global_norm([x]) > 0 else 0), "an operation of the host"),
    ],
)
def test_what_cannot_be_put_off_is_found_out(change, reason, monkeypatch, caplog):
    ids, model = inputs("bert.masked_lm")[0], load("bert.masked_lm")
    want, hidden = model.states(ids), model.hidden
    model = load("bert.masked_lm")
    monkeypatch.setattr(model, "hidden", lambda *given: change(data(hidden(*given))))
    for _ in range(2):
        np.testing.assert_array_equal(model.states(ids), 2 * want)
    assert [reason in why for why in deferred.why_not(model)] == [True]
    assert [reason in record.message for record in caplog.records] == [True]


def test_heads_of_a_task_are_checked():
    """What a head cannot be is said when it is made; a quantised encoder's weights become float32, which learns."""
    body = models.create(models.bert.BertConfig(40, context=12, d_model=32, n_layer=1, n_head=2, d_ff=64), 0)
    for given, error, message in (
        ({"labels": "yes"}, TypeError, "labels must be a list of names, got 'yes'"),
        ({"labels": ()}, ValueError, r"labels must be a tuple of at least one name, got \(\)"),
        ({"labels": (0, 1)}, ValueError, r"labels must be a tuple of at least one name, got \(0, 1\)"),
        ({"problem": "classification"}, ValueError, "problem must be None or one of regression, .*, got 'classification'"),
    ):
        with pytest.raises(error, match=message):
            models.with_head(body, "sequence_classification", **given)
    two = models.with_head(body, "sequence_classification", problem="regression")
    with pytest.raises(ValueError, match=r"targets must be \(3, 2\) numbers, one for each of the 2 labels, got \(3,\)"):
        two.loss(np.full((3, 4), 7), np.zeros(3))
    assert two.loss(np.full((3, 4), 7), np.zeros((3, 2))).item() > 0
    LM(body).quantize("Q8_0")
    task = models.with_head(body, "token_classification")
    assert {p.dtype for p in task.named_parameters().values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(task.states([[5, 6, 7]]), body.states([[5, 6, 7]]), atol=1e-5)


def test_ignored_positions_cost_and_change_nothing():
    model, (ids, mask, segments) = load("bert.masked_lm"), inputs("bert.masked_lm")
    targets = wanted("bert.masked_lm")
    want = ops.cross_entropy(model.logits(ids, mask, segments), targets.astype(np.int32))
    assert model.loss(ids, targets, mask, segments).item() == pytest.approx(float(want), rel=1e-6)
    nothing = model.train().loss(ids, np.full(ids.shape, -100), mask, segments)
    nothing.backward()
    assert nothing.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.named_parameters().values())


def test_electra_learns_with_its_generator():
    """The joint loss is the two losses, and falls; what the generator gets right counts as original."""
    config = models.preset("electra-small", vocab_size=20, context=8, d_embedding=8, d_model=16, n_layer=1, n_head=2, d_ff=32)
    generator = models.create(replace(config, head="masked_lm"), 1).train()
    discriminator = models.create(replace(config, head="replaced_token"), 2).train()
    rng = np.random.default_rng(0)
    optimizers, losses = [AdamW(m, (0.9, 0.99), 1e-8, 0.0) for m in (generator, discriminator)], []
    for step in range(80):
        whole = np.tile(np.arange(8) + 5, (8, 1))  # the position tells the token
        hidden = rng.random(whole.shape) < 0.3
        hidden[0, 0] = True
        ids, targets = np.where(hidden, 3, whole), np.where(hidden, whole, -100)
        loss = models.electra.joint_loss(generator, discriminator, ids, targets, seed=step)
        assert loss.item() > generator.loss(ids, targets).item()
        losses.append(loss.item())
        for model in (generator, discriminator):
            model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.update(1e-2, 1.0)
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])


def test_older_files(tmp_path):
    """gamma and beta, a position buffer, a tied decoder that is written out, no model_type and no architectures."""
    name = "bert.pretraining"
    tensors = dict(read_safetensors(DATA / name))
    raw = read_json(DATA / name / "config.json")
    for key in list(tensors):
        if "LayerNorm" in key:
            tensors[key.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(key)
    tensors["bert.embeddings.position_ids"] = np.arange(17, dtype=np.int64)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    del raw["model_type"], raw["architectures"]
    write_json(tmp_path / "config.json", raw)
    write_safetensors(tmp_path, tensors)
    model, _ = hub.load_folder_or_gguf(tmp_path)
    assert model.config.head == "pretraining"
    np.testing.assert_array_equal(model.logits(*inputs(name)), load(name).logits(*inputs(name)))
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] * 2
    write_safetensors(tmp_path, tensors)
    with pytest.raises(FormatError, match=r"1 extra: cls\.predictions\.decoder\.weight"):
        hub.load_folder_or_gguf(tmp_path)


def test_a_head_takes_what_it_needs_of_a_pretrained_file(tmp_path):
    """A masked LM from a file with pooler and next-sentence head, as Google's are; a bare model from the same."""
    shutil.copytree(DATA / "bert.pretraining", tmp_path / "m")
    raw = read_json(tmp_path / "m" / "config.json")
    for kind, head in (("BertForMaskedLM", "masked_lm"), ("BertModel", None)):
        write_json(tmp_path / "m" / "config.json", raw | {"architectures": [kind]})
        model, _ = hub.load_folder_or_gguf(tmp_path / "m")
        assert model.config.head == head
    write_json(tmp_path / "m" / "config.json", raw | {"architectures": ["BertForSequenceClassification"]})
    with pytest.raises(FormatError, match=r"2 missing: classifier\.weight, classifier\.bias"):
        hub.load_folder_or_gguf(tmp_path / "m")
    write_json(tmp_path / "m" / "config.json", raw | {"architectures": ["BertLMHeadModel"]})
    with pytest.raises(FormatError, match="'architectures' must be one of BertModel"):
        hub.load_folder_or_gguf(tmp_path / "m")


def test_groups_of_albert():
    """int(l / (n_layer / n_group)), as the reference rounds; for 18 layers in 14 groups that is not l n_group // n_layer."""
    assert [group_of(layer, 18, 14) for layer in range(18)] == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 13]
    assert [group_of(layer, 12, 3) for layer in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    sizes = {"d_embedding": 4, "d_model": 8, "n_head": 2, "d_ff": 8}
    model = models.declare(models.preset("albert-base-v2", n_layer=18, n_group=14, **sizes))
    assert [group.times for group in model.groups] == [2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_labels_survive(tmp_path):
    config = models.bert.BertConfig(
        vocab_size=9, context=8, d_model=8, n_layer=1, n_head=2, d_ff=8, head="token_classification", labels=("O", "B", "I")
    )
    hub.save(models.create(config), None, tmp_path / "m")
    assert read_json(tmp_path / "m" / "config.json")["id2label"] == {"0": "O", "1": "B", "2": "I"}
    assert hub.load_folder_or_gguf(tmp_path / "m")[0].config == config


def test_albert_orders_as_many_sentences_as_it_has_labels():
    """The reference's head for pre-training has num_labels outputs."""
    sizes = {"d_embedding": 4, "d_model": 8, "n_head": 2, "d_ff": 8, "n_layer": 1, "vocab_size": 9}
    model = models.create(models.preset("albert-base-v2", **sizes, head="pretraining", labels=("a", "b", "c")))
    ids = np.arange(6).reshape(2, 3)
    assert model.head.sentence_logits(model, model.run(ids)).shape == (2, 3)
    assert np.isfinite(model.loss(ids, (ids, np.array([2, 0]))).item())


def test_refuses():
    model, (ids, mask, segments) = load("bert.masked_lm"), inputs("bert.masked_lm")
    with pytest.raises(ValueError, match=r"mask must be \(B, S\) or"):
        model.logits(ids, mask[:, :3])
    with pytest.raises(ValueError, match=r"segments must be \(B, T\) = \(3, 11\)"):
        model.logits(ids, mask, segments[:2])
    with pytest.raises(ValueError, match="ids must end within 17 positions"):
        model.logits(np.zeros((1, 18), int))
    with pytest.raises(ValueError, match=r"targets must have the shape \(3, 11\), got \(3, 4\)"):
        model.loss(ids, np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="ids must fit into 32 bits, got 4294967301"):
        model.logits(np.array([[5 + (1 << 32)]]))
    with pytest.raises(ValueError, match="targets must fit into 32 bits, got -4294967196"):
        model.loss(ids, np.where(ids == ids, 100 - (1 << 32), 0))
    with pytest.raises(ValueError, match="segments must be None"):
        load("distilbert.masked_lm").logits(ids, mask, np.zeros((3, 11), int))
    with pytest.raises(ValueError, match="head must be None or one of masked_lm"):
        models.declare(models.preset("bert-base-uncased", head="chat"))
    with pytest.raises(ValueError, match=r"problem must be None or one of regression, single.*, got 'multi_label'"):
        models.with_head(model, "sequence_classification", problem="multi_label")
    with pytest.raises(ValueError, match="has no layers; its fields are vocab_size"):
        models.preset("bert-base-uncased", layers=3)


ODD = (None, True, -1, 0, 1.5, 10**9, float("nan"), "many", [], [[]], {}, {"a": "b"})


@pytest.mark.parametrize("name", ["bert.sequence_classification", "roberta.bare", "distilbert.masked_lm", "albert.pretraining"])
def test_mutated_configurations(name, tmp_path):
    """Every key with every odd value: a FormatError, or a model that works."""
    raw = read_json(DATA / name / "config.json")
    shutil.copy(DATA / name / "model.safetensors", tmp_path)
    untyped = []
    for key in (*raw, "id2label", "num_labels", "problem_type", "position_embedding_type"):
        for value in ODD:
            write_json(tmp_path / "config.json", raw | {key: value})
            try:
                model, _ = hub.load_folder_or_gguf(tmp_path)
                model.states(np.full((1, 3), 6))
            except FormatError:
                pass
            except ValueError as error:
                untyped.append(str(error))
    assert all("ids must end within" in message for message in untyped)  # a pad id that leaves no positions
