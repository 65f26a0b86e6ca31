from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, nn, ops
from fastlm.checkpoint.quantized import quantize
from fastlm.kernels.fast_inner_product import fast_inner_product_ref as ref
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_oracle, rng

CASES = pytest.mark.parametrize("case", cases("fast_inner_product"), ids=case_id)
here = pytest.mark.skipif(not _C.has_fast_inner_product(), reason="this processor does not add beside its multiply-adds")


def fast(x, weight, *rest, **more):
    return ops.linear(x, weight, *rest, fast=True, **more)


def within(got, x, weight):
    """The bound that a chain of multiply-adds keeps."""
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    assert got.dtype == np.float32
    assert np.all(np.abs(got - exact) <= bound(x, weight.T) + np.spacing(np.abs(exact).astype(np.float32)))


@CASES
def test_forward(isa, case):
    inputs = ref.inputs(case, rng(case))
    within(fast(**inputs), **inputs)


@pytest.mark.parametrize("case", [c for c in cases("fast_inner_product") if c["rows"] <= 9], ids=case_id)
def test_oracle(case):
    """Gradients of the oracle against central differences; and that the identity is one."""
    check_oracle("fast_inner_product", case)
    inputs = ref.inputs(case, rng(case))
    exact = inputs["x"].astype(np.float64) @ inputs["weight"].astype(np.float64).T
    np.testing.assert_allclose(ref.pairs(**inputs), exact, rtol=0, atol=1e-12 * case["in"])


@CASES
def test_backward(isa, case):
    """The bits of the gradients without `fast`, for the same output gradient."""
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    dy = generator.standard_normal((case["rows"], case["out"])).astype(np.float32)
    grads = []
    for how in (True, False):
        x, w = Tensor(inputs["x"], requires_grad=True), Tensor(inputs["weight"].copy(), requires_grad=True)
        y = ops.linear(x, w, fast=how)
        np.testing.assert_array_equal(y.data, ops.linear(inputs["x"], inputs["weight"], fast=how))
        y.backward(dy)
        grads.append((x.grad, w.grad))
    for got, expected in zip(*grads, strict=True):
        np.testing.assert_array_equal(got, expected)


@here
def test_it_is_another_product():
    """What these tests hold is not `matmul` under another name."""
    case = {"rows": 20, "out": 64, "in": 768}
    inputs = ref.inputs(case, rng(case))
    assert not np.array_equal(fast(**inputs), ops.linear(**inputs))


@here
@pytest.mark.parametrize("K", [48, 384, 768, 3072])
def test_as_exact_as_a_chain(K):
    """At every size of x, and with columns far larger than the others, as BERT has them: at most a quarter more."""
    generator = np.random.default_rng(K)
    x, w = generator.standard_normal((256, K)).astype(np.float32), generator.standard_normal((200, K)).astype(np.float32)
    x[:, ::97] *= 20
    x *= np.exp2(generator.integers(-60, 60, (256, 1))).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    size = np.sqrt(np.square(exact).mean(axis=1, keepdims=True))
    error, chain = (np.sqrt(np.square((y - exact) / size).mean()) for y in (fast(x, w), ops.linear(x, w)))
    assert error <= 1.25 * chain


