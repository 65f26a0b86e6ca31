"""Mixtures of experts on the emulated device beyond the CPU's cases: places number for number, logits of nan, recorded with other rows."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fastlm import ops
from fastlm.backend import BFLOAT16
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.recording import Recording
from fastlm.tensor import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
import fastlm.cuda.interpreter  # noqa: F401  before triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RNG = np.random.default_rng(0)


@pytest.fixture
def on():
    before = Emulated.damaged
    with emulated(twin="triton") as device:
        yield device
    assert Emulated.damaged == before, "memory outside of an array was written"


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
