"""Matrix products and linear layers on the device in bfloat16, in every form that is compiled, and bits across batches."""

from __future__ import annotations

import importlib.util
import math

import ml_dtypes
import numpy as np
import pytest

from fastlm import ops
from fastlm.cuda.emulated import SCHEDULES, emulated
from fastlm.cuda.table import KERNELS
from fastlm.kernels.matmul import matmul_tiles as tiles
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.tensor import Tensor
from tests.gpu.build import gpu_build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter  # noqa: F401  before triton
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the Triton layer needs triton")

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = {tiles.WIDE: np.dtype(np.float32), tiles.HALF: np.dtype(BFLOAT16)}
SIZES = {"ANY": (70, 33, 41), "EVEN": (96, 80, 112), "LARGE": (144, 144, 80), "FEW": (7, 48, 272)}


def name(tile):
    return next(n for n in ("ANY", "PLAIN", "EVEN", "LARGE", "FEW", "FEW_WIDE") if getattr(tiles, n) == tile)


def forms():
    """One product for each compiled form."""
    for types, layout, tile, _ in tiles.products():
        sizes = SIZES["ANY" if name(tile) == "PLAIN" else name(tile).removesuffix("_WIDE")]
        yield pytest.param(types, layout, tile, sizes, id=f"{types} {layout} {name(tile)}")


def held(rng, shape, dtype):
    """Numbers that the dtype holds, as float32."""
    return rng.standard_normal(shape, np.float32).astype(dtype).astype(np.float32)


def assert_within(got, exact, allowed, dtype):
    """The bound of a chain in float32, and one rounding to the dtype."""
    rounding = (2.0**-8 if dtype == BFLOAT16 else 2.0**-23) * np.abs(exact)
    assert np.all(np.abs(got.astype(np.float64) - exact) <= allowed + rounding)


@needs_triton
@pytest.mark.parametrize(("types", "layout", "tile", "sizes"), list(forms()))
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_form(types, layout, tile, sizes, accumulate, monkeypatch):
    """c = or += a b; the guards around the arrays hold nan."""
    monkeypatch.setattr(tiles, "MANY", 4 if tile == tiles.LARGE else 96)
    (M, N, K), rng, dtypes = sizes, np.random.default_rng(0), [DTYPES[t] for t in types]
    a, b, c = (held(rng, s, d) for s, d in zip(((M, K), (K, N), (M, N)), dtypes, strict=True))
    assert tiles.form(types, layout, {"M": M, "N": N, "K": K}, 1)[0] == tile
    with emulated(twin="triton") as on:
        there = [on.put(np.ascontiguousarray(x.T if t else x).astype(d)) for x, t, d in zip((a, b), layout, dtypes, strict=False)]
        out = on.put(c.astype(dtypes[2]))
        storage = 1 if dtypes[1] == BFLOAT16 else 0
        on.table.matmul(out, None, *there, None, None, 1, M, N, K, 0, 0, *layout, storage, accumulate, 0)
        got = out.numpy()
    exact = a.astype(np.float64) @ b.astype(np.float64) + (c if accumulate else 0)
    assert_within(got, exact, bound(a, b) + (2.0**-23 * np.abs(c) if accumulate else 0), dtypes[2])


@needs_triton
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
def test_linear_bfloat16(activation):
    """Forward and backward in bfloat16 against float32 on the CPU; the gradients of the parameters are float32."""
    rng = np.random.default_rng(1)
    shapes = {"x": (3, 5, 48), "weight": (32, 48), "bias": (32,), "residual": (3, 5, 32)}
    arrays = {n: held(rng, s, BFLOAT16) for n, s in shapes.items()}
    dy = held(rng, (3, 5, 32), BFLOAT16)

    def run(put, dy):
        tensors = {n: Tensor(put(v), requires_grad=True) for n, v in arrays.items()}
        y = ops.linear(**tensors, activation=activation)
        y.backward(dy)
        return y.data, *(t.grad for t in tensors.values())

    want = run(lambda v: v, dy)
    with emulated(twin="triton") as on:
        got = [x.numpy() for x in run(lambda v: on.put(v.astype(BFLOAT16)), on.put(dy.astype(BFLOAT16)))]
    assert [g.dtype == BFLOAT16 for g in got[:1]] == [True]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g.astype(np.float32), w, rtol=2.0**-6, atol=2.0**-6 * float(np.abs(w).max()))


def exact_activation(z, kind):
    """act(z) and act'(z) in float64, by erfc and exp of what is not positive: nothing cancels."""
    if kind == "gelu":
        phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
        return z * phi, phi + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    u, du = z, 1.0
    if kind == "gelu_tanh":
        u, du = (math.sqrt(8 / math.pi) * v for v in (z + 0.044715 * z**3, 1 + 3 * 0.044715 * z * z))
    e = np.exp(-np.abs(u))
    s, rest = np.where(u < 0, e, 1) / (1 + e), np.where(u < 0, 1, e) / (1 + e)
    return z * s, s + z * s * rest * du


