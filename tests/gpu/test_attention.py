"""Attention on the emulated device, beyond the cases of the CPU: bfloat16, caches, pages, packed sequences, decoding."""

from __future__ import annotations

import importlib.util
import itertools

import ml_dtypes
import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.cuda.emulated import SCHEDULES, Emulated, emulated
from fastlm.cuda.table import KERNELS
from fastlm.tensor import Tensor
from fastlm.testing import assert_close, case_id, cases, check_forward, oracle, rng, widen
from tests.gpu.build import gpu_build

if importlib.util.find_spec("triton") is not None:
    import fastlm.cuda.interpreter  # noqa: F401  before triton
FOLDER = KERNELS.parent / "build/emulated"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=["triton", "cuda"])
def on(request):
    """The device, with each twin."""
    before = Emulated.damaged
    for op in ("attention", "add"):
        gpu_build().emulate(op, FOLDER)
    with emulated(twin=request.param, libraries=FOLDER, seed=2) as device, np.errstate(all="ignore"):
        yield device
    assert Emulated.damaged == before, "memory outside of an array was written"


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def near(got, want, what="y", tolerance=2.0**-7):
    """bfloat16 arithmetic: a rounding of each factor, and one of the result."""
    got = got.astype(np.float64)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max()), (what, np.abs(got - want).max())


@pytest.mark.parametrize(("T", "D", "E"), [(1, 64, 64), (3, 128, 80), (40, 64, 64), (20, 16, 40)])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [np.float32, BFLOAT16, np.int8], ids=["float32", "bfloat16", "int8"])
def test_caches(on, cache, narrow, T, D, E):
    """q of either type reads a cache of any; room beyond the lengths, which are read from memory, holds anything."""
    append, ref = oracle("cache_append"), oracle("attention")
    B, S, G, share = 2, 300, 2, 3
    n = np.array([281, 45], np.int32)
    q = random(B, T, G * share, D).astype(BFLOAT16 if narrow else np.float32)
    caches = [append.packed(random(B, S, G, w, seed=i), cache) for i, w in enumerate((D, E))]
    k, v = (append.unpacked(c).astype(np.float64) for c in caches)
    want = ref.forward(q.astype(np.float64), k, v, True, lengths=n)
    naive = ref.forward(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), True, lengths=n)
    for c in caches:
        for b in range(B):
            c[b, n[b] :] = -1 if cache is np.int8 else np.nan
    got = ops.attention(on.put(q), *map(on.put, caches), True, lengths=on.put(n)).numpy()
    if narrow:
        assert got.dtype == BFLOAT16
        near(got, want)
    else:
        assert_close(got, want, naive, "y")


@pytest.mark.parametrize("case", oracle("attention").PAGED, ids=case_id)
@pytest.mark.parametrize("how", ["triton", *SCHEDULES], ids=str)
def test_pages(how, case):
    """Keys and values in pages against the oracle, in CUDA C++ under every schedule; what belongs to no key is nan and is not read."""
    ref, before = oracle("attention"), Emulated.damaged
    for op in ("attention", "add"):
        gpu_build().emulate(op, FOLDER)
    x, plain = ref.paged(case, rng(case)), ref.together(ref.paged(case, rng(case), 0.0))
    twin, seed = ("triton", 0) if how == "triton" else ("cuda", how)
    with emulated(twin=twin, libraries=FOLDER, seed=seed) as device, np.errstate(all="ignore"):
        there = {name: device.put(a) if isinstance(a, np.ndarray) else a for name, a in x.items()}
        got = ops.attention(**there).numpy()
    assert_close(got, ref.forward(**widen(plain)), ref.forward(**plain), "pages")
    assert Emulated.damaged == before, "memory outside of an array was written"


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [np.float32, BFLOAT16, np.int8], ids=["float32", "bfloat16", "int8"])
def test_pages_have_the_bits_of_one_array(on, cache, narrow, T):
    """Of every kind of cache; a number that is no page's reads nothing outside, and changes no other sequence."""
    ref, append = oracle("attention"), oracle("cache_append")
    x = ref.paged(
        {"shape": (3, T, 320, 4, 2, 64), "causal": True, "lengths": (300, 70, 130), "page": 64}, np.random.default_rng(T), 0.0
    )
    plain = ref.together(x)
    for name in ("k", "v"):
        x[name], plain[name] = append.packed(x[name], cache), append.packed(plain[name], cache)
    for y in (x, plain):
        y["q"] = y["q"].astype(BFLOAT16 if narrow else np.float32)
    put = lambda y: {name: on.put(a) if isinstance(a, np.ndarray) else a for name, a in y.items()}  # noqa: E731
    want = ops.attention(**put(plain)).numpy()
    got = ops.attention(**put(x)).numpy()
    np.testing.assert_array_equal(got, want)
    for wrong in (-1, 15, 2**31 - 1):
        table = x["table"].copy()
        table[1, 1] = wrong
        bad = ops.attention(**put(x | {"table": table})).numpy()
        np.testing.assert_array_equal(bad[::2], want[::2])


