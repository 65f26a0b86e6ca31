from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.checkpoint.quantized import QuantizedArray, quantize
from fastlm.kernels.int8_rows import int8_rows_ref as ref
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, rng

CASES = pytest.mark.parametrize("case", cases("int8_rows"), ids=case_id)


@pytest.fixture(params=[True, False], ids=["vnni", "plain"])
def vnni(request, isa):
    """Every instruction set, with and without dot products of bytes where the CPU has them."""
    _C.set_vnni(request.param)
    if request.param and not _C.has_vnni():
        _C.set_vnni(True)
        pytest.skip("no VNNI")
    yield
    _C.set_vnni(True)


def same_bits(got, want):
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got, want)  # zeros of either sign are equal, and so are all nan


@CASES
def test_forward(vnni, case):
    """The bits of the definition in NumPy, on every instruction set."""
    inputs = ref.inputs(case, rng(case))
    same_bits(ops.linear(**inputs), ref.forward(**inputs))


def test_largest_sums(vnni):
    """All codes at their ends, over the longest rows: the sums of 32 bits do not overflow, also where two of x are larger."""
    K = _C.int8_rows_depth
    for sign in (1, -1):
        blocks = np.full((3, K + 4), 127 * sign, np.int8).view(np.uint8)
        blocks[:, :4] = np.full((3, 1), 0.5, np.float32).view(np.uint8)
        weight = QuantizedArray("Q8_ROW", (3, K), blocks)
        x = np.ones((2, K), np.float32)
        x[1] = -1
        x[:, [5, K - 1]] *= 2
        same_bits(ops.linear(x, weight), ref.forward(x, weight))


def test_every_pair_of_codes(vnni):
    """Each code of the weight with each of x: nothing saturates."""
    q = np.arange(-127, 128)
    blocks = np.empty((255, 8 + 4), np.uint8)
    blocks[:, :4] = np.ones((255, 1), np.float32).view(np.uint8)
    blocks[:, 4:] = q[:, None].astype(np.int8).view(np.uint8)
    x = np.repeat(q[:, None], 8, 1).astype(np.float32)
    x[:, 0] = 127  # so that the scale is one
    x[:, 3], x[:, 6] = 1000, -2000  # codes beyond 8 bits
    y = ops.linear(x, QuantizedArray("Q8_ROW", (255, 8), blocks))
    np.testing.assert_array_equal(y, 5.0 * np.outer(q, q) + (127 + 1000 - 2000) * q)


def test_odd_rows(vnni):
    """A row with nan or inf is nan and alone in that; zeros give zero, and so does what is too small for a scale; ties go to even."""
    g = np.random.default_rng(6)
    weight, x = ref.random_weight((33, 100), g), g.standard_normal((9, 100), np.float32)
    x[1, 40], x[2, 99], x[3, 0] = np.nan, np.inf, -np.inf
    x[4] = 0
    x[5] = 1e-31
    x[6, ::2] = -0.0
    x[7, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]
    x[8, 7] = 1e34
    y = ops.linear(x, weight)
    assert np.isnan(y[1:4]).all()
    assert np.isfinite(y[[0, 4, 5, 6, 7, 8]]).all()
    assert not y[4].any()
    assert not y[5].any()
    same_bits(y, ref.forward(x, weight))


def test_alone_and_in_batch(vnni, threads):
    g = np.random.default_rng(7)
    weight, x = ref.random_weight((390, 1029), g), g.standard_normal((67, 1029), np.float32)
    whole = ops.linear(x, weight)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        same_bits(ops.linear(x, weight), whole)
        for M in range(1, 28):
            same_bits(ops.linear(x[:M], weight), whole[:M])