@needs_triton
@pytest.mark.parametrize("twin", ["triton", "cuda"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_tails(twin, kind):
    """From -12 to 12 activations keep their relative precision, and their derivatives in the tails."""
    z = np.linspace(-12, 12, 241, dtype=np.float32)
    folder = KERNELS.parent / "build/emulated"
    gpu_build().emulate("matmul", folder)
    with emulated(twin=twin, libraries=folder) as on:
        x, w = Tensor(on.put(np.ones((17, 1), np.float32))), Tensor(on.put(z[:, None].copy()), requires_grad=True)
        y = ops.linear(x, w, activation=kind)
        y.backward(on.put(np.eye(17, dtype=np.float32)[:, :1] * np.ones(241, np.float32)))
        got, slope = y.data.numpy(), w.grad.numpy()[:, 0]
        assert ("matmul_fp32_fp32_fp32_nt" in on.launched["matmul"]) == (twin == "cuda")
    value, derivative = exact_activation(z.astype(np.float64), kind)
    np.testing.assert_allclose(got, np.tile(value, (17, 1)), rtol=2e-5, atol=1e-37)
    tails = np.abs(z) > 3
    np.testing.assert_allclose(slope[tails], derivative[tails], rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(slope[~tails], derivative[~tails], atol=1e-6)


@needs_triton
def test_refuses():
    """Dtypes that do not go together, and sizes of a step between matrices."""
    with emulated(twin="triton") as on:
        wide, half = on.put(np.ones((4, 4), np.float32)), on.put(np.ones((4, 4), BFLOAT16))
        with pytest.raises(TypeError, match=r"a, b and c must be float32 or bfloat16 that go together, got bfloat16, float32"):
            ops.linear(half, wide)
        with pytest.raises(TypeError, match=r"\[matmul\] bias must be bfloat16, as the rows are, got float32"):
            ops.linear(half, half, wide[0])
        with pytest.raises(ValueError, match=r"must follow one another, 16 elements, got a step of 8"):
            on.table.matmul(wide, None, wide, wide, None, None, 2, 4, 4, 4, 8, 16, False, False, 0, False, 0)


@needs_triton
@pytest.mark.parametrize(
    ("counts", "N", "K", "dtypes"),
    [
        ((3, 0, 70, 1, 5), 33, 17, "ff"),
        ((3, 0, 70, 1, 5), 48, 32, "fb"),
        ((70, 0, 0, 9), 33, 17, "bb"),
        ((0, 65, 2), 80, 48, "bb"),
        ((200, 130, 0), 144, 32, "bb"),
        ((1, 0, 0, 1), 48, 160, "bb"),
        ((1, 0, 0, 1), 48, 64, "ff"),
        ((1,) * 34, 16, 16, "ff"),
        ((0, 0), 5, 6, "ff"),
    ],
)
def test_grouped(counts, N, K, dtypes, monkeypatch):
    """Runs of rows times their own matrices, and both gradients; the weights' arrays lie anywhere."""
    monkeypatch.setattr(tiles, "MANY", 4)
    rng, E, P = np.random.default_rng(2), len(counts), sum(counts)
    row, weight = (np.dtype(BFLOAT16 if d == "b" else np.float32) for d in dtypes)
    x, dy, w = held(rng, (P, K), row), held(rng, (P, N), row), held(rng, (E, N, K), weight)
    spans = [slice(sum(counts[:e]), sum(counts[: e + 1])) for e in range(E)]
    with emulated(twin="triton") as on:
        there, n = [on.put(w[e].astype(weight)) for e in reversed(range(E))][::-1], on.put(np.array(counts, np.int64))
        xs, dys = on.put(x.astype(row)), on.put(dy.astype(row))
        y, z, dx = on.empty((P, N), row), on.empty((P, N), row), on.empty((P, K), row)
        dws = [on.put(np.ones((N, K), np.float32)) for _ in counts]
        on.table.grouped_linear(y, z, xs, n, there, [0] * E, [0] * E, 4)
        on.table.grouped_linear_dx(dx, dys, n, there)
        if dtypes != "fb":
            on.table.grouped_linear_dweights(dws, dys, xs, n)
        got = y.numpy(), z.numpy(), dx.numpy()
        for e, s in enumerate(spans):
            exact = x[s].astype(np.float64) @ w[e].astype(np.float64).T
            assert_within(got[1][s], exact, bound(x[s], w[e].T), row)
            assert_within(got[0][s], np.maximum(exact, 0), bound(x[s], w[e].T), row)
            assert_within(got[2][s], dy[s].astype(np.float64) @ w[e].astype(np.float64), bound(dy[s], w[e]), row)
            if dtypes != "fb":
                exact = dy[s].T.astype(np.float64) @ x[s].astype(np.float64) + 1
                assert_within(dws[e].numpy(), exact, bound(dy[s].T, x[s]) + 2.0**-22, np.dtype(np.float32))
    from fastlm.cuda.images import variant
    from fastlm.kernels.matmul.matmul_triton import variants

    listed = {variant(*v) for v in variants()}
    assert on.launched.get("matmul", set()) <= listed


CUDA = [
    # M, N, K, batch, types, layout, capability -> the kernel
    ((70, 33, 41), 1, "fff", "nn", 9, "matmul_fp32_fp32_fp32_nn"),
    ((150, 140, 36), 2, "fff", "nt", 9, "matmul_fp32_fp32_fp32_nt"),
    ((150, 140, 17), 1, "fff", "tn", 9, "matmul_fp32_fp32_fp32_tn"),
    ((20, 30, 50), 1, "fbf", "nt", 9, "matmul_fp32_bf16_fp32_nt"),
    ((20, 32, 50), 1, "fbf", "nn", 9, "matmul_fp32_bf16_fp32_nn"),
    ((150, 200, 72), 2, "bbb", "nn", 8, "matmul_bf16_bf16_bf16_nn"),
    ((150, 199, 200), 1, "bbb", "nt", 8, "matmul_bf16_bf16_bf16_nt"),
    ((136, 200, 37), 2, "bbb", "tn", 8, "matmul_bf16_bf16_bf16_tn"),
    ((150, 131, 200), 1, "bbf", "nt", 8, "matmul_bf16_bf16_fp32_nt"),
    ((136, 200, 37), 1, "bbf", "tn", 8, "matmul_bf16_bf16_fp32_tn"),
    ((150, 200, 72), 1, "bbb", "nn", 9, "hopper_bf16_nn_128"),
    ((300, 264, 104), 1, "bbb", "nn", 9, "hopper_bf16_nn_256"),
    ((150, 199, 328), 1, "bbb", "nt", 9, "hopper_bf16_nt_128"),
    ((300, 301, 72), 1, "bbb", "nt", 9, "hopper_bf16_nt_256"),
    ((300, 301, 72), 1, "bbf", "nt", 9, "hopper_fp32_nt_256"),
    ((136, 200, 77), 1, "bbf", "tn", 9, "hopper_fp32_tn_128"),
    ((296, 264, 77), 1, "bbf", "tn", 9, "hopper_fp32_tn_256"),
]


@pytest.mark.parametrize(("sizes", "batch", "types", "layout", "major", "kernel"), CUDA, ids=[c[-1] for c in CUDA])
def test_cuda(sizes, batch, types, layout, major, kernel, monkeypatch):
    """Each CUDA C++ kernel under every schedule: the product with all that may follow it, and added to what is there."""
    folder = KERNELS.parent / "build/emulated"
    gpu_build().emulate("matmul", folder)
    (M, N, K), rng = sizes, np.random.default_rng(3)
    dtypes = [np.dtype(BFLOAT16 if t == "b" else np.float32) for t in types]
    a, b, c = (held(rng, (batch, *s), d) for s, d in zip(((M, K), (K, N), (M, N)), dtypes, strict=True))
    bias, residual = held(rng, (N,), dtypes[0]), held(rng, (batch, M, N), dtypes[2])
    product = a.astype(np.float64) @ b.astype(np.float64)
    allowed = np.stack([bound(a[i], b[i]) for i in range(batch)])
    transposed = [t == "t" for t in layout]
    for seed in SCHEDULES:
        with emulated(twin="cuda", libraries=folder, seed=seed) as on:
            monkeypatch.setattr(on, "capability", (major, 0), raising=False)
            stored = [x.swapaxes(1, 2) if t else x for x, t in zip((a, b), transposed, strict=True)]
            xs, ws = (on.put(np.ascontiguousarray(x).astype(d)) for x, d in zip(stored, dtypes, strict=False))
            out, z, more = on.empty(c.shape, dtypes[2]), on.empty(c.shape, dtypes[2]), on.put(c.astype(dtypes[2]))
            rest = on.put(bias.astype(dtypes[0])), on.put(residual.astype(dtypes[2]))
            step = (M * K, K * N) if batch > 1 else (0, 0)
            on.table.matmul(out, z, xs, ws, *rest, batch, M, N, K, *step, *transposed, 0, False, 4)
            on.table.matmul(more, None, xs, ws, None, None, batch, M, N, K, *step, *transposed, 0, True, 0)
            assert on.launched == {"matmul": {kernel}}
            assert_within(z.numpy(), product + bias, allowed + 2.0**-22, dtypes[2])
            exact = np.maximum(product + bias, 0) + residual
            assert_within(out.numpy(), exact, allowed + 2.0**-22 * (1 + np.abs(residual)), dtypes[2])
            assert_within(more.numpy(), product + c, allowed + 2.0**-22 * (1 + np.abs(c)), dtypes[2])
