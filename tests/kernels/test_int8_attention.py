from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, LM, models, ops
from fastlm.kernels.int8_attention import int8_attention_ref as ref
from fastlm.models import bert
from fastlm.nn import Attention, Context
from fastlm.tensor import Tensor, no_grad
from fastlm.testing import case_id, cases, rng

CASES = pytest.mark.parametrize("case", cases("int8_attention"), ids=case_id)


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
    np.testing.assert_array_equal(got, want)  # zeros of either sign are equal


@CASES
def test_forward(vnni, case):
    """The bits of the definition in NumPy, on every instruction set."""
    inputs = ref.inputs(case, rng(case))
    same_bits(ops.int8_attention(**inputs), ref.forward(**inputs))


@CASES
def test_oracle(case):
    """No further from weights in float64 that are not rounded than rounding can bring it."""
    inputs = ref.inputs(case, rng(case))
    exact, bound = ref.unrounded(**inputs)
    assert np.all(np.abs(ref.forward(**inputs) - exact) <= 1.001 * bound + 2e-5 * np.abs(exact).max(initial=0.0))


def test_every_length(vnni):
    """Each number of keys and queries around whole vectors and groups of them."""
    g = np.random.default_rng(1)
    q, k, v = (g.standard_normal((1, 70, 1, 20), np.float32) for _ in range(3))
    for n in range(1, 71):
        same_bits(ops.int8_attention(q[:, :n], k[:, :n], v[:, :n]), ref.forward(q[:, :n], k[:, :n], v[:, :n]))


