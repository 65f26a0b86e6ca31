from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle, oracle, rng

CASES = pytest.mark.parametrize("case", cases("rel_shift"), ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("rel_shift", ops.rel_shift, case)


@CASES
def test_backward(isa, case):
    check_backward("rel_shift", ops.rel_shift, case)


@CASES
def test_oracle(case):
    check_oracle("rel_shift", case)


def test_is_the_shift_of_the_paper(isa):
    """Pad, reshape, cut: what the reference does with all scores."""
    generator = np.random.default_rng(0)
    T, S = 5, 8
    q, r = generator.standard_normal((1, T, 1, 6), np.float32), generator.standard_normal((T + S, 1, 6), np.float32)
    every = q[0, :, 0] @ r[:, 0].T
    shifted = every.reshape(T + S, T)[1:].reshape(T, T + S - 1)[:, :S]
    starts = np.arange(T, 0, -1, dtype=np.int32)[None]
    np.testing.assert_allclose(
        ops.rel_shift(q, r, np.zeros((1, 6), np.float32), starts, S, 1.0)[0, 0], shifted, rtol=1e-5, atol=1e-6
    )


def test_bits(isa, threads):
    """The same on any number of threads, and for a query alone."""
    case = {"shape": (3, 37, 2, 40), "keys": 61, "segments": True, "mask": True}
    named = oracle("rel_shift").inputs(case, rng(case))
    dy = np.random.default_rng(1).standard_normal((3, 2, 37, 61)).astype(np.float32)
    seen = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        given = named | {k: Tensor(named[k], requires_grad=True) for k in oracle("rel_shift").GRADIENTS}
        out = ops.rel_shift(**given)
        out.backward(dy)
        seen.append([out.data, *(given[k].grad for k in oracle("rel_shift").GRADIENTS)])
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    alone = {k: v[1:2, 9:10] if k in ("q", "starts", "mask", "query_segments") else v for k, v in named.items()}
    alone["key_segments"] = named["key_segments"][1:2]
    np.testing.assert_array_equal(ops.rel_shift(**alone)[0, :, 0], seen[0][0][1, :, 9])


def test_not_finite(isa):
    """A query of nan spoils its own row alone; -inf in the mask hides."""
    case = {"shape": (1, 9, 1, 5), "keys": 20, "mask": True}
    named = oracle("rel_shift").inputs(case, rng(case))
    clean = ops.rel_shift(**named)
    named["q"][0, 4, 0, 2] = np.nan
    named["mask"][0, 5, 3] = -np.inf
    got = ops.rel_shift(**named)
    assert np.isnan(got[0, 0, 4]).all()
    assert got[0, 0, 5, 3] == -np.inf
    np.testing.assert_array_equal(got[0, 0, [0, 1, 2, 3, 6, 7, 8]], clean[0, 0, [0, 1, 2, 3, 6, 7, 8]])


def test_refuses():
    q, r, u = np.zeros((2, 3, 4, 5), np.float32), np.zeros((10, 4, 5), np.float32), np.zeros((4, 5), np.float32)
    starts = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"\[rel_shift\] starts must be from 0 to P - S = 10 - 7, got 4 to 4"):
        ops.rel_shift(q, r, u, starts + np.int32(4), 7, 1.0)
    with pytest.raises(ValueError, match=r"\[rel_shift\] starts must be from 0"):
        ops.rel_shift(q, r, u, starts, 11, 1.0)
    with pytest.raises(ValueError, match=r"\[rel_shift\] bias must be \(H, D\) = \(4, 5\), got \(5, 4\)"):
        ops.rel_shift(q, r, u.T, starts, 7, 1.0)
    with pytest.raises(ValueError, match="go together"):
        ops.rel_shift(q, r, u, starts, 7, 1.0, segment_bias=u)
    with pytest.raises(TypeError, match=r"\[rel_shift\] q must be float32, got float64"):
        ops.rel_shift(q.astype(np.float64), r, u, starts, 7, 1.0)