@pytest.mark.parametrize("paged", [False, True], ids=["one array", "pages"])
def test_growing_sequences_are_replayed(on, paged):
    """A captured step appends and attends while the lengths, and the table of pages, grow in memory."""
    ref, B, S, page = oracle("attention"), 2, 256, 64
    pages = np.array([[5, 0, 3, -1], [2, 1, 4, 6]], np.int32)
    keys, values = random(B, S, 2, 32), random(B, S, 2, 32, seed=1)
    shape = (7, page, 2, 32) if paged else (B, S, 2, 32)
    k, v = (on.put(np.full(shape, np.nan, BFLOAT16)) for _ in range(2))
    table = on.put(np.full_like(pages, -1)) if paged else None
    counter, q = on.put(np.array([60, 63], np.int32)), on.put(random(B, 1, 4, 32).astype(BFLOAT16))
    new = [on.empty((B, 1, 2, 32), BFLOAT16) for _ in range(2)]

    def write(n):
        for a, source in zip(new, (keys, values), strict=True):
            backend.assign(a, on.put(np.stack([source[b, n[b]][None] for b in range(B)]).astype(BFLOAT16)))
        if paged:
            backend.assign(table, on.put(np.where(np.arange(4) * page <= n[:, None], pages, -1).astype(np.int32)))

    def step():
        ops.cache_append(k, v, *new, counter, table)
        ops.advance(counter, 1, out=counter)
        return ops.attention(q, k, v, True, lengths=counter, table=table)

    n = np.array([60, 63], np.int32)
    write(n)
    before = [on.put(a[:, :63].astype(BFLOAT16)) for a in (keys, values)]
    ops.cache_append(k, v, *before, on.put(np.zeros(B, np.int32)), table)
    recording = backend.record(step, on)
    for _ in range(6):
        n += 1
        x = [a.astype(BFLOAT16).astype(np.float64) for a in (keys, values)]
        near(recording.result.numpy(), ref.forward(q.numpy().astype(np.float64), *x, True, lengths=n))
        write(n)
        recording.spoil()
        recording.run()
    assert counter.numpy().tolist() == [67, 70]


@pytest.mark.parametrize("bias", [None, (1, 4)], ids=str)
def test_bfloat16(on, bias):
    """Forward and backward in bfloat16, with a bias in bfloat16 too."""
    ref = oracle("attention")
    B, T, S, H, G, D = 2, 70, 90, 4, 2, 32
    q, k, v = random(B, T, H, D), random(B, S, G, D), random(B, S, G, D, seed=1)
    x = {"q": q, "k": k, "v": v} | ({} if bias is None else {"bias": random(*bias, T, S)})
    x = {name: a.astype(BFLOAT16) for name, a in x.items()}
    tensors = {name: Tensor(on.put(a), requires_grad=True) for name, a in x.items()}
    y = ops.attention(**tensors, causal=True)
    dy = random(*y.shape, seed=3).astype(BFLOAT16)
    wide = {name: a.astype(np.float64) for name, a in x.items()}
    near(y.data.numpy(), ref.forward(**wide, causal=True))
    y.backward(on.put(dy))
    exact = ref.backward(dy.astype(np.float64), **wide, causal=True)
    for name, want in exact.items():
        near(tensors[name].grad.numpy(), want, name, 2.0**-6)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, 20)])
