from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, backend


def test_read_and_copy(isa):
    """What is timed really happens: every element is read and copied, at sizes that no vector divides."""
    for n in (0, 1, 31, 1023, 3 * _C.roof_piece + 7):
        x = np.arange(n, dtype=np.float32) % 7
        sums = np.full(-(-n // _C.roof_piece), np.nan, np.float32)
        _C.roof_read(sums, x)
        assert sums.sum() == x.sum()
        y = np.full(n, np.nan, np.float32)
        _C.roof_copy(y, x)
        np.testing.assert_array_equal(y, x)


def test_fma_counts_its_work(isa):
    y = np.full(3, np.nan, np.float32)
    flops = _C.roof_fma(y, 10)
    assert flops > 0
    assert flops == 3 * 10 * (_C.roof_fma(y, 1) // 3)
    assert np.isfinite(y).all()


def test_roof_is_measured_once(threads):
    backend.set_num_threads(1)
    roof = backend.roof()
    assert set(roof) == {"gflops", "read_gbs", "copy_gbs", "int8_gops", "int8_scaled_gops", "fast_gflops"}
    assert all(v > 0 for v in roof.values())
    assert backend.roof() == roof


@pytest.mark.parametrize("vnni", [True, False])
def test_dot_products_are_done(isa, threads, vnni):
    """A ceiling that no unit has would be one whose work the compiler left out: a dot product of four bytes is at best as fast as a
    multiply-add, four times the operations."""
    backend.set_num_threads(1)
    _C.set_vnni(vnni)
    try:
        roof = backend.measure_roof(1 << 20)
    finally:
        _C.set_vnni(True)
    assert 0 < roof["int8_scaled_gops"] < 1.2 * roof["int8_gops"]
    assert roof["int8_gops"] < 6 * roof["gflops"]
