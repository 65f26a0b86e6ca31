"""Mixtures of experts on the emulated device beyond the CPU's cases: places number for number, logits of nan, recorded with other rows."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import numpy as np
import pytest

from fastlm import models, ops
from fastlm.backend import BFLOAT16
from fastlm.cuda.images import variant
from fastlm.cuda.recording import Recording
from fastlm.generate import Settings, generate
from fastlm.generate.recorded import why_not
from fastlm.kernels.quantized_matmul import quantized_matmul_ref as float_ref
from fastlm.lm import LM
from fastlm.models.place import placed_blocks
from fastlm.tensor import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
import fastlm.cuda.interpreter  # noqa: F401  before triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("E", "k", "how"), [(5, 2, {}), (3, 3, {"capacity": 4, "groups": 2}), (70, 4, {"renormalise": True, "capacity": 1})], ids=str
)
def test_places_are_the_cpus(on, E, k, how):
    logits = RNG.standard_normal((12, E), np.float32)
    here, there = ops.route(logits, k, **how), ops.route(on.put(logits), k, **how)
    for name in ("experts", "slots", "counts"):
        np.testing.assert_array_equal(getattr(there, name).numpy(), getattr(here, name), err_msg=name)
    rows = there.rows.numpy()
    np.testing.assert_array_equal(rows[: here.rows.size], here.rows)
    assert (rows[here.rows.size :] == 0).all()
    np.testing.assert_allclose(there.weights.numpy(), here.weights, rtol=1e-6)


def test_nan_has_experts(on):
    """What is computed from them is nan, but every address is one of an expert's."""
    logits = np.full((3, 4), np.nan, np.float32)
    logits[1] = [0, 1, 2, 3]
    there = ops.route(on.put(logits), 2)
    assert there.experts.numpy().tolist() == [[0, 1], [3, 2], [0, 1]]
    assert np.isnan(there.weights.numpy()[[0, 2]]).all()


def test_recorded(on):
    """A recorded step deals rows anew in each run."""
    logits, x = on.put(RNG.standard_normal((6, 3), np.float32)), RNG.standard_normal((6, 8), np.float32)
    there, up = on.put(x), on.put(RNG.standard_normal((3, 8, 8), np.float32))

    def step():
        routing = ops.route(logits, 2, renormalise=True)
        return ops.combine(ops.grouped_linear(ops.dispatch(there, routing), up, routing.counts), routing)

    recording = Recording(on, step)
    assert recording.refused == ""
    other = RNG.standard_normal((6, 3), np.float32)
    on.assign(logits, on.put(other))
    recording.run()
    routing = ops.route(other, 2, renormalise=True)
    want = ops.combine(ops.grouped_linear(ops.dispatch(x, routing), up.numpy(), routing.counts), routing)
    np.testing.assert_allclose(recording.result.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("R", "E", "k", "groups"), [(12, 5, 2, 3), (30, 70, 3, 1)])
def test_auxiliary_losses_are_the_cpus(on, R, E, k, groups):
    """Values and gradients of two layers; in the larger one a layer's sum is of several pieces."""
    logits = [3 * RNG.standard_normal((R, E), np.float32) for _ in range(2)]
    found = []
    for put in (lambda z: z, on.put):
        three = (ops.mixtral_load_balancing_loss, lambda r: ops.switch_load_balancing_loss(r, groups), ops.router_z_loss)
        for loss in three:
            routings = [ops.route(Tensor(put(z), requires_grad=True), k, renormalise=True) for z in logits]
            y = loss(routings)
            ops.scale(y, 0.5).backward()
            found.append([y.data, *(r.logits.grad for r in routings)])
    for number in range(3):
        for here, there in zip(found[number], found[3 + number], strict=True):
            np.testing.assert_allclose(there.numpy(), here, rtol=1e-5, atol=1e-7)
            assert np.abs(here).max() > 1e-4


