"""XLNet on the emulated device: both streams, segments, masks, memories that stay there."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastlm
from fastlm import backend, data, generate, models
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.models.xlnet import XLNetConfig
from tests.gpu.mirror import Mirror

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DATA = Path(__file__).parents[1] / "data" / "xlnet"
GOLDEN = np.load(DATA / "golden.npz")
INPUTS = ("mask", "segments", "perm_mask", "target_mapping", "mems")
CASES = [("bi", "streams"), ("bi", "all"), ("tanh", "all"), ("uni", "memory")]  # tanh: memories of 5 positions


@pytest.fixture
def quick():
    """The emulated device with the CPU's kernels for the heavy ones."""
    before = Emulated.damaged
    with emulated(kind=Mirror, twin="triton") as device:
        yield device
    assert Emulated.damaged == before, "memory outside of an array was written"


def given(name, case):
    return {k: GOLDEN[f"{name}.{case}.{k}"] for k in INPUTS if f"{name}.{case}.{k}" in GOLDEN}


def close(got, want):
    """The bar of tests/models/test_xlnet.py."""
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_loss_and_gradients(name, case, quick):
    """The reference's logits, memories and loss, the host's gradients; memories that the call gave back are on the device."""
    key, extra, found = f"{name}.{case}", given(name, case), []
    ids, targets = GOLDEN[f"{key}.ids"], GOLDEN[f"{key}.targets"]
    for device in ("cpu", "cuda"):
        model = fastlm.load(DATA / name, device=device).model
        logits, mems = model.logits_and_mems(ids, **extra)
        again = model.logits(ids, **extra | {"mems": mems})
        model.train()
        loss = model.loss(ids, targets, **extra)
        loss.backward()
        found.append((logits, mems, again, loss.item(), model.named_parameters()))
    host, there = found
    assert all(m.device is quick for m in there[1])
    close(there[0], GOLDEN[f"{key}.logits"])
    close(np.stack([m.numpy() for m in there[1]]), GOLDEN[f"{key}.kept"])
    close(there[2], host[2])
    assert there[3] == pytest.approx(float(GOLDEN[f"{key}.loss"]), rel=1e-5)
    for k, p in host[4].items():
        got = there[4][k].grad
        assert (got is None) == (p.grad is None), k
        if p.grad is not None:
            assert np.linalg.norm(got.numpy() - p.grad) <= 1e-5 * max(np.linalg.norm(p.grad), 1e-2), k


@pytest.mark.parametrize("name", ["bi", "uni"])
def test_generates_the_same_ids(name, quick):
    """Prompts of different lengths, one of a single id, with memories; with beams, whose rows are reordered."""
    host, model = (fastlm.load(DATA / name, device=device).model for device in ("cpu", "cuda"))
    prompts = [GOLDEN[f"{name}.prompt{i}"].tolist() for i in range(3)]
    out = generate.generate(model, prompts, generate.Settings(max_tokens=5, temperature=0.0))
    assert [o.ids for o in out] == [GOLDEN[f"{name}.greedy{i}"][:5].tolist() for i in range(3)]
    if name == "bi":
        settings = generate.BeamSettings(beams=3, max_tokens=4)
        assert generate.beam_search(model, prompts[1], settings) == generate.beam_search(host, prompts[1], settings)


@pytest.mark.parametrize("style", ["original", "huggingface"])
def test_permutation_lm(style, quick):
    """Three steps of the loop: the host's losses and weights."""
    config = XLNetConfig(vocab_size=31, d_model=24, n_layer=2, n_head=3, d_ff=40)
    tokens = np.random.default_rng(1).integers(5, 31, 400).astype(np.int32)
    vocabulary = data.Vocabulary(31, pad=0, cls=1, sep=2, mask=3, special=range(5))
    objective, found = data.Permutation(vocabulary, style), []
    for device in ("cpu", "cuda"):
        model = models.create(config, seed=3)
        steps = fastlm.train(model, tokens, steps=3, batch=2, context=14, objective=objective, lr=1e-2, warmup=0, device=device)
        found.append(([(s.loss, s.grad_norm) for s in steps], model))
    (expected, host), (got, there) = found
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for k, p in there.named_parameters().items():
        np.testing.assert_allclose(p.numpy(), host.named_parameters()[k].data, atol=2e-5, err_msg=k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_twins(dtype):
    """A small one whose every kernel is Triton's, in both dtypes, with memories in them; all forms are compiled ahead of time."""
    config = XLNetConfig(vocab_size=19, d_model=16, n_layer=1, n_head=2, d_ff=24)
    rng = np.random.default_rng(2)
    ids, segments = rng.integers(0, 19, (2, 5)), rng.integers(0, 2, (2, 5))
    mapping = np.zeros((2, 2, 5), bool)
    mapping[0, [0, 1], [1, 4]] = mapping[1, 0, 2] = True
    extra = {"segments": segments, "target_mapping": mapping, "perm_mask": np.triu(np.ones((2, 5, 5), bool))}
    extra["mask"] = np.array([[1] * 5, [0] + [1] * 4])
    extra["mems"], targets, found = [rng.standard_normal((2, 3, 16)).astype(np.float32)], np.array([[3, 4], [5, -100]]), []
    with emulated(twin="triton") as on:
        for device in (None, on):
            model = models.create(config, seed=3)
            for k, p in model.named_parameters().items():
                if "norm" not in k:
                    p.data *= 8  # so that the scores differ
            if device is not None:
                model.to(device, dtype)
            logits, mems = model.logits_and_mems(ids, **extra)
            more = model.logits(ids[:, :2], mems=mems)
            for p in model.named_parameters().values():
                p.requires_grad = True
            loss = model.loss(ids, targets, **extra)
            loss.backward()
            found.append((logits, more, loss.item(), {k: p.grad for k, p in model.named_parameters().items()}))
        assert mems[0].dtype == backend.DTYPES[dtype]
        for op, launched in on.launched.items():
            listed = {variant(*v) for v in importlib.import_module(f"fastlm.kernels.{op}.{op}_triton").variants()}
            assert launched <= listed, f"{launched - listed} would not be compiled ahead of time"
    host, there = found
    error = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(there[0], host[0], atol=error * np.abs(host[0]).max())
    np.testing.assert_allclose(there[1], host[1], atol=error * np.abs(host[1]).max())
    assert there[2] == pytest.approx(host[2], rel=error)
    for k, g in host[3].items():
        assert (g is None) == (there[3][k] is None), k
        if g is not None:
            got = there[3][k].numpy().astype(np.float32)
            assert np.linalg.norm(got - g) <= error * max(np.linalg.norm(g), 0.1), (k, np.linalg.norm(got - g), np.linalg.norm(g))


def test_refusals():
    """Memories are where the model is and in its dtype."""
    ids, mems = GOLDEN["bi.memory.ids"], GOLDEN["bi.memory.mems"]
    with emulated(twin="triton") as on:
        mems = [on.put(m) for m in mems]
        with pytest.raises(TypeError, match=r"\[xlnet\] mems on a device must be bfloat16, as the model is, got float32"):
            fastlm.load(DATA / "bi", device="cuda", dtype="bfloat16").model.logits(ids, mems=mems)
        with pytest.raises(TypeError, match=r"\[xlnet\] mems is on emulated, the model is on the host"):
            fastlm.load(DATA / "bi").model.logits(ids, mems=mems)
