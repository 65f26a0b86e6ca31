from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.checkpoint.quantized import QuantizedArray
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.ops.linear_cross_entropy import chunk_rows
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_forward, check_oracle, oracle, rng, widen

REF = oracle("linear_cross_entropy")
ALL = cases("linear_cross_entropy")
FLOAT32 = [c for c in ALL if "weight" not in c]


@pytest.mark.parametrize("case", ALL, ids=case_id)
def test_forward(isa, case):
    check_forward("linear_cross_entropy", ops.linear_cross_entropy, case)


@pytest.mark.parametrize("case", FLOAT32, ids=case_id)
def test_backward(isa, case):
    """Twice the error of naive NumPy, one ulp, and the norm-wise bound of the chains of multiply-adds, as for `linear`."""
    generator = rng(case)
    inputs = REF.inputs(case, generator)
    dy = np.array(generator.standard_normal(), np.float32)
    tensors = {k: Tensor(v, requires_grad=True) if k in REF.GRADIENTS else v for k, v in inputs.items()}
    ops.linear_cross_entropy(**tensors).backward(dy)
    exact, naive = REF.backward(dy.astype(np.float64), **widen(inputs)), REF.backward(dy, **inputs)
    logits = REF.dlogits(dy, **inputs).reshape(-1, case["V"])
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1])
    chains = {"x": bound(logits, inputs["weight"]).reshape(inputs["x"].shape), "weight": bound(logits.T, x)}
    for name, chain in chains.items():
        got = tensors[name].grad
        assert got.dtype == np.float32
        assert got.shape == exact[name].shape
        error = np.abs(got - exact[name])
        allowed = (
            chain + 2 * np.max(np.abs(naive[name] - exact[name]), initial=0.0) + np.spacing(np.abs(exact[name]).astype(np.float32))
        )
        assert np.all(error <= allowed), f"gradient of {name}: error is {np.max(error / allowed):.3g} times what is allowed"


@pytest.mark.parametrize("case", FLOAT32, ids=case_id)
def test_oracle(case):
    check_oracle("linear_cross_entropy", case)


def problem(R, C, V, ignored=0):
    rng = np.random.default_rng(R)
    x, w = rng.standard_normal((R, C)).astype(np.float32), rng.standard_normal((V, C)).astype(np.float32)
    targets = rng.integers(0, V, R)
    targets[rng.permutation(R)[:ignored]] = -100
    return x, w, targets


@pytest.mark.parametrize("ignored", [0, 100])
def test_equals_the_unfused_form(isa, ignored):
    """The same bits as linear and cross_entropy, which hold all logits: loss and dx, and dW as one chain over the rows."""
    x, w, targets = problem(400, 24, 3333, ignored)  # several chunks
    fused = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
    loss = ops.linear_cross_entropy(*fused, targets)
    loss.backward()
    plain = [Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)]
    expected = ops.cross_entropy(ops.linear(*plain), targets)
    expected.backward()
    assert loss.data.tobytes() == expected.data.tobytes()
    np.testing.assert_array_equal(fused[0].grad, plain[0].grad)
    np.testing.assert_array_equal(fused[1].grad, plain[1].grad)


def test_a_large_vocabulary_is_summed_in_pieces(isa):
    """One chain over 50257 is off by 1.1e-5 of dx's largest element here."""
    inputs = REF.inputs({"x": (4, 16), "V": 50257}, np.random.default_rng(0))
    x = Tensor(inputs["x"], requires_grad=True)
    ops.linear_cross_entropy(x, inputs["weight"], inputs["targets"]).backward()
    exact = REF.backward(np.float64(1), **widen(inputs))["x"]
    assert np.abs(x.grad - exact).max() <= 4e-6 * np.abs(exact).max()


def live_bytes(monkeypatch):
    """Counts the bytes of arrays from backend.empty that are alive; returns a function that gives the peak."""
    now, peak, make = [0], [0], backend.empty

    def counted(shape, dtype=np.float32, like=None):
        array = make(shape, dtype, like=like)
        size = array.nbytes
        now[0] += size
        peak[0] = max(peak[0], now[0])
        weakref.finalize(array, lambda: now.__setitem__(0, now[0] - size))
        return array

    monkeypatch.setattr(backend, "empty", counted)
    return lambda: peak[0]


