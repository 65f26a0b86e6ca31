"""Operations on bfloat16 arrays of the device against the same operations on float32 arrays of the CPU, and on views there."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import ops
from fastlm.checkpoint.quantized import FORMATS, WRITTEN, QuantizedArray, quantize
from fastlm.cuda.array import DeviceArray
from fastlm.cuda.emulated import emulated
from fastlm.cuda.images import variant
from fastlm.ops.activation import KINDS as ACTIVATIONS
from fastlm.tensor import Tensor
from fastlm.testing import oracle
from tests.gpu.build import ROOT, gpu_build
from tests.kernels.test_quantize import awkward

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
import fastlm.cuda.interpreter  # noqa: F401  before triton

BFLOAT16 = ml_dtypes.bfloat16
rng = np.random.default_rng(0)


def normal(*shape):
    """float32 numbers that bfloat16 holds."""
    return rng.standard_normal(shape, np.float32).astype(BFLOAT16).astype(np.float32)


ADDING = ("add_layer_norm", "add_rms_norm")


def coarse(*shape):
    """Numbers whose sums bfloat16 holds as well."""
    return np.rint(16 * normal(*shape)) / np.float32(16)


def tables(x, R):
    """Cosines and sines for rope where x is."""
    cos, sin = ops.rope_tables(R, 20)
    return (cos, sin) if isinstance(x.data if isinstance(x, Tensor) else x, np.ndarray) else map(x.data.device.put, (cos, sin))


# name -> (the call, the arrays with a gradient)
CALLS = {
    **{f"activation {kind}": (lambda x, kind=kind: ops.activation(x, kind), [normal(3, 700)]) for kind in ACTIVATIONS},
    "gated": (lambda gate, up: ops.gated(gate, up, "silu"), [normal(5, 33), normal(5, 33)]),
    "gated, whole vectors": (lambda gate, up: ops.gated(gate, up, "gelu"), [normal(2, 3, 48), normal(2, 3, 48)]),
    **{
        f"{op}, {C}": (getattr(ops, op), [normal(5, C), *(normal(C) for _ in range(count))])
        for C in (33, 48, 1056)
        for op, count in (("layer_norm", 2), ("rms_norm", 1))
    },
    **{
        f"rope {D}, {R}, interleaved {interleaved}": (
            lambda x, R=R, interleaved=interleaved: ops.rope(x, *tables(x, R), interleaved=interleaved),
            [normal(2, 3, 9, D)],
        )
        for D, R in ((64, 64), (33, 22))
        for interleaved in (False, True)
    },
    **{f"embedding {C}": (lambda weight: ops.embedding(np.array([3, 1, 3, 0]), weight), [normal(5, C)]) for C in (33, 48)},
    "rows of a product": (lambda x, w: ops.embedding(np.array([3, 1, 3, 0]), ops.linear(x, w)), [coarse(5, 16), coarse(33, 16)]),
    **{f"{op}, {C}": (getattr(ops, op), [coarse(5, C), coarse(5, C), normal(C)]) for C in (33, 48) for op in ADDING},
}


def libraries(twin):
    """Where the emulated CUDA C++ is, built where it is needed."""
    if twin == "triton":
        return None
    folder = ROOT / "build/emulated"
    for op in ("add", "layer_norm", "rms_norm"):
        gpu_build().emulate(op, folder)
    return folder


def outputs(call, arrays, dys=None):
    """What the call gives and the gradients of the arrays, as float32 on the host."""
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    ys = call(*tensors)
    ys = ys if isinstance(ys, tuple) else (ys,)
    got = [np.asarray(y.numpy() if isinstance(y.data, np.ndarray) else y.data.numpy(), np.float32) for y in ys]
    ys[0].backward(dys)
    for t in tensors:
        got.append(np.asarray(t.grad if isinstance(t.grad, np.ndarray) else t.grad.numpy(), np.float32))
    return got


@pytest.mark.parametrize(("name", "twin"), [(n, t) for n in CALLS for t in ("triton", "cuda") if t == "triton" or "norm" in n])
def test_bfloat16(name, twin):
    """The arrays are those that bfloat16 holds: only results are rounded, to 8 bits."""
    call, arrays = CALLS[name]
    dy = normal(*np.shape(call(*arrays)[0] if isinstance(call(*arrays), tuple) else call(*arrays)))
    want = outputs(call, arrays, dy)
    with emulated(twin=twin, libraries=libraries(twin)) as on:
        got = outputs(call, [on.put(a.astype(BFLOAT16)) for a in arrays], on.put(dy.astype(BFLOAT16)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2.0**-8, atol=2.0**-10 * max(1.0, float(np.abs(w).max(initial=0))))
    for op, launched in on.launched.items() if twin == "triton" else ():
        module = importlib.import_module(f"fastlm.kernels.{op}.{op}_triton")
        assert launched <= {variant(*v) for v in module.variants()}


@pytest.mark.parametrize(
    ("op", "C"), [*((op, C) for op in ("layer_norm", "rms_norm") for C in (4112, 8208, 8197)), *((op, 8208) for op in ADDING)]
)
def test_wide_norms(op, C, monkeypatch):
    """Rows that no thread keeps in registers, and whose sums do not fit into shared memory, in CUDA C++."""
    module = importlib.import_module(f"fastlm.kernels.{op.removeprefix('add_')}.{op.removeprefix('add_')}_gpu")
    monkeypatch.setattr(module, "WIDE", 8200)
    arrays = [normal(2, C), *([normal(2, C)] if op in ADDING else []), normal(C)]
    dy = normal(2, C)
    want = outputs(getattr(ops, op), arrays, dy)
    with emulated(twin="cuda", libraries=libraries("cuda")) as on:
        got = outputs(getattr(ops, op), [on.put(a) for a in arrays], on.put(dy))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twin", ["triton", "cuda"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_rows_of_a_piece(op, twin, monkeypatch):
    """Several rows to a piece, the last one with fewer; twice the same bits; a weight without a gradient."""
    monkeypatch.setattr(importlib.import_module(f"fastlm.kernels.{op}.{op}_gpu"), "PIECES", 3)
    for C in (48, 33):
        arrays, dy = [normal(10, C), normal(C)], normal(10, C)
        want = outputs(getattr(ops, op), arrays, dy)
        with emulated(twin=twin, libraries=libraries(twin)) as on:
            got = outputs(getattr(ops, op), [on.put(a) for a in arrays], on.put(dy))
            again = outputs(getattr(ops, op), [on.put(a) for a in arrays], on.put(dy))
            x = Tensor(on.put(arrays[0]), requires_grad=True)
            getattr(ops, op)(x, on.put(arrays[1])).backward(on.put(dy))
        for g, a, w in zip(got, again, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(g, a)
        np.testing.assert_allclose(x.grad.numpy(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("F", "order"), [(33, (0, 1)), (48, (0, 1)), (33, (1, 0))])
def test_gated_views(F, order):
    """Halves of one array, whose rows begin at whole vectors or not."""
    both = normal(5, 2 * F)
    spans = [slice(0, F), slice(F, 2 * F)]
    gate, up = (both[:, spans[i]] for i in order)
    dy = normal(5, F)
    want = outputs(lambda g, u: ops.gated(g, u, "gelu_tanh"), [gate, up], dy)
    with emulated(twin="triton") as on:
        there = on.put(both)
        got = outputs(lambda g, u: ops.gated(g, u, "gelu_tanh"), [there[:, spans[i]] for i in order], on.put(dy))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("F", [33, 48])
def test_gated_of_split(F):
    """Both halves of one array: their gradients are written into one array, which is the gradient of x."""
    x, dy = normal(2, 3, 2 * F), normal(2, 3, F)
    call = lambda x: ops.gated(*ops.split(x, (F, F)), "silu")  # noqa: E731
    want = outputs(call, [x], dy)
    with emulated(twin="triton") as on:
        got = outputs(call, [on.put(x)], on.put(dy))
        assert "add" not in on.launched
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("D", "extra"), [(32, 0), (32, 1), (31, 3)])
def test_rope_views(D, extra):
    """Heads out of a fused projection, at whole vectors or not, positions on the device; one out of range gives nan."""
    fused = normal(2, 5, 3 * D * 2 + extra)
    cos, sin = ops.rope_tables(30, 9)
    positions = rng.integers(0, 9, (2, 5), np.int32)
    strides = fused.strides
    start = (D + extra) * 4
    q = np.lib.stride_tricks.as_strided(fused.reshape(-1)[start // 4 :], (2, 5, 3, D), (*strides[:2], 4 * D, 4))
    want = ops.rope(q, cos, sin, positions)
    with emulated(twin="triton") as on:
        x = on.put(fused)
        view = DeviceArray(on, (2, 5, 3, D), x.dtype, x.pointer + start, x.owner, (*strides[:2], 4 * D, 4))
        c, s = on.put(cos), on.put(sin)
        np.testing.assert_allclose(ops.rope(view, c, s, on.put(positions)).numpy(), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(ops.rope(view, c, s, positions).numpy(), ops.rope(view, c, s, on.put(positions)).numpy())
        positions[1, 2] = 9
        got = ops.rope(view, c, s, on.put(positions)).numpy()
    assert np.isnan(got[1, 2, :, :30]).all()
    np.testing.assert_array_equal(np.isnan(got).any((2, 3)), positions == 9)


def test_embedding_in_pieces(monkeypatch):
    """More ids than are sorted at once, runs of one id longer than a tile; ids out of range give nan and no gradient; the same bits."""
    monkeypatch.setattr(importlib.import_module("fastlm.kernels.embedding.embedding_gpu"), "SORTED", 32)
    table, dy = normal(6, 40), normal(90, 40)
    ids = rng.integers(0, 5, 90)
    ids[20:60] = 2
    ids[7], ids[50], ids[80] = -1, 6, 1 << 40
    known = (ids >= 0) & (ids < 6)
    want = np.zeros((6, 40))
    np.add.at(want, ids[known], dy[known].astype(np.float64))
    with emulated(twin="triton") as on:
        for there in (on.put(ids), on.put(np.where(known, ids, -5).astype(np.int32))):
            grads = []
            for _ in range(2):
                weight = Tensor(on.put(table), requires_grad=True)
                y = ops.embedding(there, weight)
                y.backward(on.put(dy))
                grads.append(weight.grad.numpy())
            got = y.data.numpy()
            np.testing.assert_array_equal(got[known], table[ids[known]])
            assert np.isnan(got[~known]).all()
            np.testing.assert_allclose(grads[0], want, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(grads[0], grads[1])
        with pytest.raises(ValueError, match=r"\[embedding\] ids must be from 0 to 5"):
            ops.embedding(ids, weight)
        with pytest.raises(TypeError, match=r"weight must be on the device that ids are on"):
            ops.embedding(there, table)
        with pytest.raises(TypeError, match=r"dtype must be one of float32, got bfloat16"):
            ops.embedding(there, weight, BFLOAT16)


@pytest.mark.parametrize("new", [np.float32, BFLOAT16])
@pytest.mark.parametrize("held", [np.float32, BFLOAT16, np.int8])
@pytest.mark.parametrize(("G", "D", "E"), [(2, 16, 32), (9, 7, 70)])
def test_cache_kinds(G, D, E, held, new):
    """Exactly the oracle's rounding, of views and into views; ties, endless and tiny numbers; positions outside are left out."""
    ref = oracle("cache_append")
    k, v = normal(2, 3, G, D) * 3, normal(2, 3, G, E)
    k[0, 0, 0], k[0, 1, 1], k[1, 0, 0, 2], v[1, 1, 1, 0] = np.arange(D) / 2, 1e-39, np.inf, np.nan
    k[0, 0, 0, 1] = 127
    k, v = (x.astype(new).astype(np.float32) for x in (k, v))
    keys, values = (ref.packed(normal(2, 8, G, n), held) for n in (D, E))
    positions = np.array([[3, 0, 5], [6, 9, -1]], np.int32)
    want = [a.copy() for a in (keys, values)]
    for got, x in zip(want, (k, v), strict=True):
        for b, t in ((0, 0), (0, 1), (0, 2), (1, 0)):
            got[b, positions[b, t]] = ref.packed(x[b, t], held)
    with emulated(twin="triton") as on:
        both = on.put(np.concatenate([k.reshape(2, 3, -1), v.reshape(2, 3, -1)], -1).astype(new))
        there = [on.put(np.stack([a, a], 2)) for a in (keys, values)]
        views = [
            DeviceArray(on, (2, 3, G, n), both.dtype, part.pointer, part.owner, (*both.strides[:2], n * size, size))
            for n, part, size in ((D, both, both.dtype.itemsize), (E, both[..., G * D :], both.dtype.itemsize))
        ]
        ops.cache_append(there[0][:, :, 1], there[1][:, :, 1], *views, on.put(positions))
        got = [a.numpy() for a in there]
    for g, before, w in zip(got, (keys, values), want, strict=True):
        np.testing.assert_array_equal(g[:, :, 0].view(np.uint8), before.view(np.uint8))
        assert_same(ref.unpacked(np.ascontiguousarray(g[:, :, 1])), ref.unpacked(w))


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_rows(kind):
    """Rows of a table that stays quantised: the bits of the CPU, as float32 or rounded; random bytes, scales of every sort."""
    ref, C = oracle("dequantize"), 3 * FORMATS[kind][1]
    blocks = ref.random_blocks(kind, (40, C), np.random.default_rng(5))
    with np.errstate(all="ignore"):
        want = ref.forward(kind, (40, C), blocks)
    ids = rng.integers(0, 40, (2, 35))
    with emulated(twin="triton") as on:
        table = QuantizedArray(kind, (40, C), on.put(blocks))
        assert_same(table.dequantize().numpy(), want)
        got = ops.embedding(ids, table)
        assert got.dtype == np.float32
        assert_same(got.numpy(), want[ids])
        assert_same(ops.embedding(on.put(ids), table).numpy(), want[ids])
        rounded = ops.embedding(ids, table, BFLOAT16).numpy()
        with np.errstate(all="ignore"):
            assert_same(rounded.astype(np.float32), want[ids].astype(BFLOAT16).astype(np.float32))
        ids[1, 3], ids[0, 0] = -1, 40
        got = ops.embedding(on.put(ids), table).numpy()
    assert np.isnan(got[1, 3]).all()
    assert np.isnan(got[0, 0]).all()
    assert_same(got[0, 1:], want[ids[0, 1:]])


