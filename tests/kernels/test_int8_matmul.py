from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastlm import _C, models, ops
from fastlm.checkpoint.quantized import QuantizedArray
from fastlm.kernels.int8_matmul import int8_matmul_ref as ref
from fastlm.kernels.quantized_matmul import quantized_matmul_ref as float_ref
from fastlm.models.quantize import activations_of, quantize, set_activations
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, rng

CASES = pytest.mark.parametrize("case", cases("int8_matmul"), ids=case_id)
KINDS = pytest.mark.parametrize("kind", ref.KINDS)


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
    y = ops.linear(inputs["x"], inputs["weight"].with_activations("int8"))
    same_bits(y, ref.forward(**inputs))


@CASES
def test_wide(vnni, case):
    """Codes of 16 bits, which a head has."""
    inputs = ref.inputs(case, rng(case))
    y = ops.linear(inputs["x"], inputs["weight"].with_activations("int16"))
    same_bits(y, ref.forward(**inputs, wide=True))


def test_wide_is_nearly_exact(vnni):
    """At their largest, errors against float64 are 8 bits less: 1e-4 of the root mean square in place of 2.6e-2."""
    g = np.random.default_rng(3)
    weight, x = ref.random_weight("Q8_0", (200, 576), g), g.standard_normal((9, 576)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    size = np.sqrt((exact**2).mean())
    errors = [np.abs(ops.linear(x, weight.with_activations(a)) - exact).max() / size for a in ("int8", "int16")]
    assert 1e-2 < errors[0] < 5e-2
    assert errors[1] < errors[0] / 200


def test_a_head_is_wide():
    config = models.LlamaConfig(vocab_size=64, context=16, d_model=32, n_layer=1, n_head=2, n_kv_head=2, d_ff=64)
    model = models.create(config)
    quantize(model, "Q8_0", "int8")
    kinds = {name: p.data.activations for name, p in model.named_parameters().items() if isinstance(p.data, QuantizedArray)}
    heads = kinds.keys() & {"head.weight", "token_embedding.weight"}
    assert heads
    assert all(kinds[name] == ("int16" if name in heads else "int8") for name in kinds)
    assert activations_of(model) == "int8"
    set_activations(model, "float32")
    assert activations_of(model) == "float32"


@KINDS
def test_every_code(vnni, kind):
    """Codes, sub-scales and signs at their ends, activations of +-127: the largest sums that there are."""
    g = np.random.default_rng(5)
    weight = ref.random_weight(kind, (48, 512), g)
    extreme = weight.blocks.copy()
    extreme[:16][extreme[:16] < 128] = 0
    extreme[:16][extreme[:16] >= 128] = 255
    halves = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(kind, (0, 2))
    size = extreme.shape[1] // (512 // (256 if "K" in kind else 32))
    for at in halves:
        extreme.reshape(48, -1, size)[..., at : at + 2] = weight.blocks.reshape(48, -1, size)[..., at : at + 2]
    weight = QuantizedArray(kind, weight.shape, extreme)
    x = np.sign(g.standard_normal((13, 512))).astype(np.float32)
    x[0], x[1], x[2] = 1, -1, g.standard_normal(512)
    x[3], x[4] = 3e38, 1e-25
    same_bits(ops.linear(x, weight.with_activations("int8")), ref.forward(x, weight))
    same_bits(ops.linear(x, weight.with_activations("int16")), ref.forward(x, weight, wide=True))


@KINDS
def test_odd_rows(vnni, kind):
    """A row with nan or inf is nan and alone in that; zeros, and what is too small for a scale, give zero; ties go to even."""
    g = np.random.default_rng(6)
    weight, x = ref.random_weight(kind, (33, 256), g), g.standard_normal((9, 256), np.float32)
    x[1, 40], x[2, 41], x[3, 42] = np.nan, np.inf, -np.inf
    x[4] = 0
    x[5] = 1e-31
    x[6, ::2] = -0.0
    x[7] = np.tile(np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5], np.float32), 32)
    y = ops.linear(x, weight.with_activations("int8"))
    assert np.isnan(y[1:4]).all()
    assert np.isfinite(y[[0, 4, 5, 6, 7, 8]]).all()
    assert not y[4:6].any()
    same_bits(y, ref.forward(x, weight))


@KINDS
def test_alone_and_in_batch(vnni, threads, kind):
    g = np.random.default_rng(7)
    weight = ref.random_weight(kind, (390, 1024), g).with_activations("int8")
    x = g.standard_normal((67, 1024), np.float32)
    whole = ops.linear(x, weight)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        same_bits(ops.linear(x, weight), whole)
        for M in range(1, 28):
            same_bits(ops.linear(x[:M], weight), whole[:M])


@KINDS
def test_epilogue_and_gradient(vnni, kind):
    """Bias, activation and residual come after the sums; the gradient is that of the weights, straight through the rounding."""
    g = np.random.default_rng(0)
    weight = ref.random_weight(kind, (70, 512), g).with_activations("int8")
    x, b, r = (g.standard_normal(s).astype(np.float32) for s in [(2, 3, 512), (70,), (2, 3, 70)])
    for activation in (None, "gelu", "gelu_tanh", "silu", "relu"):
        z = ref.forward(x.reshape(-1, 512), weight) + b
        want = z.reshape(2, 3, 70)
        if activation:
            want = ops.activation(want, activation)
        np.testing.assert_allclose(ops.linear(x, weight, b, activation, r), want + r, rtol=2e-6, atol=2e-6)
    xt = Tensor(x, requires_grad=True)
    y = ops.linear(xt, weight, b)
    same_bits(y.data.reshape(-1, 70), z)
    dy = g.standard_normal(y.shape).astype(np.float32)
    y.backward(dy)
    np.testing.assert_array_equal(xt.grad, ops.matmul(dy, weight.dequantize()))


def test_error():
    """Near the product in float64: rounding a group of 32 to 8 bits errs by about 0.4 % of its largest."""
    g = np.random.default_rng(8)
    for kind in ref.KINDS:
        weight, x = ref.random_weight(kind, (256, 1024), g), g.standard_normal((64, 1024), np.float32)
        exact = float_ref.forward(x.astype(np.float64), weight)
        error = ops.linear(x, weight.with_activations("int8")) - exact
        assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.008


def test_kept():
    """One packed copy serves both; the setting goes with copies and is seen in the repr."""
    weight = ref.random_weight("Q4_1", (40, 64), np.random.default_rng(9))
    other = weight.with_activations("int8")
    ops.linear(np.ones((1, 64), np.float32), other)
    assert other.cache is weight.cache
    assert "packed" in weight.cache
    assert (weight.activations, other.activations, pickle.loads(pickle.dumps(other)).activations) == ("float32", "int8", "int8")
    assert repr(other) == "QuantizedArray(Q4_1, (40, 64), 1600 bytes, int8 activations)"
    with pytest.raises(ValueError, match="activations must be 'float32' or 'int8', got 'int4'"):
        weight.with_activations("int4")


def check_on_device(case, put):
    """The twin for tests/gpu. Sums of integers are exact, so tiles have the definition's bits; a few rows are summed in another order."""
    inputs = ref.inputs(case, rng(case))
    weight, want = inputs["weight"], ref.forward(**inputs)
    got = ops.linear(put(inputs["x"]), QuantizedArray(weight.kind, weight.shape, put(weight.blocks), "int8")).numpy()
    if case["rows"] > 8:
        same_bits(got, want)
    size = np.abs(inputs["x"]) @ np.abs(weight.dequantize()).T
    np.testing.assert_array_less(np.abs(got - want), 4e-6 * size + 1e-30)
