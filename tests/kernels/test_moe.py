from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.checkpoint.quantized import quantize
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("moe"), ids=case_id)


def call(x, logits, up, down, k, residual=None, **how):
    routing = ops.route(logits, k, **how)
    h = ops.grouped_linear(ops.dispatch(x, routing), up, routing.counts, activation="relu")
    return ops.combine(ops.grouped_linear(h, down, routing.counts), routing, residual)


def as_list(x, logits, up, down, k, **how):
    if isinstance(up, Tensor):
        pytest.skip("gradients of lists have a test of their own")
    return call(x, logits, list(up), list(down), k, **how)


@CASES
def test_forward(isa, case):
    check_forward("moe", call, case)
    check_forward("moe", as_list, case)


@CASES
def test_backward(isa, case):
    check_backward("moe", call, case)


@CASES
def test_oracle(case):
    check_oracle("moe", case)


def test_ties_go_to_the_lowest_index(isa):
    logits = np.array([[0, 2, 2, 2, 1], [5, 5, 5, 5, 5]], np.float32)
    np.testing.assert_array_equal(ops.route(logits, 3).experts, [[1, 2, 3], [0, 1, 2]])


def test_order_of_places():
    """By expert, then in the order of rows; first choices before second ones where there is not room for all."""
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.6, 0.1, 0.3], [0.1, 0.6, 0.3]], np.float32))
    routing = ops.route(logits, 2)
    np.testing.assert_array_equal(routing.counts, [3, 3, 2])
    np.testing.assert_array_equal(routing.rows, [0, 1, 2, 0, 1, 3, 2, 3])
    assert routing.dropped == 0
    routing = ops.route(logits, 2, capacity=2)
    np.testing.assert_array_equal(routing.counts, [2, 2, 2])
    np.testing.assert_array_equal(routing.rows, [0, 2, 1, 3, 2, 3])
    np.testing.assert_array_equal(routing.slots, [[0, -1], [2, -1], [1, 4], [3, 5]])
    assert routing.dropped == 2


