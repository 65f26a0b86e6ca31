from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.tensor import Tensor
from fastlm.testing import assert_close, case_id, cases, check_backward, check_forward, check_oracle, oracle, rng, widen

CASES = pytest.mark.parametrize("case", cases("attention"), ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("attention", ops.attention, case)


@CASES
def test_forward_recorded(isa, case):
    """With a gradient to come, few queries go through the tiles too."""
    check_forward("attention", lambda **x: ops.attention(**{**x, "q": Tensor(x["q"], requires_grad=True)}).numpy(), case)


@CASES
def test_backward(isa, case):
    check_backward("attention", ops.attention, case)


# A bias of -inf has no central difference.
@pytest.mark.parametrize("case", [c for c in cases("attention") if "hidden" not in c], ids=case_id)
def test_oracle(case):
    check_oracle("attention", case)


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def gradients(q, k, v, *args, **kwargs):
    """Output and gradients of q, k, v and, where given, bias."""
    tensors = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    if kwargs.get("bias") is not None:
        kwargs["bias"] = Tensor(kwargs["bias"], requires_grad=True)
        tensors.append(kwargs["bias"])
    y = ops.attention(*tensors[:3], *args, **kwargs)
    y.backward(random(*y.shape, seed=9))
    return y.numpy(), *(t.grad for t in tensors)


@pytest.mark.parametrize("bias", [None, (3, 4), (1, 4), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("T", [1, 3, 150])
def test_threads(isa, threads, T, bias):
    """The same bits on any number of threads, in the output and in every gradient."""
    q, k, v = random(3, T, 4, 24), random(3, 330, 2, 24), random(3, 330, 2, 24, seed=1)
    kwargs = {"bias": None if bias is None else random(*bias, T, 330), "lengths": np.array([330, 200, 170], np.int32)}
    results = []
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        results.append((ops.attention(q, k, v, True, **kwargs), *gradients(q, k, v, True, **kwargs)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("T", [1, 2, 70])
@pytest.mark.parametrize("window", [None, 50])
def test_batch(isa, T, window):
    """A sequence alone gives the bits that it gives among others."""
    q, k, v = random(5, T, 6, 40), random(5, 520, 3, 40), random(5, 520, 3, 40, seed=1)
    n = np.array([520, 100, 70, 300, 257], np.int32)
    y = ops.attention(q, k, v, True, lengths=n, window=window)
    together = gradients(q, k, v, True, lengths=n, window=window)
    for b in range(5):
        one = slice(b, b + 1)
        np.testing.assert_array_equal(ops.attention(q[one], k[one], v[one], True, lengths=n[one], window=window), y[one])
        np.testing.assert_array_equal(gradients(q[one], k[one], v[one], True, lengths=n[one], window=window)[0], together[0][one])


def test_rows(isa):
    """A query gives the same bits whatever stands before and after it, and whether the cache is longer than it needs."""
    q, k, v = random(1, 200, 2, 32), random(1, 200, 2, 32), random(1, 200, 2, 32, seed=1)
    y = ops.attention(q, k, v, True)
    for begin, end in ((100, 200), (37, 140), (150, 170)):
        np.testing.assert_array_equal(ops.attention(q[:, begin:end], k[:, :end], v[:, :end], True), y[:, begin:end])
        n = np.array([end], np.int32)
        np.testing.assert_array_equal(ops.attention(q[:, begin:end], k, v, True, lengths=n), y[:, begin:end])
    for t in (3, 50, 199):  # the decoding path too
        alone = ops.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], True)
        np.testing.assert_array_equal(ops.attention(q[:, t - 1 : t + 1], k[:, : t + 1], v[:, : t + 1], True)[:, 1:], alone)


@pytest.mark.parametrize("D", [1, 8, 16, 31, 64, 128])
@pytest.mark.parametrize("share", [1, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 37])
def test_row_bits(isa, D, share, window):
    """A row of a long call has the bits that it has alone, in a piece of any length, recorded or not, in a cache with room to spare."""
    S, G = 330, 2
    q, k, v = random(2, S, G * share, D), random(2, S, G, D), random(2, S, G, D, seed=1)
    y = ops.attention(q, k, v, True, window=window)
    np.testing.assert_array_equal(ops.attention(Tensor(q, requires_grad=True), k, v, True, window=window).numpy(), y)
    room = np.full((2, 2, 700, G, D), np.nan, np.float32)
    room[0, :, :S], room[1, :, :S] = k, v
    for first, n in ((0, 1), (40, 1), (255, 3), (256, 1), (64, 70), (319, 11)):
        want, piece, end = y[:, first : first + n], q[:, first : first + n], first + n
        np.testing.assert_array_equal(ops.attention(piece, k[:, :end], v[:, :end], True, window=window), want)
        lengths = np.full(2, end, np.int32)
        np.testing.assert_array_equal(ops.attention(piece, *room, True, lengths=lengths, window=window), want)
        recorded = ops.attention(Tensor(piece, requires_grad=True), k[:, :end], v[:, :end], True, window=window)
        np.testing.assert_array_equal(recorded.numpy(), want)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.int8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("T", [1, 3, 80])
@pytest.mark.parametrize(("share", "D", "E"), [(1, 64, 64), (4, 128, 128), (3, 31, 7), (12, 20, 40)])
def test_kinds(isa, threads, dtype, T, share, D, E):
    """Keys and values in bfloat16 or int8 give the bits of the float32 numbers that they stand for, on any number of threads."""
    append = oracle("cache_append")
    B, S, G = 3, 700, 2
    k, v = (append.packed(random(B, S, G, n, seed=i), dtype) for i, n in enumerate((D, E)))
    q, n = random(B, T, G * share, D), np.array([690, 300, 85], np.int32)
    want = ops.attention(q, append.unpacked(k), append.unpacked(v), True, lengths=n)
    for count in (1, 3):
        _C.set_num_threads(count)
        np.testing.assert_array_equal(ops.attention(q, k, v, True, lengths=n), want)
    for b in range(B):
        one = slice(b, b + 1)
        np.testing.assert_array_equal(ops.attention(q[one], k[one, : n[b]], v[one, : n[b]], True), want[one])


def test_views(isa):
    """Pieces of a fused projection and slices of a cache give the bits of their contiguous copies."""
    B, T, H, G, D = 2, 70, 4, 2, 20
    fused = random(B, T, (H + 2 * G) * D)
    q, k, v = (_piece(fused, a, b, D) for a, b in ((0, 4), (4, 6), (6, 8)))
    assert not q.flags.c_contiguous
    assert np.shares_memory(q, fused)
    for a, b in zip(gradients(q, k, v, True), gradients(q.copy(), k.copy(), v.copy(), True), strict=True):
        np.testing.assert_array_equal(a, b)
    cache = random(2, B, 400, G, D)
    for last in (1, T):
        y = ops.attention(q[:, :last], cache[0][:, :300], cache[1][:, :300], True)
        copies = [x.copy() for x in (q[:, :last], cache[0][:, :300], cache[1][:, :300])]
        np.testing.assert_array_equal(y, ops.attention(*copies, True))
        np.testing.assert_array_equal(ops.attention(q[:, :last], *(c[:, :300] for c in cache), True), y)
    heads_first = q.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)  # a layout that the kernel does not walk
    np.testing.assert_array_equal(ops.attention(heads_first, k, v), ops.attention(q.copy(), k, v))
    bias = random(1, H, 2 * T, T + 5)
    np.testing.assert_array_equal(
        ops.attention(q, k, v, bias=bias[:, :, T:, 5:]), ops.attention(q, k, v, bias=bias[:, :, T:, 5:].copy())
    )


def _piece(fused, begin, end, D):
    B, T, _ = fused.shape
    x = fused[:, :, begin * D : end * D]
    return np.lib.stride_tricks.as_strided(x, (B, T, end - begin, D), (*x.strides[:2], D * 4, 4))


@pytest.mark.parametrize("T", [1, 5, 80])
def test_beyond_lengths(isa, T):
    """Keys and values at lengths[b] and beyond are never read: they may hold anything."""
    q, k, v = random(2, T, 4, 16), random(2, 300, 2, 16), random(2, 300, 2, 16, seed=1)
    n = np.array([290, 83], np.int32)
    clean = (ops.attention(q, k, v, True, lengths=n), *gradients(q, k, v, True, lengths=n))
    for b in range(2):
        k[b, n[b] :] = v[b, n[b] :] = np.nan
    for a, b in zip(clean, (ops.attention(q, k, v, True, lengths=n), *gradients(q, k, v, True, lengths=n)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not clean[2][1, n[1] :].any()
    assert not clean[4][1, n[1] :].any()


@pytest.mark.parametrize("T", [2, 80])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(isa, T, bad):
    """A value that is not finite reaches the queries that see it, and no other."""
    q, k, v = random(1, T, 2, 16), random(1, 100, 2, 16), random(1, 100, 2, 16, seed=1)
    clean = ops.attention(q, k, v, True)
    at = 99 if T == 2 else 60
    first = at - (100 - T)  # the first query that sees it
    v[0, at, 1, 3] = bad
    y = ops.attention(q, k, v, True)
    assert not np.isfinite(y[0, first:, 1, 3]).any()
    np.testing.assert_allclose(y[0, :first], clean[0, :first], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(y[0, :, 0], clean[0, :, 0])
    v[0, at, 1, 3] = 0.0
    k[0, at, 1, 3] = np.nan
    y = ops.attention(q, k, v, True)
    assert np.isnan(y[0, first:, 1]).all()
    np.testing.assert_allclose(y[0, :first], clean[0, :first], rtol=1e-6, atol=1e-6)
    k[0, at, 1, 3] = 0.0
    q[0, T - 1, 0, 0] = np.nan
    y = ops.attention(q, k, v, True)
    assert np.isnan(y[0, T - 1, 0]).all()
    assert np.isfinite(y[0, : T - 1]).all()
    assert np.isfinite(y[0, T - 1, 1]).all()


@pytest.mark.parametrize("T", [1, 4, 70])
def test_sees_nothing(isa, T):
    """Zeros and zero gradients: no keys, no position, a bias of -inf throughout."""
    q, k, v = random(2, T, 2, 16), random(2, 90, 2, 16), random(2, 90, 2, 16, seed=1)
    results = gradients(q, k, v, lengths=np.array([0, 90], np.int32))
    assert all(not x[0].any() for x in results)
    assert results[0][1].any()
    bias = random(1, 2, T, 90)
    bias[:, 0, T - 1] = -np.inf
    y, dq, _, _, dbias = gradients(q, k, v, bias=bias)
    assert not y[:, T - 1, 0].any()
    assert not dq[:, T - 1, 0].any()
    assert not dbias[:, 0, T - 1].any()
    assert np.isfinite(dbias).all()
    assert np.isfinite(dq).all()
    assert y[:, :, 1].all()
    short = ops.attention(q, k, v, True, lengths=np.array([T - 1, 90], np.int32))
    assert not short[0, 0].any()
    assert short[1].all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("T", [1, 40])
def test_scale(isa, scale, biased, T):
    x = {"q": random(6, T, 4, 16), "k": random(6, 50, 4, 16), "v": random(6, 50, 4, 16, seed=1), "scale": scale}
    x["bias"] = random(6, 4, T, 50) if biased else None
    ref = oracle("attention")
    assert_close(ops.attention(**x), ref.forward(**widen(x)), ref.forward(**x), "scale")
    tensors = {n: Tensor(a, requires_grad=True) if isinstance(a, np.ndarray) else a for n, a in x.items()}
    y = ops.attention(**tensors)
    dy = random(*y.shape, seed=3)
    y.backward(dy)
    exact, naive = ref.backward(dy.astype(np.float64), **widen(x)), ref.backward(dy, **x)
    for name in exact:
        assert_close(tensors[name].grad, exact[name], naive[name], name)


def test_large_scores(isa):
    """Scores in the thousands: the largest takes all, nothing overflows."""
    for T in (1, 33):
        q, k, v = 100 * random(1, T, 2, 64), 100 * random(1, 70, 2, 64), random(1, 70, 2, 64, seed=1)
        best = np.einsum("bthd,bshd->bths", q.astype(np.float64), k.astype(np.float64)).argmax(-1)
        want = np.stack([v[0, best[0, :, h], h] for h in range(2)], axis=1)[None]
        np.testing.assert_allclose(ops.attention(q, k, v), want, rtol=1e-6)


@pytest.mark.parametrize("T", [1, 5, 31])
def test_large_bias_and_rows_that_fill_no_vector(isa, T):
    """Rows that only fill a tile up read a bias too: what it is must not matter, be it where exp ends (at 88.7)."""
    rng = np.random.default_rng(T)
    q, k, v = (Tensor(rng.standard_normal((1, n, 2, 32)).astype(np.float32), requires_grad=True) for n in (T, 32, 32))
    bias, dy = rng.uniform(88, 89.5, (1, 2, T, 32)).astype(np.float32), rng.standard_normal((1, T, 2, 32)).astype(np.float32)
    ops.attention(q, k, v, bias=bias).backward(dy)
    ref = oracle("attention")
    exact = ref.backward(dy.astype(np.float64), *(t.data.astype(np.float64) for t in (q, k, v)), bias=bias.astype(np.float64))
    for got, want in zip((q.grad, k.grad, v.grad), (exact[n] for n in ("q", "k", "v")), strict=True):
        assert np.abs(got - want).max() <= 4 * 90 * 2.0**-23 * np.abs(want).max()  # a score of 90 is rounded to 90 2^-24


def test_memory_of_the_backward_pass():
    """A long sequence goes through where its score matrix (4 GiB) would not be worth holding."""
    q, k, v = random(1, 16, 1, 8), random(1, 1 << 20, 1, 8), random(1, 1 << 20, 1, 8, seed=1)
    y, dq, _, dv = gradients(q, k, v)
    assert np.isfinite(y).all()
    assert np.isfinite(dq).all()
    np.testing.assert_allclose(dv.sum(axis=1), random(*y.shape, seed=9).sum(axis=1), rtol=1e-3, atol=1e-3)


def test_lengths_are_taken_at_the_call():
    """A cache advances its lengths in place between forward and backward."""
    q, k, v = random(1, 20, 2, 8), random(1, 40, 2, 8), random(1, 40, 2, 8, seed=1)
    n = np.array([30], np.int32)
    want = gradients(q, k, v, True, lengths=n.copy())
    tensors = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    y = ops.attention(*tensors, True, lengths=n)
    n[0] = 40
    y.backward(random(*y.shape, seed=9))
    for t, w in zip(tensors, want[1:], strict=True):
        np.testing.assert_array_equal(t.grad, w)


def test_refuses():
    q, k, v = random(2, 5, 6, 16), random(2, 7, 3, 16), random(2, 7, 3, 8)
    attention = ops.attention
    with pytest.raises(ValueError, match=r"\[attention\] k must be \(B, S, G, D\) = \(2, 7, 3, 16\), got \(2, 7, 3, 12\)"):
        attention(q, k[..., :12].copy(), v)
    with pytest.raises(ValueError, match=r"\[attention\] v must be \(B, S, G, E\) = \(2, 7, 3, 8\), got \(2, 6, 3, 8\)"):
        attention(q, k, v[:, :6])
    with pytest.raises(ValueError, match=r"H a multiple of k's 3 heads, got \(2, 5, 5, 16\)"):
        attention(q[:, :, :5], k, v)
    with pytest.raises(ValueError, match=r"\[attention\] q must have 4 axes, got shape \(5, 6, 16\)"):
        attention(q[0], k, v)
    with pytest.raises(TypeError, match=r"\[attention\] v must be int8 as k is, got float32"):
        attention(q, np.zeros((2, 7, 3, 20), np.int8), v)
    with pytest.raises(ValueError, match=r"\[attention\] k must be \(B, S, G, D \+ 4\) = \(2, 7, 3, 20\), got \(2, 7, 3, 16\)"):
        attention(q, k.astype(np.int8), k.astype(np.int8))
    half = k.astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match=r"\[attention\] k and v must be float32 where a gradient is wanted, got bfloat16"):
        attention(Tensor(q, requires_grad=True), half, half)
    with pytest.raises(TypeError, match=r"\[attention\] v must be float32, got float64"):
        attention(q, k, v.astype(np.float64))
    with pytest.raises(TypeError, match=r"\[attention\] q must be a NumPy array or a Tensor, got list"):
        attention(q.tolist(), k, v)
    with pytest.raises(ValueError, match=r"\[attention\] bias must be \(1 or B, 1 or H, T, S\) with .* got \(1, 2, 5, 7\)"):
        attention(q, k, v, bias=random(1, 2, 5, 7))
    with pytest.raises(ValueError, match=r"\[attention\] bias must be .* got \(1, 6, 1, 7\)"):
        attention(q, k, v, bias=random(1, 6, 1, 7))
    with pytest.raises(TypeError, match=r"\[attention\] bias must be float32, got bool"):
        attention(q, k, v, bias=np.ones((1, 1, 5, 7), bool))
    with pytest.raises(TypeError, match=r"\[attention\] lengths must be int32, got int64"):
        attention(q, k, v, lengths=np.array([5, 7]))
    with pytest.raises(ValueError, match=r"\[attention\] lengths must be \(B,\) = \(2,\), got \(3,\)"):
        attention(q, k, v, lengths=np.array([5, 7, 7], np.int32))
    for wrong in ([5, 8], [-1, 7]):
        with pytest.raises(ValueError, match=r"\[attention\] lengths must be from 0 to S = 7, got"):
            attention(q, k, v, lengths=np.array(wrong, np.int32))
    for wrong_window in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=r"\[attention\] window must be a whole number of keys, at least 1, or None, got"):
            attention(q, k, v, True, window=wrong_window)
    with pytest.raises(ValueError, match=r"\[attention\] scale must be"):
        attention(q, k, v, scale=float("nan"))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 20)])
