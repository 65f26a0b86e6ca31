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


def hopper(folder, seed, layout):
    """Whether the product of hopper.cu is right under a schedule. layout: "n" or "t", whether a and b are stored transposed."""
    rng = np.random.default_rng(1)
    M, N, K = 72, 88, 328
    a, b = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((M, K), (K, N)))
    with emulated(twin="cuda", libraries=folder, seed=seed) as on:
        stored = [np.ascontiguousarray(x.T if t == "t" else x) for x, t in zip((a, b), layout, strict=True)]
        c, there = on.empty((M, N)), [on.put(x) for x in stored]
        maps = [on.tensor_map(x.pointer, *x.shape, x.shape[1] * 2, 64, 64) for x in there]
        run = on.cuda("hopper", f"hopper_{layout}", "pttiii", 160, 4 * 8192 + 64, 1)
        try:
            run((-(-N // 64), -(-M // 64), 1), [c.pointer, *maps, M, N, K])
        except RuntimeError:
            return False
        got = c.numpy()
    return bool(np.all(np.abs(got - a.astype(np.float64) @ b.astype(np.float64)) < 1e-4))


@pytest.mark.parametrize("plant", ["", "PLANT_NO_FULL_WAIT", "PLANT_NO_EMPTY_WAIT", "PLANT_NO_PRODUCT_WAIT"])
def test_tma_barriers_and_warpgroups(plant, tmp_path):
    """TMA, barriers in shared memory, wgmma: a wait that is missing is found, for data, for room, and for the product."""
    gpu_build().emulate("hopper", tmp_path, (plant,) if plant else (), source=HERE / "hopper.cu")
    if plant:
        assert not all(hopper(tmp_path, seed, "nt") for seed in SCHEDULES)
    else:
        for layout in ("nt", "nn", "tn"):
            assert all(hopper(tmp_path, seed, layout) for seed in SCHEDULES), layout


def test_wgmma_from_registers_and_tma_store(tmp_path):
    gpu_build().emulate("hopper", tmp_path, source=HERE / "hopper.cu")
    x = np.random.default_rng(2).standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    for seed in SCHEDULES:
        with emulated(twin="cuda", libraries=tmp_path, seed=seed) as on:
            xs, y = on.put(x), on.empty((40, 48), ml_dtypes.bfloat16)  # what is outside of y is not stored
            maps = [on.tensor_map(y.pointer, 40, 48, 96, 64, 64), on.tensor_map(xs.pointer, 64, 64, 128, 64, 64)]
            on.cuda("hopper", "hopper_store", "ttp", 128, 2 * 8192 + 64, 1)((1, 1, 1), [*maps, xs.pointer])
            exact = (x.astype(np.float64) @ x.astype(np.float64))[:40, :48]
            np.testing.assert_allclose(y.numpy().astype(np.float64), exact, rtol=2.0**-8, atol=1e-4)