def test_bits(isa, threads):
    """The same bits on any number of threads; a row's do not depend on its company; each expert's are those of linear."""
    rng = np.random.default_rng(0)
    R, E, C, F = 90, 6, 130, 72
    x, logits = rng.standard_normal((R, C), np.float32), rng.standard_normal((R, E), np.float32)
    up, down = rng.standard_normal((E, F, C), np.float32), rng.standard_normal((E, C, F), np.float32)
    found = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        tensors = [Tensor(a, requires_grad=True) for a in (x, logits, up, down)]
        y = call(*tensors, 2, renormalise=True)
        y.backward(np.ones_like(x))
        found.append((y.data, *(t.grad for t in tensors)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    for r in (0, 41, 89):
        np.testing.assert_array_equal(found[0][0][r : r + 1], call(x[r : r + 1], logits[r : r + 1], up, down, 2, renormalise=True))
    counts = np.array([30, 0, 1, 14, 40, 5])
    y = ops.grouped_linear(x, up, counts)
    for e, end in enumerate(np.cumsum(counts)):
        part = slice(end - counts[e], end)
        np.testing.assert_array_equal(y[part], ops.linear(x[part], up[e]))


def test_list_of_experts():
    """Gradients of single matrices are those of the stack; bfloat16 experts are frozen and multiply as their float32 copies."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((21, 18), np.float32), rng.standard_normal((3, 10, 18), np.float32)
    counts, dy = np.array([9, 0, 12]), rng.standard_normal((21, 10), np.float32)
    xs, ws, whole = Tensor(x, requires_grad=True), [Tensor(m, requires_grad=True) for m in w], Tensor(w, requires_grad=True)
    ops.grouped_linear(xs, ws, counts, "silu").backward(dy)
    ops.grouped_linear(x, whole, counts, "silu").backward(dy)
    for e in range(3):
        np.testing.assert_array_equal(ws[e].grad, whole.grad[e])
    half = [m.astype(ml_dtypes.bfloat16) for m in w]
    xt = Tensor(x, requires_grad=True)
    y = ops.grouped_linear(xt, half, counts)
    np.testing.assert_array_equal(y.data, ops.grouped_linear(x, [m.astype(np.float32) for m in half], counts))
    y.backward(dy)
    want = np.concatenate([dy[:9] @ half[0].astype(np.float32), dy[9:] @ half[2].astype(np.float32)])
    np.testing.assert_allclose(xt.grad, want, rtol=1e-5, atol=1e-5)


def _losses(logits):
    routings = [ops.route(part, 2, renormalise=True) for part in logits]
    return ops.mixtral_load_balancing_loss(routings), ops.switch_load_balancing_loss(routings, 3), ops.router_z_loss(routings)


def test_auxiliary_losses():
    """Values from their definitions, written out; gradients against central differences (experts held by a wide margin)."""
    rng = np.random.default_rng(2)
    logits = [rng.standard_normal((12, 5), np.float32) for _ in range(2)]
    p = [np.exp(z.astype(np.float64)) for z in logits]
    p = [v / v.sum(1, keepdims=True) for v in p]
    top = [np.argsort(-v, axis=1)[:, :2] for v in p]
    one = [np.eye(5)[t] for t in top]  # (R, k, E)
    mixtral = 5 * (np.concatenate(one).sum(1).mean(0) * np.concatenate(p).mean(0)).sum()
    first = np.concatenate([o[:, 0].reshape(3, 4, 5) for o in one], axis=1)
    switch = 25 * (first.mean(1) * np.concatenate([v.reshape(3, 4, 5) for v in p], axis=1).mean(1)).mean()
    z = np.mean(np.square(np.log(np.exp(np.concatenate(logits).astype(np.float64)).sum(1))))
    got = _losses(logits)
    np.testing.assert_allclose([float(v) for v in got], [mixtral, switch, z], rtol=1e-6)
    for number, wanted in enumerate(("mixtral", "switch", "z")):
        tensors = [Tensor(v, requires_grad=True) for v in logits]
        _losses(tensors)[number].backward()
        for layer, r, e in ((0, 3, 2), (1, 11, 0), (1, 5, 4)):
            h, sides = 1e-2, []
            for sign in (1, -1):
                moved = [v.copy() for v in logits]
                moved[layer][r, e] += sign * h
                routings = [ops.route(v, 2) for v in moved]
                assert all((a.experts == t).all() for a, t in zip(routings, top, strict=True))
                sides.append(float(_losses(moved)[number]))
            assert tensors[layer].grad[r, e] == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=3e-5), wanted


def test_even_load_is_the_minimum():
    logits = np.full((8, 4), -20, np.float32)
    logits[np.arange(8), np.arange(8) % 4] = 0
    logits[np.arange(8), (np.arange(8) + 1) % 4] = -1e-3
    mixtral, switch, _ = _losses_of(logits)
    assert mixtral == pytest.approx(2, abs=1e-5)
    assert switch == pytest.approx(1, abs=1e-5)


def _losses_of(logits):
    routing = [ops.route(logits, 2)]
    return [float(f(routing)) for f in (ops.mixtral_load_balancing_loss, ops.switch_load_balancing_loss, ops.router_z_loss)]


def test_refuses():
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"\[route\] k must be an integer from 1 to the number of experts, 3, got 4"):
        ops.route(x, 4)
    with pytest.raises(ValueError, match=r"\[route\] capacity must be None or an integer of at least 1, got 0"):
        ops.route(x, 1, capacity=0)
    with pytest.raises(ValueError, match=r"\[route\] groups must divide the number of rows, 4, got 3"):
        ops.route(x, 1, capacity=1, groups=3)
    with pytest.raises(ValueError, match=r"\[grouped_linear\] counts must be integers that add up to the rows of x, 4"):
        ops.grouped_linear(x, np.zeros((2, 5, 3), np.float32), [1, 2])
    with pytest.raises(ValueError, match=r"\[grouped_linear\] weights\[1\] must be \(N, K\) with K = 3, all alike, got \(5, 4\)"):
        ops.grouped_linear(x, [np.zeros((5, 3), np.float32), np.zeros((5, 4), np.float32)], [1, 3])
    with pytest.raises(TypeError, match=r"\[grouped_linear\] weights\[0\] must be float32, bfloat16, .* got float64"):
        ops.grouped_linear(x, [np.zeros((5, 3))], [4])
    wide = quantize(np.ones((5, 32), np.float32), "Q8_0").with_activations("int16")
    with pytest.raises(ValueError, match=r"\[grouped_linear\] weights\[0\] must have float32 or int8 activations, got int16"):
        ops.grouped_linear(np.zeros((4, 32), np.float32), [wide], [4])
    with pytest.raises(ValueError, match=r"\[dispatch\] x must be \(R, C\) = \(4, 3\), got \(5, 3\)"):
        ops.dispatch(np.zeros((5, 3), np.float32), ops.route(x, 1))
    with pytest.raises(ValueError, match=r"\[combine\] y must be \(P, C\) = \(4, 3\), got \(3, 3\)"):
        ops.combine(np.zeros((3, 3), np.float32), ops.route(x, 1))


@pytest.mark.parametrize("stacked", [True, False])
def test_grouped_gradients_are_written_then_added(stacked):
    """A gradient that is not there yet is assigned, zeros where an expert has no rows; a second one is added, also within one call."""
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((40, 24), np.float32), rng.standard_normal((40, 33), np.float32)
    w = rng.standard_normal((3, 33, 24), np.float32)
    counts = np.array([25, 0, 15])
    for _ in range(2):
        backend.empty((3, 33, 24))[...] = np.nan  # memory that is used again
    weights = Tensor(w, requires_grad=True) if stacked else [Tensor(m, requires_grad=True) for m in w]

    def gradient():
        return weights.grad if stacked else np.stack([m.grad for m in weights])

    ops.grouped_linear(x, weights, counts).backward(dy)
    once = gradient().copy()
    np.testing.assert_allclose(once, np.stack([dy[:25].T @ x[:25], np.zeros((33, 24)), dy[25:].T @ x[25:]]), atol=1e-4)
    assert not once[1].any()
    ops.grouped_linear(x, weights, counts).backward(dy)
    np.testing.assert_allclose(gradient(), 2 * once, rtol=1e-5, atol=1e-4)
    if not stacked:
        m = Tensor(w[0], requires_grad=True)
        ops.grouped_linear(x, [m, m, m], counts).backward(dy)
        np.testing.assert_allclose(m.grad, dy.T @ x, atol=1e-4)


def test_experts_that_are_one_matrix(threads):
    """Its gradient has the bits that its runs give one after the other, however many threads there are."""
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((320, 64), np.float32), rng.standard_normal((320, 96), np.float32)
    shared, alone = (Tensor(np.ones((96, 64), np.float32), requires_grad=True) for _ in range(2))
    counts = np.full(16, 20)
    for part in range(16):
        rows = slice(20 * part, 20 * part + 20)
        ops.linear(x[rows], alone).backward(dy[rows])
    _C.set_num_threads(3)
    for _ in range(5):
        shared.grad = None
        ops.grouped_linear(x, [shared] * 16, counts).backward(dy)
        np.testing.assert_array_equal(shared.grad, alone.grad)
