"""The cases of every operation on a real GPU, both twins: `pytest -m gpu`, after tools/gpu_build.py. tools/gpu_check.py runs it.

Here nothing is too large to be run. Skipped, with the reason, where no GPU can be used. FASTLM_DRY_RUN=1 runs it on the emulated device:
that is how the tool itself is tested.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from fastlm.cuda import device, status
from fastlm.cuda.emulated import emulated
from fastlm.cuda.images import Images
from fastlm.cuda.table import KERNELS, chosen
from fastlm.testing import case_id, cases
from tests.gpu import test_twins
from tests.gpu.build import gpu_build

DRY = os.environ.get("FASTLM_DRY_RUN") == "1"
USABLE, WHY = (True, "") if DRY else status()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=WHY)]
TWINS = [(op, twin) for twin, end in (("triton", "_triton.py"), ("cuda", "_cuda.cu")) for op in test_twins.ops(f"*/*{end}")]
CASES = [(op, twin, c) for op, twin in TWINS for c in cases(op)]


@pytest.fixture
def on(request, monkeypatch):
    """The device, with the twin of the test."""
    twin = request.getfixturevalue("twin") if "twin" in request.fixturenames else "triton"
    if DRY:
        folder = KERNELS.parent / "build/emulated"
        for path in KERNELS.glob("*/*_cuda.cu") if twin == "cuda" else []:
            if path.parent.name in ("add", request.getfixturevalue("op")):
                gpu_build().emulate(path.parent.name, folder)
        with emulated(twin=twin, libraries=folder) as there:
            yield there
        return
    monkeypatch.setenv("FASTLM_KERNEL", twin)
    chosen.cache_clear()
    yield device()
    device().synchronize()
    monkeypatch.undo()
    chosen.cache_clear()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("op", "twin", "case"), CASES, ids=lambda v: v if isinstance(v, str) else case_id(v))
def test_device(on, op, twin, case):
    """Against the oracle, within its tolerance, forward and backward."""
    test_twins.check(op, case)


@pytest.mark.skipif(DRY, reason="the emulated device has no images")
def test_images():
    """This build has kernels for this device's own architecture."""
    images = Images(device().capability)
    assert images.path is not None
    assert images.path.name != "ptx.zip", f"only PTX fits {images.name}: build with tools/gpu_build.py"


def test_copies(on):
    """Round trips and strided copies."""
    x = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    a = on.put(x)
    np.testing.assert_array_equal(a[:, 1:].copy().numpy(), x[:, 1:])
    np.testing.assert_array_equal(a[1, :, 2:4].numpy(), x[1, :, 2:4])
