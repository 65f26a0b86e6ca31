from __future__ import annotations

from pathlib import Path

import pytest

from fastlm import ops
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
