"""Training: torch's gradients and losses over 100 steps, exact resume, checkpoints, what is not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from fastlm import backend, data, hub, models
from fastlm.checkpoint import read_json
from fastlm.lm import LM
from fastlm.models.base import names
from fastlm.train import AdamW, checkpoints, default_lr, evaluate, loop, read_log, train, warmup_cosine

MODELS = Path(__file__).parents[1] / "data" / "models"
SETTINGS = json.loads((MODELS / "training.json").read_text())
GOLDEN = np.load(MODELS / "training.npz")
TEXT = "".join(f"{i} plus {j} is {i + j}.\n" for i in range(40) for j in range(12))


def batches(name):
    tokens = GOLDEN[f"{name}.tokens"].astype(np.int32)
    return lambda n: data.Batch(np.ascontiguousarray(tokens[n, :, :-1]), np.ascontiguousarray(tokens[n, :, 1:]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_of_the_first_step(name):
    model = hub.load_folder_or_gguf(MODELS / f"{name}-start")[0].train()
    loss = model.loss(*batches(name)(0))
    loss.backward()
    module = models.module_of(model)
    largest = max(np.abs(GOLDEN[k]).max() for k in GOLDEN.files if k.startswith(f"{name}.gradient."))
    for ours, theirs in names(module.HF_NAMES, model).items():
        got, want = model.named_parameters()[ours].grad, GOLDEN[f"{name}.gradient.{theirs}"]
        if ours.endswith(tuple(module.HF_TRANSPOSED)):
            want = want.T
        # Relative to the tensor, but for gradients that cancel to nothing (the key bias): there the rounding is that of the others.
        scale = max(np.abs(want).max(), 1e-2 * largest)
        assert np.abs(got - want).max() <= 1e-5 * scale, ours


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_of_100_steps(name):
    model = hub.load_folder_or_gguf(MODELS / f"{name}-start")[0]
    s = SETTINGS
    steps = list(
        train(
            model, batches(name), steps=s["steps"], batch=4, context=24, lr=s["lr"], min_lr=s["min_lr"], warmup=s["warmup"],
            weight_decay=s["weight_decay"], betas=tuple(s["betas"]), eps=s["eps"], clip=s["clip"],
        )
    )  # fmt: skip
    assert [step.step for step in steps] == list(range(1, 101))
    np.testing.assert_allclose([step.lr for step in steps], GOLDEN["learning_rates"], rtol=1e-12)
    np.testing.assert_allclose([step.loss for step in steps], GOLDEN[f"{name}.losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose([step.grad_norm for step in steps], GOLDEN[f"{name}.norms"], rtol=1e-4)
    assert max(GOLDEN[f"{name}.norms"]) > s["clip"]  # so that clipping took part


@pytest.fixture
def corpus(tmp_path):
    return data.prepare(TEXT, lambda text: [ord(c) for c in text], tmp_path / "tokens", 128)


def small(seed=0):
    return models.create(models.GPTConfig(vocab_size=128, context=16, d_model=24, n_layer=2, n_head=2, bias=False), seed)


def run(corpus, out=None, stop=None, **more):
    model = small()
    seen = []
    arguments = {"steps": 20, "batch": 4, "warmup": 3, "eval_every": 5, "save_every": 5 if out else 0, "accumulate": 2} | more
    for step in train(model, corpus, out=out, **arguments):
        seen.append(step)
        if step.step == stop:
            break
    return model, seen


def same(a, b):
    for name, p in a.named_parameters().items():
        assert p.data.tobytes() == b.named_parameters()[name].data.tobytes(), name


def test_learns_and_logs(corpus, tmp_path):
    model, seen = run(corpus, tmp_path / "run", steps=60, eval_every=20, lr=1e-2)
    assert seen[-1].validation_loss < 3.0 < seen[0].loss
    assert [s.step for s in seen if s.validation_loss is not None] == [20, 40, 60]
    assert seen[-1].validation_loss == evaluate(model, corpus.validation, 4, 16)
    log = read_log(tmp_path / "run")
    assert [r["loss"] for r in log] == [s.loss for s in seen]
    assert log[19]["validation_loss"] == seen[19].validation_loss
    assert seen[-1].seconds_left == 0
    assert seen[-1].tokens_per_second > 0
    assert 0 < seen[-1].roof_share < 1


@pytest.mark.parametrize("killed", [False, True])
def test_resume_is_exact(corpus, tmp_path, killed):
    whole, seen = run(corpus, tmp_path / "whole")
    run(corpus, tmp_path / "half", stop=12)  # leaving the loop saves
    assert [p.name for p in checkpoints(tmp_path / "half")] == ["step-000010", "step-000012"]
    if killed:  # the process died instead: the newest checkpoint is two steps old
        shutil.rmtree(tmp_path / "half" / "step-000012")
    resumed, rest = run(corpus, tmp_path / "half", resume=True)
    first = 10 if killed else 12
    assert [s.step for s in rest] == list(range(first + 1, 21))
    assert [s.loss for s in rest] == [s.loss for s in seen[first:]]
    assert rest[-1].validation_loss == seen[-1].validation_loss
    same(whole, resumed)
    assert [r["loss"] for r in read_log(tmp_path / "half")] == [s.loss for s in seen]
    same(hub.load_folder_or_gguf(tmp_path / "half" / "step-000020")[0], whole)
    assert not list(run(corpus, tmp_path / "half", resume=True)[1])  # nothing is left to do


def test_bits_do_not_depend_on_threads(corpus, threads):
    backend.set_num_threads(1)
    one, _ = run(corpus)
    backend.set_num_threads(2)
    same(one, run(corpus)[0])


def test_checkpoints(corpus, tmp_path):
    run(corpus, tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000015", "step-000020"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.jsonl", "step-000015", "step-000020"]
    # A checkpoint that was being written when the machine stopped does not count, and a run goes on from the one before.
    (tmp_path / "run" / "step-000025.tmpabc").mkdir()
    assert len(checkpoints(tmp_path / "run")) == 2
    with pytest.raises(ValueError, match=r"of another run: batch was 4, is 5"):
        run(corpus, tmp_path / "run", resume=True, batch=5)
    wide = models.create(models.GPTConfig(vocab_size=128, context=16, d_model=48, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="of another model"):
        list(train(wide, corpus, steps=20, batch=4, accumulate=2, out=tmp_path / "run", resume=True))
    shutil.rmtree(tmp_path / "run" / "step-000020")
    _, rest = run(corpus, tmp_path / "run", resume=True)
    assert [s.step for s in rest] == [16, 17, 18, 19, 20]
    assert read_json(tmp_path / "run" / "step-000020" / "training.json")["updates"] == 20
    assert not (tmp_path / "run" / "step-000025.tmpabc").exists()


def test_a_folder_of_another_run_is_refused(corpus, tmp_path):
    """Its checkpoints would outlive this run's, which have lower numbers, and be what `resume` takes."""
    before, _ = run(corpus, tmp_path / "run")
    log = read_log(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"\[train\] out must be a folder without checkpoints, got .*run with step-000020 of a run"
    ):
        train(small(1), corpus, steps=50, batch=4, out=tmp_path / "run", save_every=5)
    assert read_log(tmp_path / "run") == log
    same(hub.load_folder_or_gguf(checkpoints(tmp_path / "run")[-1])[0], before)
    shutil.rmtree(tmp_path / "run" / "step-000015")
    shutil.rmtree(tmp_path / "run" / "step-000020")  # a log alone is of a run that saved nothing
    assert len(run(corpus, tmp_path / "run", steps=2)[1]) == len(read_log(tmp_path / "run")) == 2


