"""The heap behind `backend.empty`: blocks never overlap, come back whole, and go back to the system; and what the tape may overwrite."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.tensor import Tensor

MB = 1 << 20


def test_blocks_do_not_overlap_and_join_again():
    rng = np.random.default_rng(0)
    backend.release()
    live, before = [], backend.memory()["live"]
    for i in range(3000):
        if live and rng.random() < 0.5:
            array, mark = live.pop(rng.integers(len(live)))
            assert (array == mark).all()
        else:
            array = backend.empty((int(rng.integers(1 << 16, 1 << 18)),), np.uint8)
            assert array.ctypes.data % 64 == 0
            array.fill(i % 251)
            live.append((array, i % 251))
    assert all((array == mark).all() for array, mark in live)
    del array, live
    assert backend.memory()["live"] == before
    whole = backend.empty((20 * MB,), np.uint8)  # of what the small ones left, joined
    assert backend.memory()["peak"] < before + 400 * MB
    del whole


def test_many_threads():
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            arrays = [backend.empty((int(n),), np.uint8) for n in rng.integers(1 << 16, 1 << 20, 4)]
            for a in arrays:
                a.fill(seed)
            if not all((a == seed).all() for a in arrays):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_peak_held_and_release():
    backend.release()
    backend.reset_peak()
    before = backend.memory()
    assert before["held"] < 4096
    a = backend.empty((8 * MB,), np.uint8)
    a.fill(1)
    b = backend.empty((8 * MB,), np.uint8)
    b.fill(2)
    del a
    assert backend.memory()["live"] - before["live"] == pytest.approx(8 * MB, rel=0.01)
    assert backend.memory()["peak"] - before["live"] == pytest.approx(16 * MB, rel=0.01)
    assert backend.memory()["held"] == pytest.approx(8 * MB, rel=0.01)
    backend.release()
    assert backend.memory()["held"] < 4096
    assert (b == 2).all()
    a = backend.empty((8 * MB,), np.uint8)  # memory that went back can be had again
    a.fill(3)
    assert (b == 2).all()


def test_a_pass_that_is_put_off_has_rows_where_rows_lay():
    """A large block is used again by one of its size alone: of a smaller one, rows would lie where another thread's had lain."""

    def step():
        wide = backend.empty((1024, 3072))
        at = wide.ctypes.data
        del wide
        narrow = [backend.empty((1024, 768)) for _ in range(3)]
        places = [a.ctypes.data for a in narrow]
        assert all(not at <= place < at + 1024 * 3072 * 4 for place in places)
        del narrow
        again = [backend.empty((1024, 768)).ctypes.data for _ in range(2)]
        assert set(again) <= set(places)
        assert backend.empty((1024, 3072)).ctypes.data == at

    backend.deferred(step)


def test_gradients_that_somebody_holds_are_not_overwritten():
    rng = np.random.default_rng(0)
    x, w = Tensor(rng.standard_normal((64, 48), np.float32), True), Tensor(rng.standard_normal(48, np.float32), True)
    dy = rng.standard_normal((64, 48), np.float32)
    kept = dy.copy()
    ops.activation(ops.rms_norm(ops.activation(x, "silu"), w), "gelu").backward(dy)
    np.testing.assert_array_equal(dy, kept)
    # The same gradient for both terms of a sum, each going through an operation that overwrites what is its own.
    expected = x.grad.copy()
    for _ in range(2):
        a, b = Tensor(x.data, True), Tensor(x.data, True)
        total = ops.add(ops.activation(ops.scale(a, 1.0), "silu"), ops.activation(ops.scale(b, 1.0), "silu"))
        ops.activation(ops.rms_norm(total, w), "gelu").backward(dy)
        np.testing.assert_array_equal(a.grad, b.grad)
    one = Tensor(x.data, True)
    ops.activation(ops.rms_norm(ops.scale(ops.activation(one, "silu"), 2.0), w), "gelu").backward(dy)
    assert one.grad.shape == expected.shape
    np.testing.assert_allclose(one.grad, a.grad * 2, rtol=1e-5, atol=1e-6)


def test_a_leaf_reached_twice_adds():
    x = Tensor(np.ones((4, 8), np.float32), True)
    y = ops.add(ops.scale(x, 2.0), ops.scale(x, 3.0))
    y.backward(np.ones((4, 8), np.float32))
    np.testing.assert_array_equal(x.grad, np.full((4, 8), 5, np.float32))
    ops.scale(x, 1.0).backward(np.ones((4, 8), np.float32))
    np.testing.assert_array_equal(x.grad, np.full((4, 8), 6, np.float32))


@pytest.mark.parametrize("hold", [False, True])
def test_bits_do_not_depend_on_who_holds_a_gradient(hold):
    """Three products of one input: their gradients continue one chain, in place or in a copy."""
    rng = np.random.default_rng(1)
    held: list = []

    def run(watch):
        x = Tensor(rng_x, True)
        h = ops.scale(x, 1.0)
        parts = [ops.linear(h, Tensor(w, True)) for w in weights]
        total = ops.add(ops.add(parts[0], parts[1]), parts[2])
        if watch:
            import fastlm.tensor as tensor

            plain = tensor._alone
            tensor._alone = lambda d, n: (held.append(d), False)[1]
            try:
                total.backward(dy)
            finally:
                tensor._alone = plain
        else:
            total.backward(dy)
        return x.grad.tobytes()

    rng_x = rng.standard_normal((40, 33), np.float32)
    weights = [rng.standard_normal((21, 33), np.float32) for _ in range(3)]
    dy = rng.standard_normal((40, 21), np.float32)
    assert run(hold) == run(False)
