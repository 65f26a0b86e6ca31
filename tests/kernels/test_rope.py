from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm import ops
from fastlm.ops.rope import _frequencies, rope_tables
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("rope"), ids=case_id)
GOLDEN = Path(__file__).parent.parent / "data" / "rope_scaling.npz"


@CASES
def test_forward(isa, case):
    check_forward("rope", ops.rope, case)


@CASES
def test_backward(isa, case):
    check_backward("rope", ops.rope, case)


@CASES
def test_oracle(case):
    check_oracle("rope", case)


def test_views(isa):
    """A piece of a fused projection gives the bits of its contiguous copy."""
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((2, 5, 9 * 31), np.float32)
    q = fused[:, :, : 4 * 31].reshape(2, 5, 4, 31)
    view = np.lib.stride_tricks.as_strided(fused, q.shape, (*fused.strides[:2], 31 * 4, 4))
    cos, sin = rope_tables(30, 8)
    np.testing.assert_array_equal(ops.rope(view, cos, sin), ops.rope(q.copy(), cos, sin))
    turned = np.asfortranarray(q)  # a layout that the kernel does not walk
    np.testing.assert_array_equal(ops.rope(turned, cos, sin), ops.rope(q.copy(), cos, sin))


def test_positions(isa):
    """Positions t .. from a cache give the rows that the whole sequence has there."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 9, 3, 16), np.float32)
    cos, sin = rope_tables(16, 9)
    whole = ops.rope(x, cos, sin)
    np.testing.assert_array_equal(ops.rope(x[:, 4:6], cos, sin, np.array([4, 5], np.int32)), whole[:, 4:6])
    rows = np.array([[4, 5], [2, 3]], np.int32)
    np.testing.assert_array_equal(ops.rope(x[:, 2:4], cos, sin, rows)[1], whole[1, 2:4])


def test_interleaved_is_a_permutation(isa):
    """The two pairings are the same rotation of permuted elements."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, 6, 2, 32), np.float32)
    cos, sin = rope_tables(32, 6)
    order = np.arange(32).reshape(2, 16).T.reshape(-1)  # halves -> pairs
    np.testing.assert_allclose(
        ops.rope(x[..., order], cos, sin, interleaved=True), ops.rope(x, cos, sin)[..., order], rtol=1e-6, atol=1e-6
    )


def test_not_finite(isa):
    x = np.ones((1, 2, 2, 8), np.float32)
    cos, sin = rope_tables(4, 2)
    clean = ops.rope(x, cos, sin)
    x[0, 1, 0, 5] = np.nan
    y = ops.rope(x, cos, sin)
    assert np.isnan(y[0, 1, 0, 5])
    y[0, 1, 0, 5] = clean[0, 1, 0, 5]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("name", json.loads(str(np.load(GOLDEN)["cases"])))
def test_scaling(name):
    """Tables against the frequencies and factors of transformers, which are float32 themselves."""
    golden = np.load(GOLDEN)
    case = json.loads(str(golden["cases"]))[name]
    frequencies, factor = _frequencies(case["dim"], case["n_positions"], case["base"], case["scaling"])
    np.testing.assert_allclose(frequencies, golden[name], rtol=1e-6)
    assert factor == pytest.approx(float(golden[name + "/factor"]), rel=1e-12)
    cos, sin = rope_tables(**case)
    angles = np.arange(case["n_positions"])[:, None] * frequencies
    np.testing.assert_array_equal(cos, (np.cos(angles) * factor).astype(np.float32))
    np.testing.assert_array_equal(sin, (np.sin(angles) * factor).astype(np.float32))


def test_tables():
    cos, sin = rope_tables(8, 3)
    assert cos.shape == sin.shape == (3, 4)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(sin[2], np.sin(2 / 10000 ** (np.arange(4) / 4)), rtol=1e-6)
    old_name = rope_tables(8, 3, scaling={"type": "linear", "factor": 2})
    np.testing.assert_allclose(old_name[1][2], sin[1], rtol=1e-6)


def test_refuses():
    x = np.zeros((2, 5, 3, 8), np.float32)
    cos, sin = rope_tables(8, 5)
    with pytest.raises(ValueError, match=r"\[rope\] sin must be \(P, R / 2\) = \(5, 4\), got \(5, 3\)"):
        ops.rope(x, cos, sin[:, :3].copy())
    with pytest.raises(ValueError, match=r"\[rope\] cos must be \(P, R / 2\) with R <= D = 8, got \(5, 5\)"):
        ops.rope(x, *rope_tables(10, 5))
    with pytest.raises(ValueError, match=r"a row for each of the 5 positions, got \(4, 4\)"):
        ops.rope(x, cos[:4], sin[:4])
    with pytest.raises(ValueError, match=r"positions must be from 0 to P - 1 = 4, got 3 to 5"):
        ops.rope(x[:, :2], cos, sin, np.array([5, 3], np.int32))
    with pytest.raises(ValueError, match=r"positions must be from 0 to P - 1 = 4, got -1 to 0"):
        ops.rope(x[:, :2], cos, sin, np.array([-1, 0], np.int32))
    with pytest.raises(ValueError, match=r"positions must be \(B, T\) = \(2, 5\) or \(T,\) = \(5,\), got \(4,\)"):
        ops.rope(x, cos, sin, np.arange(4, dtype=np.int32))
    with pytest.raises(TypeError, match=r"\[rope\] positions must be int32, got int64"):
        ops.rope(x, cos, sin, np.arange(5))
    with pytest.raises(TypeError, match=r"\[rope\] x must be float32, got float64"):
        ops.rope(x.astype(np.float64), cos, sin)
    with pytest.raises(ValueError, match=r"dim must be even"):
        rope_tables(7, 4)
    with pytest.raises(ValueError, match=r"scaling of type 'llama3' must have 'low_freq_factor', got the keys"):
        rope_tables(8, 4, scaling={"rope_type": "llama3", "factor": 8.0})
    with pytest.raises(ValueError, match=r"must be default, linear, dynamic, yarn or llama3, got 'longrope'"):
        rope_tables(8, 4, scaling={"rope_type": "longrope"})