def test_numbers_of_numpy_are_numbers(corpus, tmp_path):
    """They come from sweeps; JSON, which a checkpoint's settings are written in, has none of them."""
    plain, _ = run(corpus, steps=4, seed=3, context=8, lr=float(np.float32(3e-3)))
    given = {k: np.int64(v) for k, v in {"steps": 4, "seed": 3, "context": 8, "batch": 4, "save_every": 2, "accumulate": 2}.items()}
    model, seen = run(corpus, tmp_path / "numpy", **given, lr=np.float32(3e-3))
    assert [p.name for p in checkpoints(tmp_path / "numpy")] == ["step-000002", "step-000004"]
    assert read_json(tmp_path / "numpy" / "step-000004" / "training.json")["settings"]["seed"] == 3
    assert len(seen) == 4
    same(plain, model)


def test_nothing_asked_is_no_loss(corpus):
    nothing = [data.Batch(np.ones((2, 4), np.int32), np.full((2, 4), -100, np.int32))]
    assert math.isnan(loop.mean_loss(small(), nothing))
    something = [data.Batch(np.ones((2, 4), np.int32), np.ones((2, 4), np.int32))]
    assert loop.mean_loss(small(), nothing + something) == loop.mean_loss(small(), something)


@pytest.mark.parametrize("where", ["batch", "evaluation", "update"])
def test_ctrl_c_saves(corpus, tmp_path, monkeypatch, where):
    """It comes while a step is computed, hardly ever in the body of the loop: then the last whole step is saved."""
    whole, _ = run(corpus, steps=12, save_every=0)

    def pressed(at, function):
        calls = iter(range(1000))
        return lambda *given: os.kill(os.getpid(), signal.SIGINT) if next(calls) == at else function(*given)

    with monkeypatch.context() as patch:
        if where == "batch":  # the second of step 8
            patch.setattr(data.Loader, "batch", pressed(15, data.Loader.batch))
        elif where == "evaluation":  # that after step 5
            patch.setattr(loop, "mean_loss", pressed(0, loop.mean_loss))
        else:
            patch.setattr(loop.AdamW, "update", pressed(7, AdamW.update))
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "run", steps=12, save_every=0)
    at = 5 if where == "evaluation" else 7
    assert [p.name for p in checkpoints(tmp_path / "run")] == [f"step-{at:06d}"]
    resumed, rest = run(corpus, tmp_path / "run", steps=12, save_every=0, resume=True)
    assert rest[0].step == at + 1
    same(whole, resumed)
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("record", ["0", "1"])
def test_frozen_parts_stay_as_they_are(corpus, tmp_path, monkeypatch, record, recompute):
    """From Python and recorded; what is left learns, and a run that was stopped goes on exactly."""
    monkeypatch.setenv("FASTLM_RECORD", record)

    def learn(out, stop=None, resume=False, frozen=("token_embedding", "blocks.0")):
        model = small()
        for name in frozen:
            (model.blocks[0] if "." in name else getattr(model, name)).freeze()
        options = {"steps": 8, "batch": 4, "warmup": 0, "lr": 1e-2, "recompute": recompute}
        for step in train(model, corpus, out=tmp_path / out, resume=resume, **options):
            if step.step == stop:
                break
        return model

    model, before = learn("whole"), small().named_parameters()
    for name, p in model.named_parameters().items():
        frozen = name.startswith(("token_embedding.", "blocks.0."))
        assert np.array_equal(p.data, before[name].data) == frozen, name
        assert p.requires_grad != frozen
    learn("half", stop=5)
    same(model, learn("half", resume=True))
    with pytest.raises(ValueError, match="optimiser's state does not fit the model"):
        learn("half", resume=True, frozen=())
    every = small().freeze()
    list(train(every, corpus, steps=2, batch=4, warmup=0))
    assert all(not np.array_equal(p.data, before[name].data) for name, p in every.named_parameters().items())


