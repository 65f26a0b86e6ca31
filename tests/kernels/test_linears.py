"""Several linear layers of one input: the bits of each alone, whatever the rows, storages and threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.checkpoint.quantized import quantize
from fastlm.tensor import Tensor, no_grad

SIZES = (70, 33, 192, 1)


def weight(rng: np.random.Generator, N: int, K: int, kind: str) -> Any:
    w = rng.standard_normal((N, K)).astype(np.float32)
    if kind in ("float32", "float16"):
        return w.astype(kind)
    if kind == "bfloat16":
        return w.astype(ml_dtypes.bfloat16)
    name, _, activations = kind.partition(" ")
    return quantize(w, name).with_activations(activations or "float32")


def same(xs: Any, ys: Any) -> None:
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.shape == y.shape
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "float16", "Q4_1", "Q8_0", "Q4_0 int8", "Q4_1 int8", "Q5_1 int8", "Q8_0 int8", "Q8_0 int16"]
)
@pytest.mark.parametrize("K", [96, 640])
def test_bits(isa: Any, threads: Any, kind: str, K: int) -> None:
    rng = np.random.default_rng(0)
    for number in (2, 3, 4):
        weights = [weight(rng, N, K, kind) for N in SIZES[:number]]
        biases = [None if i == 1 else rng.standard_normal(N).astype(np.float32) for i, N in enumerate(SIZES[:number])]
        for shape in ((1,), (3,), (12,), (13,), (2, 20), (150,), (0,)):
            x = rng.standard_normal((*shape, K)).astype(np.float32)
            _C.set_num_threads(1)
            want = [ops.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
            for n in (1, 2, 5):
                _C.set_num_threads(n)
                same(ops.linears(x, weights, biases), want)
                same(ops.linears(x, weights), [ops.linear(x, w) for w in weights])


@pytest.mark.parametrize(("M", "K", "sizes"), [(1600, 40, (70, 33, 192)), (2100, 24, (70, 40)), (800, 24, (192, 3300, 33))])
def test_many_rows(isa: Any, threads: Any, M: int, K: int, sizes: tuple[int, ...]) -> None:
    """x is packed for the first product, and anew where the next one deals its rows out in another way or packs them in parts."""
    rng = np.random.default_rng(3)
    weights = [weight(rng, N, K, "float32") for N in sizes]
    biases = [rng.standard_normal(N).astype(np.float32) for N in sizes]
    x = rng.standard_normal((M, K)).astype(np.float32)
    _C.set_num_threads(1)
    want = [ops.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        same(ops.linears(x, weights, biases), want)


def test_one_launch() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 1, 64)).astype(np.float32)
    for kind, name in (("float32", "Matmuls"), ("Q4_1", "QuantizedMatmuls"), ("Q8_0 int8", "QuantizedMatmuls")):
        weights = [weight(rng, N, 64, kind) for N in SIZES[:3]]
        recording = backend.Recording(partial(ops.linears, x, weights))
        assert [step for step, _ in recording.profile(1)] == [name]
        x *= 2
        recording.spoil()
        recording.run()
        same(recording.result, [ops.linear(x, w) for w in weights])


def test_others_go_one_by_one() -> None:
    """Different storages, gradients, more than fit together."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    kinds = ("Q4_1", "Q8_0", "Q8_0 int8", "float32", "bfloat16")
    weights = [weight(rng, 20, 64, kind) for kind in kinds]
    same(ops.linears(x, weights), [ops.linear(x, w) for w in weights])
    for a in range(5):
        for b in range(5):
            pair = [weights[a], weights[b]]
            same(ops.linears(x, pair), [ops.linear(x, w) for w in pair])
    tensors = [Tensor(w, requires_grad=True) for w in (weights[3], weights[3] + 1)]
    with no_grad():
        assert all(isinstance(y, Tensor) and not y.requires_grad for y in ops.linears(x, tensors))
    total = ops.add(*ops.linears(x, tensors))
    total.backward(np.ones((2, 20), np.float32))
    alone = Tensor(weights[3], requires_grad=True)
    ops.linear(x, alone).backward(np.ones((2, 20), np.float32))
    for t in tensors:
        np.testing.assert_array_equal(t.grad, alone.grad)


def test_refuses() -> None:
    x, w = np.zeros((1, 4), np.float32), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"\[linear\] weight must be \(out, in\) with in = 4, got \(4, 3\)\."):
        ops.linears(x, [w, w.T])
    with pytest.raises(ValueError, match=r"\[linear\] bias must be \(out,\) = \(3,\), got \(4,\)\."):
        ops.linears(x, [w, w], [None, np.zeros(4, np.float32)])
    with pytest.raises(TypeError, match=r"\[linear\] weight must be float32, bfloat16 or float16, got float64\."):
        ops.linears(x, [w, w.astype(float)])
    with pytest.raises(ValueError, match=r"\[linears\] weights must be one or more, biases as many, got 2 and 1\."):
        ops.linears(x, [w, w], [None])
    with pytest.raises(ValueError, match=r"\[linears\] weights must be one or more, biases as many, got 0 and 0\."):
        ops.linears(x, [])


@pytest.mark.parametrize("kind", ["float32", "Q4_1", "Q4_0 int8", "Q4_1 int8", "Q8_0 int8", "Q8_0 int16"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated(isa: Any, threads: Any, kind: str, act: str) -> None:
    rng = np.random.default_rng(2)
    for N in (1, 70, 192):
        gate, up = weight(rng, N, 96, kind), weight(rng, N, 96, kind)
        biases = (rng.standard_normal(N).astype(np.float32), None)
        for shape in ((1,), (2,), (5,), (12,), (13,), (3, 37), (0,)):
            x = rng.standard_normal((*shape, 96)).astype(np.float32)
            _C.set_num_threads(1)
            want = ops.gated(ops.linear(x, gate, biases[0]), ops.linear(x, up), act)
            for n in (1, 2, 5):
                _C.set_num_threads(n)
                same([ops.gated_linears(x, gate, up, act, biases)], [want])


def test_gated_refuses_a_kind() -> None:
    w = weight(np.random.default_rng(3), 8, 32, "Q8_0 int8")
    with pytest.raises(ValueError, match="kind"):
        ops.gated_linears(np.ones((1, 32), np.float32), w, w, "swish")
