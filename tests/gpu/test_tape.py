"""The tape, the operations between the kernels, and recordings, on the emulated device: against the host's."""

from __future__ import annotations

import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import backend, ops, tensor
from fastlm.tensor import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
import fastlm.cuda.interpreter  # noqa: F401  before triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def both(f, *arrays, on):
    """f's result and gradients (of a random dy) on the host and on the device."""
    found = []
    for put in (lambda a: a.copy(), on.put):
        xs = [Tensor(put(a), requires_grad=True) for a in arrays]
        y = f(*xs)
        dy = np.random.default_rng(1).standard_normal(y.shape, np.float32)
        y.backward(put(dy))
        found.append([backend.host(y.data), *(backend.host(x.grad) for x in xs)])
    return found


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (ops.add, [(3, 5, 33), (3, 5, 33)]),
        (ops.add, [(3, 5, 33), (5, 33)]),
        (ops.add, [(3, 5, 33), (33,)]),
        (ops.add, [(0, 33), (33,)]),
        (ops.add_broadcast, [(1, 3, 4, 5), (2, 1, 4, 5)]),
        (ops.add_broadcast, [(2, 3, 1, 5), (4, 1)]),
        (ops.add_broadcast, [(3,), (2, 3)]),
        (lambda x: ops.scale(x, 0.3), [(7, 33)]),
        (lambda x: ops.reshape(x, (3, -1)), [(6, 5)]),
        (ops.tanh, [(3, 700)]),
        (lambda x: ops.add(x, x), [(4, 5)]),
        (lambda x: ops.add(ops.scale(x, 2.0), ops.add(x, ops.tanh(x))), [(4, 5)]),
        (lambda x: ops.add(*ops.split(x, (4, 4))), [(3, 8)]),
        (lambda x: ops.split(x, (3, 4, 1))[1], [(2, 3, 8)]),
    ],
)
def test_structure(f, shapes, on):
    host, there = both(f, *(normal(*s) for s in shapes), on=on)
    for a, b in zip(host, there, strict=True):
        np.testing.assert_allclose(b, a, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize(
    ("shape", "kept"), [((5, 300), ()), ((3, 70, 2, 33), (1, 1, 2, 1)), ((130, 7), (1, 7)), ((64, 3), (1, 3)), ((4999,), (1,))]
)
def test_sum_to_in_pieces(shape, kept, on):
    """Where few outputs sum many elements: every one of them once, and in bfloat16 one rounding, at the end."""
    x = normal(*shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    whole = tuple(i for i, n in enumerate((*kept, *(1,) * (len(shape) - len(kept)))) if n == 1)
    exact = x.astype(np.float64).sum(whole, keepdims=True).reshape(kept)
    got = backend.sum_to(on.put(x), kept)
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-6, atol=1e-5)
    assert got.numpy().tobytes() == backend.sum_to(on.put(x), kept).numpy().tobytes()
    half = backend.sum_to(on.put(x.astype(ml_dtypes.bfloat16)), kept, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(half.numpy(), got.numpy().astype(ml_dtypes.bfloat16))


def test_tanh_digits(on):
    x = np.concatenate([np.geomspace(1e-6, 30, 900), [0, -0.5, 90, -90, np.inf, -np.inf]]).astype(np.float32)
    np.testing.assert_allclose(ops.tanh(on.put(x)).numpy(), np.tanh(x.astype(np.float64)), rtol=3e-7)


def test_bfloat16(on):
    """A leaf's gradient is float32 whatever the leaf is; sums that meet are rounded once each."""
    x = Tensor(on.put(normal(4, 33).astype(ml_dtypes.bfloat16)), requires_grad=True)
    y = ops.add(ops.scale(x, 0.5), x)
    assert y.dtype == backend.BFLOAT16
    y.backward(on.put(np.ones((4, 33), ml_dtypes.bfloat16)))
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad.numpy(), np.full((4, 33), 1.5, np.float32))


def test_reuse(on, monkeypatch):
    """What the tape overwrites does not show."""

    def gradient():
        x = Tensor(on.put(normal(3, 8)), requires_grad=True)
        a = ops.tanh(x)
        y = ops.add(ops.add(a, ops.scale(a, 3.0)), ops.scale(x, 0.1))
        y.backward(on.put(normal(3, 8)))
        y = ops.tanh(x)
        y.backward(on.put(normal(3, 8)))  # adds to what is there
        return x.grad.numpy().tobytes()

    found = gradient()
    monkeypatch.setattr(tensor, "_alone", lambda d, held: False)
    assert gradient() == found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_in_chunks(reduction, on, monkeypatch):
    """linear_cross_entropy of more logits than are held at once; a weight that has a gradient already; targets that lie there."""
    monkeypatch.setattr(importlib.import_module("fastlm.ops.linear_cross_entropy"), "_THERE", 128 * 9)
    x, w = normal(150, 8), normal(9, 8)
    targets = np.random.default_rng(0).integers(0, 9, 150)
    targets[::7] = -100
    found = []
    for put in (lambda a: a.copy(), on.put):
        xs = [Tensor(put(a), requires_grad=True) for a in (x, w)]
        for kind in (np.int32, np.int64):
            y = ops.linear_cross_entropy(*xs, put(targets.astype(kind)), reduction=reduction)
            y.backward(put(np.array(0.5, np.float32)))
        found.append([backend.host(y.data), *(backend.host(t.grad) for t in xs)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_advance(dtype, on):
    x = on.put(np.array([3, 0, 1 << 30], dtype))
    y = ops.advance(x)
    assert y.numpy().tolist() == [4, 1, (1 << 30) + 1]
    ops.advance(x, 5, out=x)
    assert x.numpy().tolist() == [8, 5, (1 << 30) + 5]
    with pytest.raises(TypeError, match=r"\[advance\] x must be a contiguous array of int32 or int64, got float32"):
        ops.advance(on.put(np.zeros(3, np.float32)))
    with pytest.raises(TypeError, match=r"\[advance\] out must be contiguous"):
        ops.advance(x, out=on.put(np.zeros(2, dtype)))


def test_elsewhere(on):
    """Nothing is copied between host and device by itself: the message names both and says what to call."""
    x = on.put(normal(2, 3))
    with pytest.raises(TypeError, match=r"\[add\] y is on the host, x is on emulated: .*fastlm\.backend\.put"):
        ops.add(x, normal(2, 3))
    with pytest.raises(TypeError, match=r"\[add\] y is on emulated, x is on the host: .*fastlm\.backend\.put"):
        ops.add(normal(2, 3), x)
    with pytest.raises(TypeError, match=r"\[add\] y is on the host, the other arrays are on emulated: .*fastlm\.backend\.put"):
        on.table.add(x, x, normal(2, 3))
    with pytest.raises(NotImplementedError, match="there is no kernel foo for the GPU yet"):
        on.table.foo()
    with pytest.raises(ValueError, match=r"\[device\] device must be 'cpu' or 'cuda', got 'gpu'"):
        backend.put(x, "gpu")
    assert backend.put(x, "cuda") is x
    assert isinstance(backend.put(x, "cpu"), np.ndarray)


def test_recording(on):
    """A step is run again from memory alone; what would be frozen is refused."""
    x, out, counter = on.put(normal(3, 4)), on.zeros((3, 4)), on.put(np.zeros(1, np.int32))

    def step():
        a = ops.tanh(x)
        b = ops.add(a, ops.scale(x, 2.0))
        del a
        c = ops.add(b, on.zeros((3, 4)))
        backend.assign(out[:, 1:3], c[:, 1:3])
        ops.advance(counter, out=counter)
        return ops.scale(c, 0.5)

    recording = backend.record(step, on)
    first = recording.result.numpy()
    assert len(recording) == 8
    assert recording.nbytes < 6 * 48  # blocks are used again
    for scale in (2.0, 3.0):
        backend.assign(x, on.put(normal(3, 4) * np.float32(scale)))
        recording.spoil()
        recording.run()
        fresh = step().numpy()
        np.testing.assert_array_equal(recording.result.numpy(), fresh)
        np.testing.assert_array_equal(out.numpy()[:, 1:3], 2 * fresh[:, 1:3])
        assert not np.array_equal(fresh, first)
    assert counter.numpy() == 5
    for bad, reason in ((lambda: ops.add(x, on.put(normal(3, 4))), "copies from the host"), (lambda: ops.tanh(x).numpy(), "reads")):
        with pytest.raises(backend.Unrecordable, match=reason):
            backend.record(bad, on)
    assert not backend.recording()
