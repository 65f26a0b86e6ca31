"""Archives of compiled kernels: which one a device takes, and what a driver of an older version makes of it."""

from __future__ import annotations

import json
import zipfile

import pytest

from fastlm.cuda import images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Archives for all architectures, each with a kernel of either twin; the compilers are those of CUDA 13.0 and 12.8."""
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    for name in ("sm_80", "sm_90", "sm_100", "ptx"):
        exact = name == "ptx"
        kernels = {"cuda add": {"driver": 13000}, "triton add x": {"driver": 12080 if exact else 12000}}
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("manifest.json", json.dumps(kernels))
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "ptx"),
        ((12, 0), "ptx"),
    ],
)
def test_archive(folder, capability, name):
    """Its own; from 9.0 on images run on their own architecture alone, so that others take the portable one."""
    assert images.Images(capability).path == folder / f"{name}.zip"


def test_none(folder):
    (folder / "ptx.zip").unlink()
    found = images.Images((12, 0))
    assert found.says == "this build has no kernels for it: tools/gpu_build.py makes them"
    assert found.count() == 0
    with pytest.raises(RuntimeError, match=r"\[add\] this build has no kernels for sm_120: build them with tools/gpu_build.py"):
        found.find("add", "cuda", "add")


def test_driver(folder):
    """What was compiled for a newer CUDA than the driver's is not taken, and it is said what the driver must be."""
    new, old, older = (images.Images((9, 0), v) for v in (13000, 12040, 11080))
    assert (new.says, new.count("cuda"), new.count("triton")) == ("2 kernels in sm_90.zip", 1, 1)
    assert (old.says, old.count("cuda")) == ("1 kernels in sm_90.zip, 1 more need a driver for CUDA 13.0", 0)
    assert older.says == "0 kernels in sm_90.zip, 2 more need a driver for CUDA 13.0"
    assert new.find("add", "cuda", "add")
    assert old.find("add", "triton", "add x")
    wrong = r"\[add\] the cuda kernels were compiled for CUDA 13\.0, the driver supports 12\.4: update the driver"
    with pytest.raises(RuntimeError, match=wrong):
        old.find("add", "cuda", "add")
    with pytest.raises(RuntimeError, match=r"has no triton kernel 'add y': it is older than this code"):
        old.find("add", "triton", "add y")
    assert images.Images((12, 0), 12080).count() == 1
    assert images.Images((12, 0), 12060).count() == 0