def test_peak_memory(monkeypatch):
    """At most a fifth of the unfused form, gradients of the parameters included."""
    x, w, targets = problem(1024, 32, 2048)
    peaks = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            peak = live_bytes(patch)
            xt, wt = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
            loss = ops.linear_cross_entropy(xt, wt, targets) if fused else ops.cross_entropy(ops.linear(xt, wt), targets)
            loss.backward()
            peaks.append(peak())
    assert peaks[1] > 2 * 1024 * 2048 * 4
    assert peaks[0] <= peaks[1] / 5
    assert [chunk_rows(n, 50257) for n in (1, 320, 600, 1024, 100000)] == [64, 64, 120, 208, 256]


def test_gradients_add_up_and_scale():
    """A leaf's second gradient is added to its first; backward(dy) scales both."""
    x, w, targets = problem(70, 8, 50)
    once = Tensor(w, requires_grad=True)
    ops.linear_cross_entropy(x, once, targets).backward()
    first = once.grad.copy()
    ops.linear_cross_entropy(x, once, targets).backward(np.array(3, np.float32))
    np.testing.assert_allclose(once.grad, 4 * first, rtol=1e-6, atol=1e-9)
    inner = Tensor(w, requires_grad=True)
    ops.linear_cross_entropy(x, ops.scale(inner, 2.0), targets).backward()
    doubled = Tensor(2 * w, requires_grad=True)
    ops.linear_cross_entropy(x, doubled, targets).backward()
    np.testing.assert_allclose(inner.grad, 2 * doubled.grad, rtol=1e-6, atol=1e-9)


def test_ignored_rows_may_hold_anything():
    x, w, targets = problem(20, 8, 50, ignored=5)
    clean = ops.linear_cross_entropy(x, w, targets)
    x[targets == -100] = np.nan
    t = Tensor(x, requires_grad=True)
    loss = ops.linear_cross_entropy(t, w, targets)
    loss.backward()
    assert loss.item() == clean
    assert (t.grad[targets == -100] == 0).all()
    assert np.isfinite(t.grad).all()


def test_frozen_weight():
    """bfloat16 and quantised weights: the gradient of x is that of their float32 copies, and the weight has none."""
    rng = np.random.default_rng(3)
    x, _, targets = problem(30, 64, 40)
    blocks = rng.integers(0, 256, (40, 2, 34)).astype(np.uint8)
    blocks[:, :, :2] = np.full((40, 2), 0.01, np.float16).view(np.uint8).reshape(40, 1, -1)[:, :, :2]
    quantised = QuantizedArray("Q8_0", (40, 64), blocks.reshape(40, -1))
    half = problem(40, 64, 40)[1].astype(ml_dtypes.bfloat16)
    for frozen, copy in ((quantised, quantised.dequantize()), (half, half.astype(np.float32))):
        a, b = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
        la, lb = ops.linear_cross_entropy(a, frozen, targets), ops.linear_cross_entropy(b, copy, targets)
        assert la.item() == lb.item()
        la.backward()
        lb.backward()
        np.testing.assert_array_equal(a.grad, b.grad)


def test_bits_over_threads(threads):
    x, w, targets = problem(300, 40, 3000)
    results = []
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        xt, wt = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
        loss = ops.linear_cross_entropy(xt, wt, targets)
        loss.backward()
        results.append((loss.data.tobytes(), xt.grad.tobytes(), wt.grad.tobytes()))
    assert results[0] == results[1] == results[2]


def test_refuses():
    x, w = np.zeros((4, 8), np.float32), np.zeros((10, 8), np.float32)
    with pytest.raises(ValueError, match=r"\[linear_cross_entropy\] weight must be \(V, C\) with C = 8, got \(8, 10\)\. x is"):
        ops.linear_cross_entropy(x, w.T, np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"targets must be from 0 to 9 or ignore_index = -100, got 10 at \(1,\)"):
        ops.linear_cross_entropy(x, w, np.array([0, 10, 0, 0]))
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, got 'none'"):
        ops.linear_cross_entropy(x, w, np.zeros(4, np.int64), reduction="none")
    with pytest.raises(TypeError, match=r"weight must be float32, bfloat16 or float16, got float64"):
        ops.linear_cross_entropy(x, w.astype(np.float64), np.zeros(4, np.int64))
