from __future__ import annotations

import pytest

from fastlm import ops
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("attention"), ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("attention", ops.attention, case)


@CASES
def test_backward(isa, case):
    check_backward("attention", ops.attention, case)


# A bias of -inf has no central difference.
@pytest.mark.parametrize("case", [c for c in cases("attention") if "hidden" not in c], ids=case_id)
def test_oracle(case):
    check_oracle("attention", case)
