"""The runtime against a stand-in driver: what it says where no GPU can be used, and what it hands to the driver where one can."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlm.cuda.emulated import emulated
from fastlm.cuda.runtime import status
from tests.gpu.build import gpu_build, toolkit

pytest.importorskip("fastlm._cuda", reason="built without a CUDA toolkit")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The stand-in, compiled."""
    include = toolkit()
    if include is None:
        pytest.skip("no cuda.h")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = ROOT / "tests/gpu/standin.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", f"-I{include}", source, "-o", library], check=True)
    return library


def python(driver, code, **settings):
    env = os.environ | {"PYTHONPATH": str(ROOT), "FASTLM_LIBCUDA": str(driver)} | settings
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SAYS = "import fastlm; from fastlm.cuda import status; usable, why = status(); print(usable, why)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTLM_LIBCUDA": "/nowhere/libcuda.so.1"}, r"False no NVIDIA driver is installed"),
        ({"STANDIN_DEVICES": "0"}, r"False the driver is there, but no device is usable: CUDA_ERROR_NO_DEVICE"),
        ({"STANDIN_VERSION": "11040"}, r"False the driver supports CUDA 11\.4; CUDA 12\.0 or newer is needed: update the driver"),
        ({"STANDIN_MAJOR": "7"}, r"False the device has compute capability 7\.x; 8\.0 \(Ampere\) or newer is needed"),
        ({"FASTLM_CUDA_DEVICE": "3"}, r"False FASTLM_CUDA_DEVICE must be from 0 to 0, got 3"),
        ({}, r"True stand-in, compute capability 9\.0, 80 GiB, driver for CUDA 13\.0"),
    ],
)
def test_status(driver, settings, message):
    assert re.match(message, python(driver, SAYS, **settings))


@pytest.mark.parametrize(
    "settings", [{"FASTLM_LIBCUDA": "/nowhere/libcuda.so.1"}, {"STANDIN_DEVICES": "0"}, {"STANDIN_VERSION": "11040"}]
)
def test_info(driver, settings):
    """`fastlm info` explains itself on all of them."""
    out = python(driver, "from fastlm.cli import main; main(['info'])", **settings)
    assert re.search(r"^GPU +none: .*(driver|device)", out, re.M)


def test_memory_and_copies(driver):
    """Round trips, views, copies of strided arrays, and memory that is given back."""
    code = """
import numpy as np
from fastlm import _cuda
from fastlm.cuda import device
on = device()
x = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
a = on.put(x)
assert (a.numpy() == x).all() and (a[:, 1:, ::1].copy().numpy() == x[:, 1:]).all() and (a[1, :, 2:4].numpy() == x[1, :, 2:4]).all()
assert (a.reshape(6, -1).numpy() == x.reshape(6, 5)).all() and not on.zeros((4,)).numpy().any()
before = _cuda.memory()[0]
b = on.empty((1000,))
assert _cuda.memory()[0] == before + 4000
del b
assert _cuda.memory()[0] == before
try: on.empty((1 << 40,))
except _cuda.CudaError as e: print(e)
"""
    assert "out of memory: 4398046511104 bytes asked for" in python(driver, code)


def test_recording(driver, tmp_path):
    """A recorded step is captured after it has run: its memory is allocated before, and each run is one launch of the graph."""
    code = """
from fastlm import backend
from fastlm.cuda import device
on = device()
x = on.zeros((3, 4))
def step():
    a = on.zeros((3, 4))
    backend.assign(a[:, 1:3], x[:, :2])
    backend.assign(x, a)
    return a
recording = backend.record(step, on)
assert len(recording) == 3 and recording.nbytes == 48
recording.run()
recording.run()
try: backend.record(lambda: x.numpy(), on)
except backend.Unrecordable as e: print(e)
del recording
"""
    out = python(driver, code, STANDIN_LOG=str(tmp_path / "log"))
    assert out == "the step reads what is on the device\n"
    assert (tmp_path / "log").read_text().splitlines() == ["begin capture", "end capture", "launch graph", "launch graph"]


