from __future__ import annotations

import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_forward, oracle

CASES = pytest.mark.parametrize("case", cases("adamw"), ids=case_id)
SETTINGS = {"step": 1, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def call(parameter, gradient, m, v, **settings):
    """The operation in the oracle's form: new arrays, nothing in place."""
    parameter, m, v = parameter.copy(), m.copy(), v.copy()
    ops.adamw(parameter, gradient, m, v, **settings)
    return parameter, m, v


@CASES
def test_forward(isa, case):
    check_forward("adamw", call, case)


def test_first_step_by_hand():
    """At step 1 the bias corrections cancel the betas: the parameter moves by lr * sign(gradient), after the decay."""
    p, m, v = np.array([1.0, -2.0], np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32)
    ops.adamw(p, np.array([0.5, -3.0], np.float32), m, v, **SETTINGS)
    np.testing.assert_allclose(p, [1.0 * 0.999 - 0.01, -2.0 * 0.999 + 0.01], rtol=1e-6)
    np.testing.assert_allclose(m, [0.05, -0.3], rtol=1e-6)


def test_hundred_steps(isa):
    """A least-squares problem: the loss curve follows the float64 oracle's to 1e-5."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 16)), rng.standard_normal(64)
    ours = [np.zeros(16, np.float32) for _ in range(3)]
    theirs = [np.zeros(16) for _ in range(3)]
    for step in range(1, 101):
        settings = {**SETTINGS, "step": step}
        losses = []
        for state in (ours, theirs):
            residual = a @ state[0].astype(np.float64) - b
            losses.append(np.mean(residual**2))
            gradient = 2 / 64 * a.T @ residual
            if state is ours:
                ops.adamw(state[0], gradient.astype(np.float32), state[1], state[2], **settings)
            else:
                theirs = list(oracle("adamw").forward(state[0], gradient, state[1], state[2], **settings))
        assert abs(losses[0] - losses[1]) <= 1e-5 * max(1, losses[1])


def test_many_tensors_equal_one_by_one_at_any_thread_count(isa, threads):
    rng = np.random.default_rng(1)
    shapes = [(3,), (129, 511), (1,), (0, 4), (40000,)]
    decays = [0.0, 0.1, 0.0, 0.1, 0.2]
    make = [[rng.random(s).astype(np.float32) for s in shapes] for _ in range(4)]

    def copies():
        return [[x.copy() for x in group] for group in make]

    settings = {k: x for k, x in SETTINGS.items() if k != "weight_decay"}
    one = copies()
    for i, decay in enumerate(decays):
        ops.adamw(*(group[i] for group in one), weight_decay=decay, **settings)
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        many = copies()
        ops.adamw_step(*many, weight_decay=decays, **settings)
        for group, expected in zip(many, one, strict=True):
            for x, y in zip(group, expected, strict=True):
                np.testing.assert_array_equal(x, y)


def test_tensors():
    """A Tensor's array is updated in place."""
    p = Tensor(np.ones(4, np.float32), requires_grad=True)
    array = p.data
    ops.adamw(p, np.ones(4, np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32), **SETTINGS)
    assert p.data is array
    assert (array < 1).all()


def test_global_norm(isa, threads):
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(n).astype(np.float32) for n in (1, 0, 31, 70001, 1023)]
    exact = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in arrays))
    norms = set()
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        norms.add(ops.global_norm(arrays))
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(exact, rel=1e-14)
    assert ops.global_norm([np.full(4, 1e30, np.float32)]) == pytest.approx(2e30, rel=1e-7)
    assert ops.global_norm([]) == 0
    assert np.isnan(ops.global_norm([arrays[0], np.array([np.nan], np.float32)]))
    assert ops.global_norm([np.array([-np.inf], np.float32)]) == np.inf


def test_refuses():
    a = [np.zeros(4, np.float32) for _ in range(4)]
    with pytest.raises(ValueError, match=r"\[adamw\] m 0 must be the parameter's shape = \(4,\), got \(5,\)\."):
        ops.adamw(a[0], a[1], np.zeros(5, np.float32), a[3], **SETTINGS)
    with pytest.raises(ValueError, match=r"parameter 0 must be a C-contiguous, writeable array"):
        ops.adamw(np.zeros(8, np.float32)[::2], a[1], a[2], a[3], **SETTINGS)
    with pytest.raises(TypeError, match=r"gradient 0 must be float32, got float64"):
        ops.adamw(a[0], np.zeros(4), a[2], a[3], **SETTINGS)
    for step in (0, 1 << 63, 1 << 70):
        with pytest.raises(ValueError, match=r"\[adamw\] step must be 1 for the first step and count upwards, below 2\*\*63"):
            ops.adamw(*a, **{**SETTINGS, "step": step})
    for step in (1.9, 2.0, np.nan, np.inf, None, "1", True):
        with pytest.raises(TypeError, match=r"\[adamw\] step must be an integer, 1 for the first step, got"):
            ops.adamw(*a, **{**SETTINGS, "step": step})
    for lr in ("0.1", None):
        with pytest.raises(TypeError, match=r"\[adamw\] lr must be a number, got"):
            ops.adamw(*a, **{**SETTINGS, "lr": lr})
    with pytest.raises(ValueError, match=r"beta2 must be from 0 to below 1, got 1\.0"):
        ops.adamw(*a, **{**SETTINGS, "beta2": 1.0})
    with pytest.raises(ValueError, match=r"equally long, got 1, 2, 1, 1"):
        ops.adamw_step(a[:1], a[:2], a[:1], a[:1], **SETTINGS)
    with pytest.raises(ValueError, match=r"weight_decay must be a number or one per parameter = 1, got 2"):
        ops.adamw_step(a[:1], a[:1], a[:1], a[:1], **{**SETTINGS, "weight_decay": [0.1, 0.2]})