@pytest.mark.parametrize("segments", [False, True])
def test_rel_shift(segments):
    """In bfloat16, with segments of the host or of the device; a mask in bfloat16 is refused."""
    ref = oracle("rel_shift")
    named = ref.inputs({"shape": (2, 37, 2, 72), "keys": 70, "segments": segments, "mask": True}, np.random.default_rng(3))
    names = [n for n in ref.GRADIENTS if n in named]
    for n in names:
        named[n] = named[n].astype(BFLOAT16).astype(np.float32)
    rest = {n: v for n, v in named.items() if n not in names}
    dy = normal(2, 2, 37, 70)
    want = outputs(lambda *xs: ops.rel_shift(**dict(zip(names, xs, strict=True)), **rest), [named[n] for n in names], dy)
    with emulated(twin="triton") as on:
        there = rest | {"mask": on.put(rest["mask"])}
        if segments:
            there["key_segments"] = on.put(rest["key_segments"].astype(np.int32))
        arrays = [on.put(named[n].astype(BFLOAT16)) for n in names]
        call = lambda *xs: ops.rel_shift(**dict(zip(names, xs, strict=True)), **there)  # noqa: E731
        got = outputs(call, arrays, on.put(dy.astype(BFLOAT16)))
        there["mask"] = on.put(rest["mask"].astype(BFLOAT16))
        with pytest.raises(TypeError, match=r"\[rel_shift\] mask must be float32, got bfloat16"):
            call(*arrays)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2.0**-6, atol=2.0**-7 * float(np.abs(w).max()))
    module = importlib.import_module("fastlm.kernels.rel_shift.rel_shift_triton")
    assert on.launched["rel_shift"] <= {variant(*v) for v in module.variants()}


@pytest.mark.parametrize("kind", WRITTEN)
def test_quantise(kind):
    """The bytes of the CPU, for awkward numbers too, from float32 and bfloat16; what cannot be written is refused with its row."""
    for x in (awkward(kind)[::3], normal(3, 7, 64)):
        with emulated(twin="triton") as on:
            there = quantize(on.put(x), kind)
            assert there.shape == x.shape
            np.testing.assert_array_equal(there.blocks.numpy(), quantize(x, kind).blocks)
            half = quantize(on.put(x.astype(BFLOAT16)), kind)
            np.testing.assert_array_equal(half.blocks.numpy(), quantize(x.astype(BFLOAT16), kind).blocks)
    for bad in (np.nan, np.inf, 3e38):
        x = normal(70, 96)
        x[31, 40], x[69, 3] = bad, bad
        with emulated(twin="triton") as on, pytest.raises(ValueError, match=r"row 31 has others"):
            quantize(on.put(x), kind)


def assert_same(got, want):
    """Every bit equal, save that any nan stands for any other."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