@pytest.mark.skipif(gpu_build().nvcc() is None, reason="needs nvcc")
def test_launch(driver, tmp_path):
    """A compiled kernel is loaded, and the driver gets the grid and every argument as given."""
    image = tmp_path / "add.cubin"
    image.write_bytes(gpu_build().compile_cuda("add", "90")[0])
    log = tmp_path / "log"
    code = f"""
from fastlm import _cuda
kernel = _cuda.Kernel(_cuda.Module(open({str(image)!r}, "rb").read()), "add_fp32_fp32", "pppil", 256, shared=100000)
kernel((7, 2, 1), 0, 0x1000, 0x2000, 0x3000, -5, 1 << 40)
kernel((0, 2, 1), 0, 1, 2, 3, 4, 5)
try: kernel((1, 1, 1), 0, 1)
except TypeError as e: print(e)
stream = _cuda.create_stream()
_cuda.begin_capture(stream)
kernel((1, 1, 1), stream, 1, 2, 3, 4, 5)
graph = _cuda.end_capture(stream)
graph.launch(stream)
"""
    out = python(driver, code, STANDIN_LOG=str(log), STANDIN_SIZES="88848")
    assert "takes 5 arguments, got 1" in out
    assert log.read_text().splitlines() == [
        "launch add_fp32_fp32 grid 7,2,1 block 256 shared 100000: 1000 2000 3000 fffffffb 10000000000",
        "begin capture",
        "launch add_fp32_fp32 grid 1,1,1 block 256 shared 100000: 1 2 3 4 5",
        "end capture",
        "launch graph",
    ]


@pytest.mark.parametrize(("version", "kernel"), [("13000", "add_fp32_fp32"), ("12080", "add"), ("12040", "add")])
def test_twin_of_an_older_driver(driver, tmp_path, version, kernel):
    """Where the driver is too old for what nvcc made, Triton's kernels are launched."""
    code = f"""
import json, zipfile
from pathlib import Path
from fastlm.cuda import device, images
from fastlm.cuda.images import variant
images.FOLDER = Path({str(tmp_path)!r})
class All(dict):
    def get(self, key, default=None):
        return self["cuda" if key.startswith("cuda") else "triton"]
with zipfile.ZipFile(images.FOLDER / "sm_90.zip", "w") as archive:
    archive.writestr("image", b"\\x7fELF")
    archive.writestr("manifest.json", json.dumps({{
        "cuda": {{"entry": "add_fp32_fp32", "driver": 13000, "file": "image"}},
        "triton": {{"entry": "add", "driver": 12000, "file": "image", "signature": "pppii", "block": 128, "shared": 0}}}}))
on = device()
on.images.manifest = All(on.images.manifest)
x = on.zeros((4, 8))
on.table.add(x, x, x)
"""
    python(driver, code, STANDIN_LOG=str(tmp_path / "log"), STANDIN_VERSION=version)
    assert (tmp_path / "log").read_text().startswith(f"launch {kernel} ")


def test_dlpack():
    """Arrays come from other libraries and go to them without a copy, bfloat16 too; another device is refused."""
    import ml_dtypes

    from fastlm.cuda import from_dlpack

    with emulated() as on:
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        a = from_dlpack(x)  # the emulated device is the host
        assert a.pointer == x.__array_interface__["data"][0]
        np.testing.assert_array_equal(a[1:].numpy(), x[1:])
        back = np.from_dlpack(on.put(x)[:, ::2])
        np.testing.assert_array_equal(back, x[:, ::2])
        b = on.put(x.astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(from_dlpack(b).numpy(), b.numpy())
        with pytest.raises(TypeError, match=r"\[from_dlpack\] x must be an array on the device"):
            from_dlpack([1, 2])
        on.dlpack = (2, 0)
        with pytest.raises(ValueError, match=r"\[from_dlpack\] x must be on emulated, DLPack device \(2, 0\), got \(1, 0\)"):
            from_dlpack(x)


def test_no_device():
    """Asking for the GPU says why there is none."""
    if status()[0]:
        pytest.skip("there is one")
    from fastlm.cuda import device

    with pytest.raises(RuntimeError, match=r"\[cuda\] no GPU can be used: "):
        device()