def test_what_is_exact(isa):
    """Small integers, powers of two, zeros; a row of zeros gives zeros whatever W is."""
    generator = np.random.default_rng(0)
    for rows, out, K in ((1, 5, 16), (9, 40, 200), (130, 33, 1100)):
        x, w = (generator.integers(-8, 9, shape).astype(np.float32) for shape in ((rows, K), (out, K)))
        np.testing.assert_array_equal(fast(x, w), x @ w.T)
        np.testing.assert_array_equal(fast(np.float32(2**-70) * x, w), np.float32(2**-70) * (x @ w.T))
        x[rows // 2] = 0
        w = generator.standard_normal(w.shape).astype(np.float32)
        assert not fast(x, w)[rows // 2].any()
        np.testing.assert_array_equal(fast(x, w, np.ones(out, np.float32))[rows // 2], 1)


def test_sizes_at_the_edges_of_float32(isa):
    generator = np.random.default_rng(1)
    x, w = generator.standard_normal((20, 64)).astype(np.float32), generator.standard_normal((30, 64)).astype(np.float32)
    for size in (1e-37, 1e-30, 1e30, 1e35):
        scaled = (x * np.float32(size)).astype(np.float32)
        within(fast(scaled, w), scaled, w)


def test_infinity_and_nan_stay_in_their_row(isa):
    generator = np.random.default_rng(2)
    x, w = generator.standard_normal((40, 96)).astype(np.float32), generator.standard_normal((50, 96)).astype(np.float32)
    expected = fast(x, w)
    for bad in (np.inf, -np.inf, np.nan):
        for k in (0, 2, 95):
            worse = x.copy()
            worse[7, k] = bad
            got = fast(worse, w)
            assert not np.isfinite(got[7]).any()
            np.testing.assert_array_equal(np.delete(got, 7, 0), np.delete(expected, 7, 0))


def test_rows_alone_in_batches_and_threads(isa, threads):
    """Every way through the kernel gives a row the same bits: few rows and many, on one thread and three, together with others."""
    generator = np.random.default_rng(3)
    for M, N, K in ((3, 70, 40), (10, 614, 1536), (16, 759, 1400), (70, 300, 384), (150, 90, 768), (400, 65, 200), (790, 40, 48)):
        x, w = generator.standard_normal((M, K)).astype(np.float32), generator.standard_normal((N, K)).astype(np.float32)
        bias, residual = generator.standard_normal(N).astype(np.float32), generator.standard_normal((M, N)).astype(np.float32)
        _C.set_num_threads(1)
        y = fast(x, w, bias, "gelu", residual)
        z = fast(x, w)
        active = np.empty_like(z)
        _C.linear_activation(active, z + bias, 1)
        np.testing.assert_array_equal(y, active + residual)
        for n in (2, 3):
            _C.set_num_threads(n)
            for _ in range(3):
                np.testing.assert_array_equal(fast(x, w, bias, "gelu", residual), y)
                for a, b in ((0, 1), (M // 2, M // 2 + 7), (1, M)):
                    part = slice(a, min(b, M))
                    np.testing.assert_array_equal(fast(x[part], w, bias, "gelu", residual[part]), y[part])
            together = ops.linears(x, [w, 2 * w, w[:5]], [bias, None, None], fast=True)
            for got, expected in zip(together, (fast(x, w, bias), fast(x, 2 * w), z[:, :5]), strict=True):
                np.testing.assert_array_equal(got, expected)


def test_weights_that_stand_for_float32(isa):
    """LOSSLESS, and blocks with float32 activations: the bits of their plain copy."""
    generator = np.random.default_rng(4)
    w = (0.04 * generator.standard_normal((48, 64))).astype(np.float32)
    for rows in (1, 5, 40):
        x = generator.standard_normal((rows, 64)).astype(np.float32)
        for kind in ("LOSSLESS", "Q8_0", "Q4_0"):
            q = quantize(w, kind)
            plain = fast(x, q.dequantize())
            np.testing.assert_array_equal(fast(x, q), plain)
            for y in ops.linears(x, [q, q], fast=True):
                np.testing.assert_array_equal(y, plain)
        int8 = quantize(w, "Q8_0").with_activations("int8")
        np.testing.assert_array_equal(fast(x, int8), ops.linear(x, int8))


def test_make_fast():
    """Every Linear within a part, and none beside."""

    class Part(nn.Module):
        def __init__(self):
            self.mlp, self.other = nn.MLP(4, 8), [nn.Linear(4, 4)]

    part, beside = Part(), nn.Linear(4, 4)
    nn.make_fast(part)
    assert part.mlp.up.fast
    assert part.mlp.down.fast
    assert part.other[0].fast
    assert not beside.fast
    assert not nn.Linear.fast
