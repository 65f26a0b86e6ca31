from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.checkpoint.mapping import map_file
from fastlm.checkpoint.quantized import QuantizedArray
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.kernels.quantized_matmul import quantized_matmul_ref as ref
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_oracle, rng

CASES = pytest.mark.parametrize("case", cases("quantized_matmul"), ids=case_id)
KINDS = pytest.mark.parametrize("kind", ref.KINDS)


@CASES
def test_forward(isa, case):
    """Against the oracle within the bound of a chain, and bit for bit what the dequantised weight gives."""
    inputs = ref.inputs(case, rng(case))
    x, w = inputs["x"], ref.dequantized(inputs["weight"])
    y = ops.linear(**inputs)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert y.dtype == np.float32
    assert np.all(np.abs(y - exact) <= bound(x, w.T) + np.spacing(np.abs(exact).astype(np.float32)))
    np.testing.assert_array_equal(y, ops.linear(x, w))


@CASES
def test_backward(isa, case):
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    x = Tensor(inputs["x"], requires_grad=True)
    y = ops.linear(x, inputs["weight"])
    dy = generator.standard_normal(y.shape).astype(np.float32)
    y.backward(dy)
    np.testing.assert_array_equal(x.grad, ops.matmul(dy, ref.dequantized(inputs["weight"])))


@pytest.mark.parametrize("case", [c for c in cases("quantized_matmul") if c["rows"] <= 2], ids=case_id)
def test_oracle(case):
    check_oracle("quantized_matmul", case)


@KINDS
def test_epilogue_and_gradient(isa, kind):
    """Bias, activation, residual, and the gradients through them, are those of the dequantised weight."""
    g = np.random.default_rng(0)
    weight = ref.random_weight(kind, (70, 512), g)
    arrays = [g.standard_normal(s).astype(np.float32) for s in [(2, 3, 512), (70,), (2, 3, 70)]]
    dy = g.standard_normal((2, 3, 70)).astype(np.float32)
    got, want = [], []
    for w, out in ((weight, got), (weight.dequantize(), want)):
        x, b, r = (Tensor(a, requires_grad=True) for a in arrays)
        y = ops.linear(x, w, b, "gelu", r)
        y.backward(dy)
        out += [y.data, x.grad, b.grad, r.grad]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@KINDS
def test_row_alone_and_in_batch(isa, threads, kind):
    g = np.random.default_rng(1)
    weight, x = ref.random_weight(kind, (700, 1024), g), g.standard_normal((80, 1024), np.float32)
    whole = ops.linear(x, weight)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        for M in (1, 2, 3, 4, 5, 15, 80):
            np.testing.assert_array_equal(ops.linear(x[:M], weight), whole[:M])


def test_every_code_and_scale(isa):
    """All bits random (halves that are finite): each code, sub-scale and sign comes out as the oracle says, weight by weight."""
    g = np.random.default_rng(2)
    for kind in ref.KINDS:
        weight = ref.random_weight(kind, (33, 512), g)
        y = ops.linear(np.eye(512, dtype=np.float32), weight)
        np.testing.assert_array_equal(y, ref.dequantized(weight).T)


def test_packs_once():
    g = np.random.default_rng(3)
    weight, x = ref.random_weight("Q4_1", (40, 64), g), g.standard_normal((3, 64), np.float32)
    y = ops.linear(x, weight)
    kept = weight.cache["packed"]
    weight.blocks[:] = 0  # not read again
    np.testing.assert_array_equal(ops.linear(x, weight), y)
    assert weight.cache["packed"] is kept


def test_mapped_blocks_are_given_back(tmp_path):
    """Once packed, the pages of the file leave memory; they come back when they are read."""
    weight = ref.random_weight("Q4_0", (512, 4096), np.random.default_rng(5))
    path = tmp_path / "blocks"
    path.write_bytes(b"odd" + weight.blocks.tobytes())
    mapped = map_file(path, "test")
    blocks = np.frombuffer(mapped, np.uint8, weight.nbytes, 3).reshape(weight.blocks.shape)

    def resident():  # kB of this file
        text = Path("/proc/self/smaps").read_text()
        return int(re.search(r"Rss: +(\d+)", text[text.index(str(path)) :])[1])

    x = np.ones((1, 4096), np.float32)
    y = ops.linear(x, QuantizedArray("Q4_0", (512, 4096), blocks))
    assert resident() <= 128
    np.testing.assert_array_equal(blocks, weight.blocks)
    assert resident() > 1000
    np.testing.assert_array_equal(y, ops.linear(x, weight))


def test_refuses():
    weight = ref.random_weight("Q8_0", (5, 64), np.random.default_rng(4))
    with pytest.raises(ValueError, match=r"\[linear\] weight must be \(out, in\) with in = 32, got \(5, 64\)\. x is \(2, 32\)\."):
        ops.linear(np.zeros((2, 32), np.float32), weight)
    stacked = QuantizedArray("Q8_0", (1, 5, 64), weight.blocks)
    with pytest.raises(ValueError, match=r"\[linear\] weight must be \(out, in\) with in = 64, got \(1, 5, 64\)"):
        ops.linear(np.zeros((2, 64), np.float32), stacked)


def check_on_device(case, put):
    """The twin for tests/gpu: the oracle's bound of a chain; no two forms sum in one order."""
    inputs = ref.inputs(case, rng(case))
    x, w = inputs["x"], ref.dequantized(inputs["weight"])
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    got = ops.linear(put(x), there(inputs["weight"], put)).numpy()
    assert np.all(np.abs(got - exact) <= bound(x, w.T) + np.spacing(np.abs(exact).astype(np.float32)))


def check_backward_on_device(case, put):
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    x, w = Tensor(put(inputs["x"]), requires_grad=True), ref.dequantized(inputs["weight"])
    y = ops.linear(x, there(inputs["weight"], put))
    dy = generator.standard_normal(y.shape).astype(np.float32)
    y.backward(put(dy))
    exact = dy.astype(np.float64) @ w.astype(np.float64)
    assert np.all(np.abs(x.grad.numpy() - exact) <= bound(dy, w) + np.spacing(np.abs(exact).astype(np.float32)))


def there(weight, put):
    """The weight with its blocks on a device."""
    return QuantizedArray(weight.kind, weight.shape, put(weight.blocks))