@pytest.mark.parametrize("share", [1, 3])
def test_packed(isa, threads, causal, window, share):
    """Sequences one behind the other give the bits of each alone, and gradients as exact, on any number of threads."""
    sizes, G, D = [1, 16, 0, 130, 7, 64, 300], 2, 24
    R, offsets = sum(sizes), np.cumsum([0, *sizes]).astype(np.int32)
    fused = random(R, 1, (share + 2) * G * D)
    q, k, v = (_piece(fused, a * G, b * G, D)[:, 0] for a, b in ((0, share), (share, share + 1), (share + 1, share + 2)))
    dy = random(R, G * share, D, seed=7)
    kwargs = {"causal": causal, "window": window}
    results = []
    for n in (1, 3):
        _C.set_num_threads(n)
        tensors = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        y = ops.attention_packed(*tensors, offsets, **kwargs)
        y.backward(dy)
        np.testing.assert_array_equal(ops.attention_packed(q, k, v, offsets, **kwargs), y.numpy())
        results.append((y.numpy(), *(t.grad for t in tensors)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    ref, exact, naive = oracle("attention"), [], []
    for a, b in itertools.pairwise(offsets):
        x = dict(zip("qkv", (t[None, a:b].copy() for t in (q, k, v)), strict=True)) | kwargs
        y = ops.attention(*(Tensor(x[n], requires_grad=True) for n in "qkv"), **kwargs)
        np.testing.assert_array_equal(y.numpy()[0], results[0][0][a:b])
        exact.append(ref.backward(dy[None, a:b].astype(np.float64), **widen(x)))
        naive.append(ref.backward(dy[None, a:b], **x))
    for name, gradient in zip("qkv", results[0][1:], strict=True):
        want, bound = (np.concatenate([x[name][0] for x in part]) for part in (exact, naive))
        assert_close(gradient, want, bound, name)


PAGED = pytest.mark.parametrize("case", oracle("attention").PAGED, ids=case_id)
STORES = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=["float32", "bfloat16", "int8"])


@PAGED
def test_pages(isa, case):
    """Keys and values in pages against the oracle; what belongs to no key is nan and is not read."""
    ref = oracle("attention")
    x, plain = ref.paged(case, rng(case)), ref.together(ref.paged(case, rng(case), 0.0))
    assert_close(ops.attention(**x), ref.forward(**widen(plain)), ref.forward(**plain), "pages")


@STORES
@PAGED
def test_pages_have_the_bits_of_one_array(isa, threads, case, dtype):
    """Whatever the cache's type, on any number of threads, and through a table whose rows are part of longer ones."""
    ref, append = oracle("attention"), oracle("cache_append")
    x = ref.paged(case, rng(case), 0.0)
    plain = ref.together(x)
    for name in ("k", "v"):
        x[name], plain[name] = append.packed(x[name], dtype), append.packed(plain[name], dtype)
    want = ops.attention(**plain)
    wide = np.concatenate([x["table"], np.full((len(x["table"]), 3), 9999, np.int32)], axis=1)[:, :-3]
    for n in (1, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.attention(**x), want)
        np.testing.assert_array_equal(ops.attention(**x | {"table": wide}), want)


def test_pages_recorded(isa):
    """A step through pages, replayed while sequences grow and are given more of them."""
    ref, B, S, page = oracle("attention"), 2, 256, 64
    k, v = np.full((7, page, 2, 16), np.nan, np.float32), np.full((7, page, 2, 16), np.nan, np.float32)
    pages = np.array([[5, 0, 3, -1], [2, 1, 4, 6]], np.int32)
    table, n = np.full_like(pages, -1), np.array([60, 63], np.int32)
    keys, values = random(B, S, 2, 16), random(B, S, 2, 16, seed=1)
    q, new = random(B, 1, 4, 16), np.zeros((2, B, 1, 2, 16), np.float32)

    def write():
        for b in range(B):
            new[0, b], new[1, b], table[b, : n[b] // page + 1] = keys[b, n[b]], values[b, n[b]], pages[b, : n[b] // page + 1]

    def step():
        ops.cache_append(k, v, new[0], new[1], n, table)
        ops.advance(n, 1, out=n)
        return ops.attention(q, k, v, True, lengths=n, table=table)

    write()
    for b in range(B):
        ops.cache_append(k, v, keys[b : b + 1, : n[b]], values[b : b + 1, : n[b]], np.zeros(1, np.int32), table[b : b + 1])
    recording = backend.Recording(step)
    for _ in range(130):
        want = ref.forward(*(a.astype(np.float64) for a in (q, keys, values)), True, lengths=n)
        np.testing.assert_allclose(recording.result, want, rtol=1e-5, atol=1e-5)
        write()
        recording.run()
    assert n.tolist() == [191, 194]


def test_pages_refuses():
    q, k, n = random(2, 1, 4, 8), random(5, 64, 2, 8), np.array([100, 10], np.int32)
    table = np.array([[0, 4], [2, -7]], np.int32)
    assert ops.attention(q, k, k, True, lengths=n, table=table).shape == (2, 1, 4, 8)
    for wrong, said in ([[0, 5], [2, 0]], "0 to 5"), ([[0, -1], [2, 0]], "-1 to 2"):
        with pytest.raises(ValueError, match=rf"\[attention\] table must have numbers from 0 to pages - 1 = 4 .*, got {said}"):
            ops.attention(q, k, k, True, lengths=n, table=np.array(wrong, np.int32))
    with pytest.raises(ValueError, match=r"\[attention\] table must have numbers from 0 to pages - 1 = 4 .*, got -7 to 4"):
        ops.attention(q, k, k, True, table=table)
    with pytest.raises(ValueError, match=r"\[attention\] table must be \(B, blocks\) with B = 2, got \(1, 2\)"):
        ops.attention(q, k, k, True, table=table[:1])
    with pytest.raises(TypeError, match=r"\[attention\] table must be int32, got int64"):
        ops.attention(q, k, k, True, table=table.astype(np.int64))
    with pytest.raises(ValueError, match=r"\[attention\] a page must hold a multiple of 64 positions, got 63"):
        ops.attention(q, k[:, :63], k[:, :63], True, lengths=n, table=table)
    with pytest.raises(ValueError, match=r"\[attention\] lengths must be from 0 to S = 128, got 10 to 129"):
        ops.attention(q, k, k, True, lengths=np.array([129, 10], np.int32), table=table)
    with pytest.raises(ValueError, match=r"\[attention\] v must be \(pages, page, G, E\) = \(5, 64, 2, 8\), got \(4, 64, 2, 8\)"):
        ops.attention(q, k, k[:4], True, lengths=n, table=table)
    with pytest.raises(ValueError, match=r"\[attention\] table must be None where a gradient is wanted"):
        ops.attention(Tensor(q, requires_grad=True), k, k, True, lengths=n, table=table)


def test_packed_refuses():
    q, k = random(9, 4, 8), random(9, 2, 8)
    for wrong in ([0, 5], [1, 9], [0, 5, 3, 9], [], [9]):
        with pytest.raises(ValueError, match=r"\[attention_packed\] offsets must grow from 0 to R = 9, got"):
            ops.attention_packed(q, k, k, np.array(wrong, np.int32))
    with pytest.raises(TypeError, match=r"\[attention_packed\] offsets must be int32, got int64"):
        ops.attention_packed(q, k, k, np.array([0, 9]))
    with pytest.raises(ValueError, match=r"\[attention_packed\] k must be \(R, G, D\) = \(9, 2, 8\), got \(8, 2, 8\)"):
        ops.attention_packed(q, k[:8], k, np.array([0, 9], np.int32))
    with pytest.raises(ValueError, match=r"\[attention_packed\] v must be \(R, G, E\) = \(9, 2, 8\), got \(9, 1, 8\)"):
        ops.attention_packed(q, k, k[:, :1], np.array([0, 9], np.int32))
    with pytest.raises(ValueError, match=r"\[attention_packed\] q must have 3 axes, got shape \(1, 9, 4, 8\)"):
        ops.attention_packed(q[None], k, k, np.array([0, 9], np.int32))
    with pytest.raises(ValueError, match=r"\[attention_packed\] window must be"):
        ops.attention_packed(q, k, k, np.array([0, 9], np.int32), window=0)
    assert ops.attention_packed(q[:0], k[:0], k[:0], np.array([0], np.int32)).shape == (0, 4, 8)
