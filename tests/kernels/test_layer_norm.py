from __future__ import annotations

import numpy as np
import pytest

from fastlm import ops
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("layer_norm"), ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("layer_norm", ops.layer_norm, case)


@CASES
def test_backward(isa, case):
    check_backward("layer_norm", ops.layer_norm, case)


@CASES
def test_oracle(case):
    check_oracle("layer_norm", case)


def test_not_finite(isa):
    """A row with inf or nan is nan; its neighbours are untouched."""
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)
    w = np.ones(33, np.float32)
    clean = ops.layer_norm(x, w)
    x[1, 5], x[2, 32] = np.inf, np.nan
    y = ops.layer_norm(x, w)
    assert np.isnan(y[1:3]).all()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


def test_refuses():
    x = np.zeros((4, 128, 768), np.float32)
    with pytest.raises(ValueError, match=r"\[layer_norm\] weight must be \(C,\) = \(768,\), got \(1024,\)\. x is \(4, 128, 768\)\."):
        ops.layer_norm(x, np.zeros(1024, np.float32))
    with pytest.raises(TypeError, match=r"\[layer_norm\] x must be float32, got float64\. Convert it with x\.astype\('float32'\)\."):
        ops.layer_norm(x.astype(np.float64), np.zeros(768, np.float32))