def test_epilogue_and_gradient(vnni):
    """Bias, activation and residual come after the sums; the gradient is that of the weights, straight through the rounding."""
    g = np.random.default_rng(0)
    weight = ref.random_weight((70, 510), g)
    x, b, r = (g.standard_normal(s).astype(np.float32) for s in [(2, 3, 510), (70,), (2, 3, 70)])
    for activation in (None, "gelu", "gelu_tanh", "silu", "relu"):
        z = ref.forward(x.reshape(-1, 510), weight) + b
        want = z.reshape(2, 3, 70)
        if activation:
            want = ops.activation(want, activation)
        np.testing.assert_allclose(ops.linear(x, weight, b, activation), want, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(ops.linear(x, weight, b, activation, r), want + r, rtol=2e-6, atol=2e-6)
    same_bits(ops.linear(x, weight, b, None, r), z.reshape(2, 3, 70) + r)
    xt = Tensor(x, requires_grad=True)
    y = ops.linear(xt, weight, b)
    same_bits(y.data.reshape(-1, 70), z)
    dy = g.standard_normal(y.shape).astype(np.float32)
    y.backward(dy)
    np.testing.assert_array_equal(xt.grad, ops.matmul(dy, weight.dequantize()))


def test_two_numbers_that_dwarf_the_rest(vnni):
    """They do not take the rest's bits; wherever they lie, also in one lane of a vector, equal, alone, or so large that theirs is all."""
    g = np.random.default_rng(11)
    w, x = g.standard_normal((64, 256)).astype(np.float32), g.standard_normal((20, 256), np.float32)
    weight = quantize(w, "Q8_ROW")
    x[:, 17], x[:, 200] = 300, -500
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    assert np.abs(ops.linear(x, weight) - exact).max() < 1.0, "one scale of 500 / 127 would err by ten times as much"
    for K in (37, 64, 100, 770):
        weight = ref.random_weight((33, K), g)
        x = g.standard_normal((97, K), np.float32)
        for row in x:
            places, kind = g.choice(K, 2, replace=False), g.integers(6)
            if kind == 0:
                places[1] = (places[0] + 16) % K
            size = 10 ** g.uniform(0.3, 5, 2)
            row[places] = g.choice([-1, 1], 2) * (size if kind != 1 else size[0])
            if kind == 2:
                row[places[1]] = 0
            if kind == 3:
                row[np.arange(K) != places[0]] = 0
        same_bits(ops.linear(x, weight), ref.forward(x, weight))
        same_bits(ops.linear(x[5:6], weight), ref.forward(x[5:6], weight))


def test_quantize():
    """One scale a row and one a column, codes at most half a step off; the columns even out what differs by column."""
    g = np.random.default_rng(1)
    w = g.standard_normal((40, 33)).astype(np.float32)
    w[:, 5] *= 50
    w[3], w[4] = 0, 1e-33
    found = quantize(w, "Q8_ROW")
    assert found.shape == (40, 33)
    assert found.nbytes == 40 * 37
    columns = found.columns
    error = np.abs(found.dequantize() - w) / columns
    assert (error <= np.abs(w / columns).max(1, keepdims=True) / 127 * 0.5001 + 1e-30).all()
    assert not found.dequantize()[3:5].any()
    np.testing.assert_array_equal(np.abs(found.blocks[:, 4:].view(np.int8)).max(1)[[0, 1, 2, 39]], 127)
    assert columns[5] == columns.max() > 4 * np.median(columns)
    np.testing.assert_array_equal(found.dequantize_rows([[5], [39]]), found.dequantize()[[[5], [39]]])
    np.testing.assert_array_equal(ops.embedding(np.array([1, 7], np.int32), found), found.dequantize()[[1, 7]])
    assert not quantize(np.zeros((3, 5), np.float32), "Q8_ROW").dequantize().any()
    w[7, 3] = np.inf
    with pytest.raises(ValueError, match="every number must be finite, row 7"):
        quantize(w, "Q8_ROW")


def test_error():
    """Near the product in float64: both roundings err by half a step, of a row's largest value over 127."""
    g = np.random.default_rng(8)
    w, x = g.standard_normal((256, 1024)).astype(np.float32), g.standard_normal((64, 1024), np.float32)
    exact = x.astype(np.float64) @ w.T
    error = ops.linear(x, quantize(w, "Q8_ROW")) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.012


def test_refuses():
    weight = ref.random_weight((40, 30), np.random.default_rng(9))
    assert weight.activations == "int8"
    assert pickle.loads(pickle.dumps(weight)).activations == "int8"
    assert repr(weight) == "QuantizedArray(Q8_ROW, (40, 30), 1360 bytes, int8 activations)"
    with pytest.raises(ValueError, match="Q8_ROW weights are multiplied with int8 activations alone, got 'float32'"):
        weight.with_activations("float32")
    with pytest.raises(ValueError, match=r"blocks must be \(rows, bytes of a row\) = \(40, 34\) for Q8_ROW"):
        QuantizedArray("Q8_ROW", (40, 30), np.zeros((40, 30), np.uint8))
    with pytest.raises(ValueError, match=r"in = 31, got \(40, 30\)"):
        ops.linear(np.ones((2, 31), np.float32), weight)
    with pytest.raises(ValueError, match=r"columns are for Q8_ROW, float32 of shape \(30,\), got \(40,\)"):
        QuantizedArray("Q8_ROW", (40, 30), weight.blocks, columns=np.ones(40, np.float32))
    K = _C.int8_rows_depth + 1
    with pytest.raises(ValueError, match="at most 131072 long, got 131073"):
        ops.linear(np.ones((1, K), np.float32), QuantizedArray("Q8_ROW", (1, K), np.zeros((1, K + 4), np.uint8)))
    with pytest.raises(ValueError, match=r"weights\[0\] must be float or of ggml's kinds, got Q8_ROW"):
        ops.grouped_linear(np.ones((2, 30), np.float32), [weight], np.array([2]))


@pytest.mark.parametrize("shared", [False, True])
def test_several_together(vnni, threads, shared):
    """What shares its input: `linears` gives the bits of `linear`, also where x is rounded once since their columns are the same."""
    g = np.random.default_rng(4)
    for rows, K, sizes in ((2, 64, (48, 16)), (2, 96, (768, 5, 33)), (29, 416, (390, 64, 1)), (530, 272, (70, 390, 16))):
        weights, x = [ref.random_weight((n, K), g) for n in sizes], g.standard_normal((rows, K), np.float32)
        if shared:
            weights = [QuantizedArray("Q8_ROW", w.shape, w.blocks, columns=weights[0].columns.copy()) for w in weights]
        biases = [None, *(g.standard_normal(n).astype(np.float32) for n in sizes[1:])]
        for n in (1, 2, 3):
            _C.set_num_threads(n)
            for y, w, b in zip(ops.linears(x, weights, biases), weights, biases, strict=True):
                want = ref.forward(x, w)
                same_bits(y, want if b is None else want + b)


def there(weight, put):
    """The weight with its blocks and columns on a device."""
    columns = None if weight.columns is None else put(weight.columns)
    return QuantizedArray("Q8_ROW", weight.shape, put(weight.blocks), columns=columns)


def check_on_device(case, put):
    """The twin for tests/gpu: the bits of the definition."""
    inputs = ref.inputs(case, rng(case))
    weight = there(inputs["weight"], put)
    same_bits(ops.linear(put(inputs["x"]), weight).numpy(), ref.forward(**inputs))
    same_bits(weight.dequantize().numpy(), inputs["weight"].dequantize())