def test_accumulation_is_a_larger_batch():
    tokens = np.random.default_rng(0).integers(0, 128, (6, 4, 17)).astype(np.int32)
    a, b = small(), small()
    few = lambda n: data.Batch(np.ascontiguousarray(tokens[n, :, :-1]), np.ascontiguousarray(tokens[n, :, 1:]))  # noqa: E731
    many = tokens.reshape(3, 8, 17)
    more = lambda n: data.Batch(np.ascontiguousarray(many[n, :, :-1]), np.ascontiguousarray(many[n, :, 1:]))  # noqa: E731
    x = [s.loss for s in train(a, few, steps=3, batch=4, accumulate=2, warmup=0)]
    y = [s.loss for s in train(b, more, steps=3, batch=8, warmup=0)]
    np.testing.assert_allclose(x, y, rtol=1e-5)


def test_step_that_is_not_finite_is_skipped(corpus, tmp_path):
    model = small()
    loader = data.Loader(corpus.train, 4, 16)
    scale = model.final_norm.weight
    run_ = train(model, loader.batch, steps=4, batch=4, context=16, warmup=0)
    next(run_)
    before = {k: p.data.copy() for k, p in model.named_parameters().items()}
    value = scale.data[3]
    scale.data[3] = np.nan
    with pytest.warns(RuntimeWarning, match=r"\[train\] step 2 skipped: loss nan"):
        step = next(run_)
    assert step.skipped
    scale.data[3] = value
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(p.data, before[name])
    step = next(run_)
    assert not step.skipped
    assert math.isfinite(step.loss)