def test_alone_and_in_batch(vnni, threads):
    """A sequence has one result: alone, in a batch, padded, packed, from views, on any number of threads."""
    g = np.random.default_rng(2)
    lengths = np.array([40, 1, 0, 129, 64], np.int32)
    fused = g.standard_normal((5, 129, 8, 24), np.float32)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    rows = np.concatenate([fused[b, :n] for b, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    whole = ops.int8_attention(q, k, v, lengths=lengths)
    assert not whole[2].any()
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.int8_attention(q, k, v, lengths=lengths), whole)
        packed = ops.int8_attention(rows[:, :4], rows[:, 4:6], rows[:, 6:], offsets=offsets)
        for b, size in enumerate(lengths):
            np.testing.assert_array_equal(packed[offsets[b] : offsets[b + 1]], whole[b, :size])
            alone = ops.int8_attention(*(np.ascontiguousarray(x[b : b + 1, :size]) for x in (q, k, v)))
            np.testing.assert_array_equal(alone[0], whole[b, :size])
    hidden = fused.copy()
    for b, size in enumerate(lengths):
        hidden[b, size:, 4:] = np.nan
    np.testing.assert_array_equal(ops.int8_attention(hidden[:, :, :4], hidden[:, :, 4:6], hidden[:, :, 6:], lengths=lengths), whole)


def test_odd_numbers(vnni):
    """A query that is not finite is alone in that; a key or value is not. Zeros, the smallest and largest numbers, any scale."""
    g = np.random.default_rng(3)
    q, k, v = (g.standard_normal((1, 40, 2, 16), np.float32) for _ in range(3))
    for bad in (np.nan, np.inf, -np.inf):
        x = q.copy()
        x[0, 5, 1, 3] = bad
        y = ops.int8_attention(x, k, v)
        assert np.isnan(y[0, 5, 1]).all()
        y[0, 5, 1] = 0
        assert np.isfinite(y).all()
        for which in (1, 2):
            args = [q, k.copy(), v.copy()]
            args[which][0, 7, 0, 2] = bad
            y = ops.int8_attention(*args)
            assert np.isnan(y[:, :, 0]).all()
            assert np.isfinite(y[:, :, 1]).all()
    mean = ref.values(v[0])[0] * ref.values(v[0])[1]
    for zero in ((0 * q, k), (q, 0 * k), (1e-32 * q, k)):
        np.testing.assert_allclose(ops.int8_attention(*zero, v)[0, 3], mean.mean(axis=0), atol=0.01 * np.abs(v).max())
    assert not ops.int8_attention(q, k, 0 * v).any()
    one = v.copy()
    one[:, 1:] = 0
    for size in (1.0, 1e-25, 1e30):
        y, bound = ops.int8_attention(q, k, size * one), ref.unrounded(q, k, one)
        assert np.all(np.abs(y / np.float32(size) - bound[0]) <= 1.001 * bound[1] + 1e-5)
    for scale in (0.0, -0.3, 5.0):
        y = ops.int8_attention(q, k, v, scale=scale)
        same_bits(y, ref.forward(q, k, v, scale=scale))
        exact, bound = ref.unrounded(q, k, v, scale=scale)
        assert np.all(np.abs(y - exact) <= 1.001 * bound + 2e-5)


def test_small_weights_of_large_values(vnni):
    """A head that rests on a key without a value keeps what the others give, whose weights alone would round to nothing."""
    q, k = np.ones((1, 1, 1, 4), np.float32), np.zeros((1, 100, 1, 4), np.float32)
    v = np.ones((1, 100, 1, 8), np.float32)
    k[0, 0], v[0, 0] = 8, 1e-3
    exact = ops.attention(q, k, v, scale=0.25)
    np.testing.assert_allclose(exact, 99 * np.exp(-8) / (1 + 99 * np.exp(-8)) + 1e-3, rtol=0.05)
    np.testing.assert_allclose(ops.int8_attention(q, k, v, scale=0.25), exact, rtol=0.01)


def test_largest_sums(vnni):
    """All codes at their ends over the most keys: the sums of 32 bits do not overflow."""
    n = _C.int8_attention_keys
    q, k, v = np.ones((1, 1, 1, 4), np.float32), np.ones((1, n, 1, 4), np.float32), np.ones((1, n, 1, 2), np.float32)
    v[..., 1] = -1
    np.testing.assert_allclose(ops.int8_attention(q, k, v)[0, 0, 0], [1, -1], rtol=1e-4)
    q = np.ones((1, 1, 1, _C.int8_attention_depth), np.float32)
    k, v = np.concatenate([q, -q], axis=1), np.array([[[[1.0]], [[-1.0]]]], np.float32)
    np.testing.assert_allclose(ops.int8_attention(q, k, v)[0, 0, 0], [1], rtol=1e-6)


def test_error():
    """Near attention in float32."""
    g = np.random.default_rng(4)
    q, k, v = (g.standard_normal((2, 128, 4, 64), np.float32) for _ in range(3))
    exact = ops.attention(q, k, v)
    error = ops.int8_attention(q, k, v) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.015


def test_encoders_have_it(monkeypatch):
    """Where all keys are seen and the weights are Q8_ROW; not where a mask hides some, a gradient is wanted, heads are narrow or weights
    are others."""
    calls = []
    real = ops.int8_attention
    monkeypatch.setattr(ops, "int8_attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    monkeypatch.setenv("FASTLM_RECORD", "0")
    sizes = {"vocab_size": 50, "context": 40, "d_model": 128, "n_layer": 2, "d_ff": 96}
    narrow = LM(models.create(bert.BertConfig(**sizes, n_head=4), seed=1)).quantize("Q8_ROW")
    lm = LM(models.create(bert.BertConfig(**sizes, n_head=2), seed=1))
    g = np.random.default_rng(5)
    ids = g.integers(0, 50, (3, 20)).astype(np.int32)
    exact = lm.model.states(ids)
    narrow.model.states(ids)
    assert not calls
    lm.quantize("Q8_ROW")
    states = lm.model.states(ids)
    assert len(calls) == 2
    assert np.sqrt(np.mean((states - exact) ** 2) / np.mean(exact**2)) < 0.05
    np.testing.assert_array_equal(lm.model.packed_states([ids[1][:7], ids[2]])[7:], states[2])
    right = (np.arange(20) < np.array([20, 5, 9])[:, None]).astype(np.int64)
    padded = lm.model.states(ids, mask=right)
    assert len(calls) == 6
    np.testing.assert_array_equal(padded[0], states[0])
    np.testing.assert_array_equal(padded[1, :5], lm.model.states(ids[1:2, :5])[0])
    calls.clear()
    lm.model.states(ids, mask=right[:, ::-1])
    assert not calls
    attention = lm.model.blocks[0].attention
    assert isinstance(attention, Attention)
    calls.clear()
    attention(Tensor(g.standard_normal((1, 6, 128), np.float32), requires_grad=True), Context(1, 6), 0)
    assert not calls
    with no_grad():
        attention(g.standard_normal((1, 6, 128), np.float32), Context(1, 6), 0)
    assert len(calls) == 1


def test_refuses():
    x = np.ones((2, 6, 4, 8), np.float32)
    with pytest.raises(ValueError, match="must want no gradient: attention has one"):
        ops.int8_attention(Tensor(x, requires_grad=True), x, x)
    with pytest.raises(TypeError, match=r"\[int8_attention\] k must be float32, got float64"):
        ops.int8_attention(x, x.astype(np.float64), x)
    with pytest.raises(ValueError, match="H a multiple of k's 3 heads"):
        ops.int8_attention(x, x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match=r"k must be \(B, S, G, D\) = \(2, 6, 4, 8\), got \(2, 6, 4, 7\)"):
        ops.int8_attention(x, np.ones((2, 6, 4, 7), np.float32), x)
    with pytest.raises(ValueError, match="lengths must be from 0 to S = 6, got 1 to 7"):
        ops.int8_attention(x, x, x, lengths=np.array([1, 7], np.int32))
    with pytest.raises(ValueError, match="offsets must grow from 0 to R = 2"):
        ops.int8_attention(x[:, 0], x[:, 0], x[:, 0], offsets=np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="q must have 3 axes"):
        ops.int8_attention(x, x, x, offsets=np.array([0, 2], np.int32))
    long = np.ones((1, _C.int8_attention_keys + 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="at most 65536 keys"):
        ops.int8_attention(long[:, :1], long, long)