def test_packed(on, causal, window):
    """Sequences one behind the other, one of them empty: each as alone."""
    ref, sizes, H, G, D = oracle("attention"), [1, 40, 0, 70], 4, 2, 16
    R, offsets = sum(sizes), np.cumsum([0, *sizes]).astype(np.int32)
    q, k, v, dy = random(R, H, D), random(R, G, D), random(R, G, D, seed=1), random(R, H, D, seed=2)
    tensors = [Tensor(on.put(a), requires_grad=True) for a in (q, k, v)]
    y = ops.attention_packed(*tensors, offsets, causal, window=window)
    y.backward(on.put(dy))
    results = [y.data.numpy(), *(t.grad.numpy() for t in tensors)]
    again = ops.attention_packed(*(t.data for t in tensors), on.put(offsets), causal, window=window)
    np.testing.assert_array_equal(again.numpy(), results[0])
    parts = {True: [], False: []}
    for exact in parts:
        for a, b in itertools.pairwise(offsets):
            x = [t[None, a:b].astype(np.float64 if exact else np.float32) for t in (q, k, v, dy)]
            grads = ref.backward(x[3], *x[:3], causal, window=window)
            parts[exact].append([ref.forward(*x[:3], causal, window=window), *(grads[name] for name in "qkv")])
    for i, name in enumerate(("y", "dq", "dk", "dv")):
        assert_close(results[i], *(np.concatenate([p[i][0] for p in parts[e]]) for e in (True, False)), name)


def test_decoding_does_not_depend_on_the_batch(on):
    """A sequence alone, with the cache's capacity, gives the bits that it gives among others."""
    q, k, v = random(3, 1, 4, 32), random(3, 600, 2, 32), random(3, 600, 2, 32, seed=1)
    n = np.array([600, 3, 300], np.int32)
    together = ops.attention(*map(on.put, (q, k, v)), True, lengths=on.put(n)).numpy()
    for b in range(3):
        one = slice(b, b + 1)
        alone = ops.attention(*(on.put(x[one]) for x in (q, k, v)), True, lengths=on.put(n[one])).numpy()
        np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_views_and_scales(on, scale, T):
    """Pieces of a fused projection are read in place; a scale may be negative or zero; rows that see nothing give zeros."""
    ref, (B, H, G, D) = oracle("attention"), (2, 4, 2, 16)
    fused = random(B, T + 5, (H + 2 * G) * D)
    there = on.put(fused)[:, 5:]
    parts = [there[..., a * D : b * D] for a, b in ((0, 4), (4, 6), (6, 8))]
    views = [type(p)(on, (B, T, p.shape[2] // D, D), p.dtype, p.pointer, p.owner, (*p.strides[:2], 4 * D, 4)) for p in parts]
    x = [fused[:, 5:, a * D : b * D].reshape(B, T, b - a, D) for a, b in ((0, 4), (4, 6), (6, 8))]
    n = np.array([T, T - 1], np.int32)
    got = ops.attention(*views, True, scale=scale, lengths=on.put(n)).numpy()
    assert_close(got, *(ref.forward(*(a.astype(t) for a in x), True, scale, lengths=n) for t in (np.float64, np.float32)), "y")
    assert not got[1, 0].any()


@pytest.mark.parametrize("plant", ["NO_WAIT", "NO_BARRIER", "NO_WARP_BARRIER"])
def test_decoding_without_a_wait_or_a_barrier_is_caught(tmp_path, plant):
    """Each left out of the decoding kernels: some schedule shows it, while the right ones pass them all (test_twins, test_pages)."""
    for op in ("attention", "add"):
        gpu_build().emulate(op, tmp_path, (f"FASTLM_PLANT_DECODE_{plant}",))
    case, caught = {"shape": (2, 1, 300, 8, 2, 64), "causal": True, "lengths": (300, 41)}, 0
    for seed in SCHEDULES:
        with emulated(twin="cuda", libraries=tmp_path, seed=seed) as device:
            try:
                check_forward("attention", ops.attention, case, device.put)
            except AssertionError:
                caught += 1
    assert caught


def test_a_missing_wait_is_caught(tmp_path):
    """The forward pass without its wait for cp.async: some schedule shows it, while the right one passes them all (test_twins)."""
    gpu_build().emulate("attention", tmp_path, ("FASTLM_PLANT_NO_WAIT",))
    case, caught = cases("attention")[0], 0
    for seed in SCHEDULES:
        with emulated(twin="cuda", libraries=tmp_path, seed=seed) as device:
            try:
                check_forward(
                    "attention", lambda **x: ops.attention(**x | {"q": Tensor(x["q"], requires_grad=True)}).data, case, device.put
                )
            except AssertionError:
                caught += 1
    assert caught
