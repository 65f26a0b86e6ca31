from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.kernels.matmul import matmul_ref as ref
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_oracle, put_all, rng, taken, widen

CASES = pytest.mark.parametrize("case", cases("matmul"), ids=case_id)


def assert_within(got: np.ndarray, exact: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """The norm-wise bound of a chain of multiply-adds (see `matmul_ref.bound`) plus one ulp."""
    assert got.dtype == np.float32
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    error = np.abs(got - exact)
    allowed = bound + np.spacing(np.abs(exact).astype(np.float32))
    assert np.all(error <= allowed), f"{what}: error is {np.max(error / allowed):.3g} times what is allowed"


def check_on_device(case, put=None):
    """Forward; with `put` on the device that it brings arrays to."""
    inputs = ref.inputs(case, rng(case))
    got = taken(ops.matmul(**put_all(inputs, put)))
    assert_within(got, ref.forward(**widen(inputs)), ref.bound(**inputs), case_id(case))


def check_backward_on_device(case, put=None):
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    a, b = (Tensor(x, requires_grad=True) for x in put_all(inputs, put).values())
    y = ops.matmul(a, b)
    dy = generator.standard_normal(y.shape).astype(np.float32)
    y.backward(dy if put is None else put(dy))
    exact = ref.backward(dy.astype(np.float64), **widen(inputs))
    swap = {k: np.swapaxes(v, -1, -2) for k, v in inputs.items()}
    assert_within(taken(a.grad), exact["a"], ref.bound(dy, swap["b"]), "gradient of a")
    at, d = swap["a"], dy
    if b.ndim == 2:
        rows = int(np.prod(a.shape[:-1]))
        at, d = inputs["a"].reshape(rows, a.shape[-1]).T, dy.reshape(rows, dy.shape[-1])
    assert_within(taken(b.grad), exact["b"], ref.bound(at, d), "gradient of b")


@CASES
def test_forward(isa, case):
    check_on_device(case)


@CASES
def test_backward(isa, case):
    check_backward_on_device(case)


@CASES
def test_oracle(case):
    check_oracle("matmul", case)


def chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The contract, word for word: one fused multiply-add after the other. The product of two float32 is exact in float64."""
    c = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        exact = a[:, k, None].astype(np.longdouble) * b[None, k].astype(np.longdouble) + c.astype(np.longdouble)
        c = exact.astype(np.float32)
    return c


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="needs an extended type to write a fused multiply-add in NumPy")
@pytest.mark.parametrize("shape", [(1, 40, 33), (3, 1100, 50), (40, 700, 65)])
def test_is_one_chain(isa, shape):
    if isa == "scalar":
        pytest.skip("the portable rung has no fused multiply-add")
    M, K, N = shape
    g = np.random.default_rng(1)
    a, b = g.standard_normal((M, K), np.float32), g.standard_normal((K, N), np.float32)
    np.testing.assert_array_equal(ops.matmul(a, b), chain(a, b))


@pytest.mark.parametrize("K", [1, 33, 768, 1023, 1024, 1030])  # rows that are about a page apart are copied
def test_row_alone_and_in_batch(isa, threads, K):
    """The same row, the same bits: for any number of rows, any number of threads, the weight as it lies or transposed."""
    g = np.random.default_rng(2)
    a, b = g.standard_normal((200, K), np.float32), g.standard_normal((K, 333), np.float32)
    bt = np.ascontiguousarray(b.T)
    whole = ops.matmul(a, b)
    for M in (1, 2, 3, 4, 5, 14, 15, 64, 200):
        for n in (1, 2, 3):
            _C.set_num_threads(n)
            np.testing.assert_array_equal(ops.matmul(a[:M], b), whole[:M])
            np.testing.assert_array_equal(ops.linear(a[:M], bt), whole[:M])
    np.testing.assert_array_equal(ops.matmul(a[100:110], b[:, 7:40]), whole[100:110, 7:40])


@pytest.mark.parametrize("K", [3000, 3072])
def test_many_long_rows(isa, threads, K):
    """More of A than is packed at once, rows that are read where they lie and rows that are copied."""
    g = np.random.default_rng(12)
    a, b = g.standard_normal((710, K), np.float32), g.standard_normal((K, 70), np.float32)
    picked = [0, 13, 14, 399, 709]
    expected = ops.matmul(a[picked], b)
    for n in (1, 2):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.matmul(a, b)[picked], expected)
        np.testing.assert_array_equal(ops.matmul(a[:, 8:], b[8:])[picked], ops.matmul(a[picked, 8:], b[8:]))


@pytest.mark.parametrize("shape", [(16, 64, 16), (5, 17, 33), (1, 64, 64), (9, 33, 100), (30, 128, 31), (64, 64, 64), (64, 64, 65)])
def test_small_products_of_a_batch(isa, threads, shape):
    """Small matrices are multiplied as they lie: alone, in a batch, on any number of threads the bits are those of a row of many."""
    M, K, N = shape
    g = np.random.default_rng(8)
    a, b = g.standard_normal((40, M, K), np.float32), g.standard_normal((40, K, N), np.float32)
    many = np.concatenate([a.reshape(-1, K), g.standard_normal((4200 // K + 13, K), np.float32)])  # too many to count as small
    expected = np.stack([ops.matmul(many, b[i])[i * M : (i + 1) * M] for i in range(40)])
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.matmul(a, b), expected)
        np.testing.assert_array_equal(ops.matmul(a[:1], b[:1]), expected[:1])


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_transpose_of_a_product(isa, threads, activation):
    """Few rows times a weight are made as the transpose: at edges of tiles and panels, with bias and residual, the bits of rows of many."""
    g = np.random.default_rng(13)
    for N in (13, 15, 29, 96, 451):
        K = 777
        x, w = g.standard_normal((120, K), np.float32), g.standard_normal((N, K), np.float32)
        bias, residual = g.standard_normal(N, np.float32), g.standard_normal((120, N), np.float32)
        whole = ops.linear(x, w, bias, activation=activation, residual=residual)
        for M in (13, 16, 31, 33, 64, 97):
            for n in (1, 3):
                _C.set_num_threads(n)
                got = ops.linear(x[:M], w, bias, activation=activation, residual=residual[:M])
                np.testing.assert_array_equal(got, whole[:M])
                np.testing.assert_array_equal(ops.linear(x[:M], w), ops.linear(x, w)[:M])
                np.testing.assert_array_equal(ops.matmul(x[:M], w.T.copy()), ops.linear(x, w)[:M])
        few, many = (Tensor(x[:M], requires_grad=True) for M in (50, 120))
        for t in (few, many):
            ops.linear(t, w, bias, activation=activation, residual=residual[: t.shape[0]]).backward(residual[: t.shape[0]])
        np.testing.assert_array_equal(taken(few.grad), taken(many.grad)[:50])


def test_few_rows_are_rows_of_many(isa):
    """B as it lies, with widths around what is multiplied at once."""
    g = np.random.default_rng(9)
    for N, K in [(7, 600), (16, 900), (49, 300), (128, 130), (200, 513)]:
        a, b = g.standard_normal((40, K), np.float32), g.standard_normal((K, N), np.float32)
        whole = ops.matmul(a, b)
        for M in range(1, 16):
            np.testing.assert_array_equal(ops.matmul(a[:M], b), whole[:M])


def test_same_bits_on_every_instruction_set():
    g = np.random.default_rng(3)
    a, b = g.standard_normal((37, 600), np.float32), g.standard_normal((600, 77), np.float32)
    before, results = _C.isa(), []
    for name in _C.isas():
        if name != "scalar":
            _C.set_isa(name)
            results.append(ops.matmul(a, b))
    _C.set_isa(before)
    for r in results[1:]:
        np.testing.assert_array_equal(r, results[0])


def test_gradient_goes_on_from_the_buffer(isa):
    """Two halves of a batch, one after the other, give the gradient the bits of the whole batch."""
    g = np.random.default_rng(4)
    a, b = g.standard_normal((90, 31), np.float32), g.standard_normal((31, 45), np.float32)
    dy = g.standard_normal((90, 45), np.float32)
    whole, halves = Tensor(b, requires_grad=True), Tensor(b, requires_grad=True)
    ops.matmul(a, whole).backward(dy)
    for rows in (slice(0, 41), slice(41, 90)):
        ops.matmul(a[rows], halves).backward(dy[rows])
    np.testing.assert_array_equal(whole.grad, halves.grad)
    given = Tensor(b, requires_grad=True)
    given.grad = np.ones_like(b)
    ops.matmul(a, given).backward(dy)
    np.testing.assert_allclose(given.grad, whole.grad + 1, rtol=0, atol=1e-4)


def test_blocks_larger_than_one(isa, monkeypatch):
    """More rows and more depth than are packed at once."""
    g = np.random.default_rng(5)
    for M, K, N in [(2500, 20, 5), (2, 9000, 3), (600, 7300, 2)]:
        a, b = g.standard_normal((M, K), np.float32), g.standard_normal((K, N), np.float32)
        whole = ops.matmul(a, b)
        assert_within(whole, ref.forward(a.astype(np.float64), b), ref.bound(a, b), f"{M}, {K}, {N}")
        np.testing.assert_array_equal(ops.matmul(a[:1], b), whole[:1])
        np.testing.assert_array_equal(ops.linear(a[-20:], np.ascontiguousarray(b.T)), whole[-20:])


def test_not_finite(isa):
    """inf and nan reach the elements that they belong to and no other."""
    g = np.random.default_rng(6)
    a, b = g.standard_normal((20, 33), np.float32), g.standard_normal((33, 40), np.float32)
    clean = ops.matmul(a, b)
    a[3, 5], a[17, 0] = np.inf, np.nan
    y = ops.matmul(a, b)
    assert np.isinf(y[3]).all()
    assert np.isnan(y[17]).all()
    others = np.delete(np.arange(20), [3, 17])
    np.testing.assert_array_equal(y[others], clean[others])


def test_refuses():
    a = np.zeros((2, 3, 4), np.float32)

    def refused(error: type[Exception], message: str, *args: Any) -> None:
        with pytest.raises(error, match=message):
            ops.matmul(*args)

    refused(
        ValueError, r"\[matmul\] b must be \(K, N\) = \(4, 6\), got \(5, 6\)\. a is \(2, 3, 4\)\.", a, np.zeros((5, 6), np.float32)
    )
    refused(ValueError, r"\[matmul\] b must be \(\.\.\., K, N\) = \(2, 4, 6\), got \(3, 4, 6\)", a, np.zeros((3, 4, 6), np.float32))
    refused(ValueError, r"\[matmul\] b must have at least 2 axes, got shape \(4,\)\.", a, np.zeros(4, np.float32))
    refused(TypeError, r"\[matmul\] a must be float32, got float64", a.astype(np.float64), np.zeros((4, 6), np.float32))
