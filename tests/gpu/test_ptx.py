"""The models of csrc/cuda/ptx.h: right kernels pass under every schedule, and what is left out of them on purpose is found by one."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastlm.cuda.emulated import SCHEDULES, emulated
from tests.gpu.build import gpu_build

HERE = Path(__file__).parent


def pipeline(folder, seed):
    """Whether the product of pipeline.cu is right under a schedule."""
    rng = np.random.default_rng(0)
    M, N, K = 64, 128, 104
    a, b = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((M, K), (K, N)))
    with emulated(twin="cuda", libraries=folder, seed=seed) as on:
        c, there = on.empty((M, N)), [on.put(x) for x in (a, b)]
        run = on.cuda("pipeline", "pipeline", "pppiii", 128, 0, 1)
        run((N // 64, M // 64, 1), [c.pointer, *(x.pointer for x in there), M, N, K])
        got = c.numpy()
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return bool(np.all(np.abs(got - exact) < 1e-4))


PLANTS = ["PLANT_NO_WAIT", "PLANT_NO_FIRST_BARRIER", "PLANT_NO_LAST_BARRIER"]


@pytest.mark.parametrize("plant", ["", *PLANTS])
def test_copies_and_tensor_cores(plant, tmp_path):
    """cp.async, ldmatrix, mma: a missing wait, and a missing barrier on either side of the use of what was copied."""
    gpu_build().emulate("pipeline", tmp_path, (plant,) if plant else (), source=HERE / "pipeline.cu")
    right = [pipeline(tmp_path, seed) for seed in SCHEDULES]
    assert not all(right) if plant else all(right)
