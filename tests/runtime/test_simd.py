"""csrc/simd on every instruction set: elementary functions against float64, rounding, masks, order of reductions."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C

TINY = np.finfo(np.float32).tiny


def simd(name, x):
    x = np.ascontiguousarray(x, np.float32)
    y = np.full_like(x, 77)
    _C.simd_map(name, y, x)
    return y


def whole_range():
    """Every exponent with the first, the last and many random mantissas, both signs; finer where the functions bend; the odd ones."""
    rng = np.random.default_rng(0)
    mantissas = rng.integers(0, 1 << 23, (255, 300), np.uint32)
    mantissas[:, 0], mantissas[:, 1] = 0, (1 << 23) - 1
    x = (np.arange(255, dtype=np.uint32)[:, None] << 23 | mantissas).ravel().view(np.float32)
    fine = [np.linspace(-105, 90, 60001), np.linspace(-6, 6, 60001), np.linspace(0.5, 2, 60001)]
    return np.concatenate([x, -x, *fine, [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)


EXACT = {
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "erf": lambda x: np.array([math.erf(v) for v in x.tolist()]),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize(("name", "bound"), [("exp", 1.0), ("log", 1.0), ("tanh", 1.5), ("erf", 2.5), ("sigmoid", 2.5)])
def test_elementary(isa, name, bound):
    """The bounds that csrc/simd/math.h states, in ulp of the result."""
    x = whole_range()
    got = simd(name, x)
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(np.float64))
        want = exact.astype(np.float32)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])  # the same infinities, nan for nan
    error = np.abs(got[finite].astype(np.float64) - exact[finite])
    ulp = np.spacing(np.maximum(np.abs(want[finite]), TINY)).astype(np.float64)
    allowed = bound * ulp
    if name == "sigmoid":
        allowed[np.abs(exact[finite]) < TINY] = TINY
    worst = int(np.argmax(error / allowed))
    message = f"{name}({x[finite][worst]!r}) = {got[finite][worst]!r}, exactly {exact[finite][worst]!r}"
    assert error[worst] <= allowed[worst], message


@pytest.mark.parametrize("name", ["gelu_table", "gelu_tanh_table"])
def test_gelu_by_a_table(isa, name):
    """|x| times two roundings of a number below 1, and the rounding of the result, as in gelu_table.h."""
    x = whole_range()
    got, wide = simd(name, x), x.astype(np.float64)
    with np.errstate(all="ignore"):
        if name == "gelu_table":
            exact = wide / 2 * (1 + EXACT["erf"](wide / math.sqrt(2)))
        else:
            exact = wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    finite = np.isfinite(exact) & (np.abs(x) < 1e38)
    error = np.abs(got[finite] - exact[finite])
    allowed = np.abs(wide[finite]) * 2.0**-24 + np.spacing(np.abs(exact[finite].astype(np.float32))) + 1e-45
    assert (error <= allowed).all(), x[finite][np.argmax(error - allowed)]
    np.testing.assert_array_equal(simd(name, np.array([0, np.inf, np.nan, 50, -50], np.float32)), [0, np.inf, np.nan, 50, 0])


@pytest.mark.parametrize("name", ["gelu_slope", "gelu_tanh_slope"])
def test_gelu_slope_by_a_table(isa, name):
    """Two roundings of a number below 1, and the rounding of the result."""
    x = whole_range()
    got, wide = simd(name, x), np.clip(x.astype(np.float64), -1e3, 1e3)
    if name == "gelu_slope":
        exact = (1 + EXACT["erf"](wide / math.sqrt(2))) / 2 + wide * np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (wide + 0.044715 * wide**3))
        exact = (1 + t) / 2 + wide / 2 * (1 - t * t) * c * (1 + 0.134145 * wide * wide)
    known = ~np.isnan(x)
    error = np.abs(got[known] - exact[known])
    allowed = 2.0**-24 + 5e-9 + np.spacing(np.abs(exact[known]).astype(np.float32)) / 2
    assert (error <= allowed).all(), x[known][np.argmax(error - allowed)]
    np.testing.assert_array_equal(
        simd(name, np.array([0, np.inf, -np.inf, np.nan, 50, -50], np.float32)), [0.5, 1, 0, np.nan, 1, 0]
    )


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_odd_functions(isa, name):
    """f(-x) = -f(x) to the bit, the sign of zero included; subnormal arguments keep their precision."""
    x = whole_range()
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(simd(name, -x).view(np.uint32), simd(name, x).view(np.uint32) ^ np.uint32(1 << 31))
    small = np.array([1e-45, 1e-42, 1e-39, 2e-38], np.float32)
    slope = 1.0 if name == "tanh" else 2 / math.sqrt(math.pi)
    np.testing.assert_allclose(simd(name, small), small.astype(np.float64) * slope, rtol=1e-6, atol=1.5e-45)


def test_exp_at_the_ends(isa):
    x = np.array([-np.inf, -1e30, -104.5, -103.9, -88.0, 0.0, -0.0, 88.72283, 88.7229, 1e30, np.inf], np.float32)
    with np.errstate(over="ignore", under="ignore"):
        want = np.exp(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(simd("exp", x), want, rtol=1e-6, atol=1.5e-45)
    assert simd("exp", x)[3] == np.float32(1e-45)  # subnormal results are there


def test_round(isa):
    """To the nearest, ties to even."""
    x = np.concatenate([np.arange(-40, 41) / 4, [0.49999997, 2.5, 4194303.5, 4194304.0, 8388609.0, 1e30, np.inf, -np.inf, np.nan]])
    np.testing.assert_array_equal(simd("round", x), np.rint(x.astype(np.float32)))


def test_bfloat16(isa):
    """Nearest even: all values of bfloat16, what lies between them, the ends."""
    every = np.arange(1 << 16, dtype=np.uint32) << 16
    between = np.concatenate([every | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = np.concatenate([between, np.random.default_rng(0).integers(0, 1 << 32, 100000, np.uint32)]).view(np.float32)
    got = simd("bfloat16", x)
    with np.errstate(all="ignore"):
        want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    nan = np.isnan(x)
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def test_reduce_order(isa):
    """The halves of a vector are added first, then the halves of that: the order is part of every result's bits."""
    W = int(simd("width", [0.0])[0])
    assert {"scalar": 4, "neon": 4, "avx2": 8, "avx512": 16}[isa] == W
    x = (np.random.default_rng(1).standard_normal(64 * W) * 10.0 ** np.random.default_rng(2).integers(-6, 6, 64 * W)).astype(
        np.float32
    )
    sums, maxima = simd("reduce_add", x), simd("reduce_max", x)
    for i in range(x.size):
        lanes = np.zeros(W, np.float32)
        lanes[: i % W + 1] = x[i // W * W : i + 1]
        assert maxima[i] == lanes.max()
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        assert sums[i] == lanes[0]


def test_stores_no_further(isa):
    """store_n leaves what lies behind alone, for every length."""
    for n in range(40):
        x = np.arange(64, dtype=np.float32)
        y = np.full(64, -7, np.float32)
        _C.simd_map("round", y[5 : 5 + n], x[3 : 3 + n])
        np.testing.assert_array_equal(y[5 : 5 + n], x[3 : 3 + n])
        assert (np.delete(y, np.arange(5, 5 + n)) == -7).all()


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from fastlm import _C

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded():
    # Three pages of which only the middle one may be touched.
    memory = mmap.mmap(-1, 3 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, 2):
        assert libc.mprotect(address + page * PAGE, PAGE, 0) == 0
    return np.frombuffer(memory, np.float32, PAGE // 4, PAGE)


_C.set_isa(sys.argv[1])
x, y = guarded(), guarded()
x[:] = np.arange(x.size)
for n in range(70):
    for part in (slice(0, n), slice(x.size - n, x.size)):
        _C.simd_map("round", y[part], x[part])
        assert (y[part] == x[part]).all()
print("untouched", flush=True)
import os
os._exit(0)  # the pages are not given back: numpy still points at them
"""


def test_touches_no_further(isa):
    """Neither loads nor stores touch the pages before and after an array, for every length."""
    done = subprocess.run([sys.executable, "-c", GUARDED, isa], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "untouched\n"), done.stderr
