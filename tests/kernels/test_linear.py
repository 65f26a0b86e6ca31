from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.kernels.linear import linear_ref as ref
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_oracle, put_all, rng, taken, widen

CASES = pytest.mark.parametrize("case", cases("linear"), ids=case_id)
SLOPE = 1.13  # the largest |act'|: gelu's


def assert_within(got: np.ndarray, exact: np.ndarray, naive: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """Twice the error of naive NumPy, one ulp, and the norm-wise bound of a chain of multiply-adds (see `matmul_ref.bound`)."""
    assert got.dtype == np.float32
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    error = np.abs(got - exact)
    allowed = bound + 2 * np.max(np.abs(naive - exact), initial=0.0) + np.spacing(np.abs(exact).astype(np.float32))
    assert np.all(error <= allowed), f"{what}: error is {np.max(error / allowed):.3g} times what is allowed"


def check_on_device(case, put=None):
    """Forward; with `put` on the device that it brings arrays to."""
    inputs = ref.inputs(case, rng(case))
    got = taken(ops.linear(**put_all(inputs, put)))
    chain = SLOPE * bound(np.atleast_2d(inputs["x"]), inputs["weight"].T).reshape(got.shape)
    assert_within(got, ref.forward(**widen(inputs)), ref.forward(**inputs), chain, case_id(case))


def check_backward_on_device(case, put=None):
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    frozen = case.get("weight") == "bfloat16"
    tensors = {
        k: Tensor(v, requires_grad=not (frozen and k == "weight")) if isinstance(inputs[k], np.ndarray) else v
        for k, v in put_all(inputs, put).items()
    }
    y = ops.linear(**tensors)
    dy = generator.standard_normal(y.shape).astype(np.float32)
    y.backward(dy if put is None else put(dy))
    exact, naive = ref.backward(dy.astype(np.float64), **widen(inputs)), ref.backward(dy, **inputs)
    N, K = inputs["weight"].shape
    R = math.prod(inputs["x"].shape[:-1])
    rows, x = SLOPE * np.abs(dy).reshape(R, N), inputs["x"].reshape(R, K)
    chains = {"x": bound(rows, inputs["weight"]).reshape(inputs["x"].shape), "weight": bound(rows.T, x), "residual": 0.0}
    chains["bias"] = bound(rows.T, np.ones((len(rows), 1)))[:, 0]
    for name in ("x", "bias", "residual") if frozen else exact:
        if inputs[name] is not None:
            assert_within(taken(tensors[name].grad), exact[name], naive[name], chains[name], f"gradient of {name}")
    if frozen:
        assert tensors["weight"].grad is None


@CASES
def test_forward(isa, case):
    check_on_device(case)


@CASES
def test_backward(isa, case):
    check_backward_on_device(case)


@pytest.mark.parametrize("case", [c for c in cases("linear") if "weight" not in c], ids=case_id)
def test_oracle(case):
    if case.get("activation") == "relu":
        pytest.skip("relu has a corner that a central difference may straddle")
    check_oracle("linear", case)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
def test_row_alone_and_in_batch(isa, threads, activation):
    """Bits depend neither on the batch nor on the threads, in the forward pass, nor on the threads in the backward pass."""
    g = np.random.default_rng(0)
    x, w, b, r = (g.standard_normal(s).astype(np.float32) for s in [(130, 600), (257, 600), (257,), (130, 257)])
    dy = g.standard_normal((130, 257)).astype(np.float32)
    whole = ops.linear(x, w, b, activation, r)
    np.testing.assert_array_equal(ops.linear(x[64:65], w, b, activation, r[64:65]), whole[64:65])
    grads = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.linear(x[:65], w, b, activation, r[:65]), whole[:65])
        leaves = [Tensor(v, requires_grad=True) for v in (x, w, b, r)]
        y = ops.linear(leaves[0], leaves[1], leaves[2], activation, leaves[3])
        np.testing.assert_array_equal(y.data, whole)
        y.backward(dy)
        grads.append([leaf.grad for leaf in leaves])
    for got in grads[1:]:
        for a, b in zip(got, grads[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("M", [1, 2, 4, 5, 8, 9, 12, 13, 70])
@pytest.mark.parametrize("shape", [(51, 77), (100, 64), (16, 130), (131, 1055)])
def test_narrow_weight_is_its_float32_copy(isa, M, dtype, shape):
    g = np.random.default_rng(1)
    x, w = g.standard_normal((M, shape[1]), np.float32), g.standard_normal(shape, np.float32).astype(dtype)
    np.testing.assert_array_equal(ops.linear(x, w), ops.linear(x, w.astype(np.float32)))


def test_few_rows_are_rows_of_many(isa):
    """Every number of rows up to beyond what is multiplied without a store, with columns and depths around whole tiles."""
    g = np.random.default_rng(7)
    for N, K in [(15, 31), (16, 32), (33, 63), (47, 64), (65, 97)]:
        x, w, b = g.standard_normal((30, K), np.float32), g.standard_normal((N, K), np.float32), g.standard_normal(N, np.float32)
        whole = ops.linear(x, w, b)
        np.testing.assert_array_equal(whole, ops.matmul(x, np.ascontiguousarray(w.T)) + b)
        for M in range(1, 16):
            np.testing.assert_array_equal(ops.linear(x[:M], w, b), whole[:M])


def test_frozen_weight_gives_gradient_to_x(isa):
    g = np.random.default_rng(2)
    x, w = Tensor(g.standard_normal((9, 77), np.float32), requires_grad=True), g.standard_normal((51, 77), np.float32)
    frozen = w.astype(ml_dtypes.bfloat16)
    dy = g.standard_normal((9, 51), np.float32)
    ops.linear(x, frozen).backward(dy)
    np.testing.assert_array_equal(x.grad, ops.matmul(dy, frozen.astype(np.float32)))


def test_not_finite(isa):
    x, w = np.ones((20, 33), np.float32), np.ones((40, 33), np.float32)
    clean = ops.linear(x, w, activation="silu")
    x[3, 5], x[17, 0] = np.inf, np.nan
    for activation in (None, "gelu", "gelu_tanh", "silu", "relu"):
        y = ops.linear(x, w, activation=activation)
        assert np.isposinf(y[3]).all(), activation
        assert np.isnan(y[17]).all(), activation
    np.testing.assert_array_equal(ops.linear(x, w, activation="silu")[4:17], clean[4:17])


def test_refuses():
    x, w = np.zeros((4, 128, 768), np.float32), np.zeros((50, 768), np.float32)
    with pytest.raises(
        ValueError, match=r"\[linear\] weight must be \(out, in\) with in = 768, got \(768, 50\)\. x is \(4, 128, 768\)\."
    ):
        ops.linear(x, w.T.copy())
    with pytest.raises(ValueError, match=r"\[linear\] bias must be \(out,\) = \(50,\), got \(768,\)\."):
        ops.linear(x, w, np.zeros(768, np.float32))
    with pytest.raises(ValueError, match=r"\[linear\] residual must be \(\.\.\., out\) = \(4, 128, 50\), got \(4, 50\)\."):
        ops.linear(x, w, residual=np.zeros((4, 50), np.float32))
    with pytest.raises(ValueError, match=r"\[linear\] activation must be one of None, 'gelu', .*, got 'swish'"):
        ops.linear(x, w, activation="swish")
    with pytest.raises(TypeError, match=r"\[linear\] weight must be float32, bfloat16 or float16, got float64"):
        ops.linear(x, w.astype(np.float64))