def test_z_of_bfloat16(on):
    z = RNG.standard_normal((6, 5)).astype(BFLOAT16)
    there, here = Tensor(on.put(z), requires_grad=True), Tensor(z.astype(np.float32), requires_grad=True)
    losses = [ops.router_z_loss([ops.route(t, 2)]) for t in (here, there)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    np.testing.assert_allclose(np.asarray(there.grad.numpy(), np.float32), here.grad, rtol=1e-2, atol=1e-4)


def test_experts_that_are_one_matrix(on, monkeypatch):
    """The CPU's gradient, and no two experts write to one place: blocks would at once."""
    counts, places = np.array([3, 0, 4, 2]), []
    x, dy, w = (RNG.standard_normal(s, np.float32) for s in ((9, 8), (9, 12), (12, 8)))
    here, there = Tensor(w, requires_grad=True), Tensor(on.put(w), requires_grad=True)
    ops.grouped_linear(x, [here] * 4, counts).backward(dy)
    kernel = on.table.grouped_linear_dweights

    def noted(into, *rest):
        places.extend(a.pointer for a in into)
        kernel(into, *rest)

    monkeypatch.setattr(on.table, "grouped_linear_dweights", noted, raising=False)
    for times in (1, 2):
        ops.grouped_linear(on.put(x), [there] * 4, on.put(counts)).backward(on.put(dy))
        np.testing.assert_allclose(there.grad.numpy(), times * here.grad, rtol=1e-5, atol=1e-5)
        assert len(set(places)) == len(places) == 4
        places.clear()


def experts_of(kind, E, N, K, activations, rng):
    return [float_ref.random_weight(kind, (N, K), rng).with_activations(activations) for _ in range(E)]


@pytest.mark.parametrize(
    ("kind", "counts", "dtype"),
    [
        ("Q4_0", (3, 0, 1, 36), np.float32),
        ("Q8_0", (2, 5), np.float32),
        ("Q5_1", (0, 70, 2), BFLOAT16),
        ("Q4_K", (0, 0, 3), BFLOAT16),
        ("Q6_K", (33, 1), BFLOAT16),
    ],
)
def test_quantised_experts(on, kind, counts, dtype):
    """The CPU's numbers and gradients; the last rows belong to nobody."""
    rng = np.random.default_rng(sum(counts))
    E, K, rows = len(counts), 512 if "K" in kind else 96, sum(counts)
    weights = experts_of(kind, E, 41, K, "float32", rng)
    x, dy = (rng.standard_normal(s).astype(dtype).astype(np.float32) for s in ((rows, K), (rows, 41)))
    here = Tensor(x, requires_grad=True)
    activation = "silu" if kind != "Q6_K" else None  # whose numbers are too large for a curve
    want = ops.grouped_linear(here, weights, np.array(counts), activation)
    want.backward(dy)
    there = Tensor(on.put(np.concatenate([x, np.full((2, K), np.nan, np.float32)]).astype(dtype)), requires_grad=True)
    taken = on.put(np.array(counts, np.int64))
    got = ops.grouped_linear(there, [placed_blocks(w, on) for w in weights], taken, activation)
    got.backward(on.put(np.concatenate([dy, np.zeros((2, 41), np.float32)]).astype(dtype)))
    error = 1e-5 if dtype == np.float32 else 2.0**-6
    for g, w in ((got.data, want.data), (there.grad, here.grad)):
        np.testing.assert_allclose(g.numpy()[:rows].astype(np.float32), w, rtol=error, atol=error * np.abs(w).max())
    listed = {variant(*v) for v in importlib.import_module("fastlm.kernels.quantized_matmul.quantized_matmul_triton").variants()}
    assert on.launched["quantized_matmul"] <= listed


def test_experts_of_int8_activations(on):
    """x is rounded in groups of 32 before the products."""
    rng = np.random.default_rng(4)
    weights, x, counts = experts_of("Q4_1", 3, 37, 64, "int8", rng), rng.standard_normal((9, 64), np.float32), np.array([4, 0, 5])
    want = ops.grouped_linear(x, weights, counts)
    got = ops.grouped_linear(on.put(x), [placed_blocks(w, on) for w in weights], on.put(counts))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)
    exact = ops.grouped_linear(x, [w.with_activations("float32") for w in weights], counts)
    assert np.abs(got.numpy() - exact).max() > 1e-3


def test_experts_of_different_kinds(on):
    rng = np.random.default_rng(4)
    weights = [
        placed_blocks(w, on) for w in experts_of("Q4_1", 1, 8, 32, "float32", rng) + experts_of("Q8_0", 1, 8, 32, "float32", rng)
    ]
    with pytest.raises(
        NotImplementedError, match=r"\[grouped_linear\] weights\[1\] must be Q4_1 on a device, as weights\[0\] is, got Q8_0"
    ):
        ops.grouped_linear(on.put(np.ones((2, 32), np.float32)), weights, on.put(np.array([1, 1])))


@pytest.mark.parametrize(("name", "kind", "how"), [("mixtral-8x7b", "Q4_1", "float32"), ("glam-0.1b-64e", "Q8_0", "int8")])
def test_quantised_mixtures(on, name, kind, how):
    """Logits and greedy ids of the host, from a recorded step."""
    sizes = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 2, "context": 16, "d_ff": 32, "n_kv_head": 1, "head_dim": 16}
    sizes |= {"n_expert": 4}
    fields = {f.name for f in dataclasses.fields(models.PRESETS[name])}
    config = models.preset(name, **{k: v for k, v in sizes.items() if k in fields})
    host, lm = (LM(models.create(config, seed=3)).quantize(kind, how) for _ in range(2))
    lm.to("cuda")
    experts = [k for k, p in lm.model.named_parameters().items() if "experts" in k.split(".") and p.dtype == kind]
    assert len(experts) >= 4
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(lm.model.logits(ids), host.model.logits(ids), rtol=1e-5, atol=1e-5)
    settings = Settings(max_tokens=3)
    prompts = [[1, 2, 3], [9]]
    assert [o.ids for o in generate(lm.model, prompts, settings)] == [o.ids for o in generate(host.model, prompts, settings)]
    assert why_not(lm.model) == []