def test_decay_spares_vectors():
    model = models.create(models.GPTConfig(vocab_size=8, context=4, d_model=8, n_layer=1, n_head=2))
    decays = dict(zip(model.named_parameters(), AdamW(model, (0.9, 0.95), 1e-8, 0.1).decays, strict=True))
    assert {k for k, d in decays.items() if d == 0} == {k for k in decays if "norm" in k or k.endswith("bias")}


def test_schedule():
    assert [round(default_lr(width), 5) for width in (128, 384, 768)] == [0.002, 0.00096, 0.00061]
    rates = [warmup_cosine(n, 100, 1.0, 0.1, 10) for n in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert min(rates[10:]) == rates[-1] > 0.1
    assert warmup_cosine(100, 100, 1.0, 0.1, 10) == 0.1


def test_refuses(corpus, tmp_path):
    for change, message in (
        ({"steps": 0}, r"\[train\] steps must be an integer of at least 1, got 0"),
        ({"context": 17}, r"context must be from 1 to the model's 16, got 17"),
        ({"context": 0}, "context must be an integer of at least 1, got 0"),
        ({"batch": True}, "batch must be an integer of at least 1, got True"),
        ({"lr": -1.0}, r"lr must be greater than 0\.0, got -1"),
        ({"lr": math.inf}, r"lr must be from 0\.0 to 3\.4"),
        ({"min_lr": -1.0}, r"min_lr must be from 0\.0"),
        ({"weight_decay": math.nan}, "weight_decay must be from .*, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": 0.0}, r"eps must be greater than 0\.0"),
        ({"clip": math.nan}, "clip must be greater than 0"),
        ({"seed": 1.5}, r"seed must be an integer of 64 bits, got 1\.5"),
        ({"seed": 1 << 64}, "seed must be an integer of 64 bits"),
        ({"batch": 4.0}, r"batch must be an integer of at least 1, got 4\.0\. Give 4\."),
        ({"batch": 1 << 64}, "batch must be an integer of at most 18446744073709551615, got 18446744073709551616"),
        ({"eval_every": -1}, "eval_every must be an integer of at least 0, got -1"),
        ({"eval_every": 1, "eval_batches": 0}, "eval_batches must be an integer of at least 1, got 0"),
        ({"save_every": 1.5, "out": tmp_path}, r"save_every must be an integer of at least 0, got 1\.5"),
        ({"resume": True}, "out must be a folder"),
        ({"out": tmp_path / "tokens" / "tokens.bin"}, "out must be a folder, got the file"),
        ({"objective": "causal"}, r"objective must be one that the model can learn, data\.Causal for GPT, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small(), corpus, **({"steps": 3} | change))
    with pytest.raises(TypeError, match=r"tokenizer must be a fastlm\.Tokenizer, which checkpoints hold, got str"):
        train(small(), corpus, steps=1, tokenizer="gpt2")
    with pytest.raises(TypeError, match=r"model must be one of fastlm\.models, got LM: give its `model`"):
        train(LM(small()), corpus, steps=1)
    with pytest.raises(ValueError, match=r"model must have weights, token_embedding\.weight has none yet"):
        train(models.declare(small().config), corpus, steps=1)
    with pytest.raises(TypeError, match=r"data must give Batches, .* got tuple"):
        next(train(small(), lambda n: (n, n), steps=1))
    with pytest.raises(ValueError, match="data must hold ids from 0 to 127, got 3 to 128"):
        train(small(), np.array([3, 128] * 20), steps=1)
    with pytest.raises(ValueError, match="limit must be an integer of at least 1, got 0"):
        evaluate(small(), corpus, 4, 16, limit=0)
    with pytest.raises(ValueError, match=r"\[evaluate\] data must be a Corpus, Labelled, or \(n,\) integers, got float64"):
        evaluate(small(), np.zeros(100), 4, 16)
    with pytest.raises(ValueError, match=r"the model's vocab_size must be at least the data's 128, got 65"):
        train(models.create("gpt-char"), corpus, steps=1)
    with pytest.raises(ValueError, match="needs held-out data"):
        train(small(), corpus.train, steps=1, eval_every=1)
    with pytest.raises(ValueError, match=r"\(n,\) integers, got float64"):
        train(small(), np.zeros(100), steps=1)
    assert not (tmp_path / "run").exists()
