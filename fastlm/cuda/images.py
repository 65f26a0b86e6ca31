"""Compiled kernels: one archive for each architecture, `fastlm/cuda/images/sm_90.zip`, with a manifest; made by tools/gpu_build.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "images"


def variant(kernel: str, types: dict[str, str | None], constants: dict[str, Any], options: dict[str, int]) -> str:
    """The name of one compiled form of a Triton kernel."""
    parts = [kernel, *(f"{n}:{t}" for n, t in types.items()), *(f"{n}={v}" for n, v in sorted(constants.items()))]
    return " ".join(parts + [f"{n}={v}" for n, v in sorted(options.items())])


def version(number: int) -> str:
    """13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


class Images:
    """The archive that fits a device: that of its own architecture, else the portable one (PTX), which the driver compiles.

    driver: the CUDA version that the driver supports, 13000; None: any. A compiler's images need a driver of its major version, its
    PTX one of its version.
    """

    def __init__(self, capability: tuple[int, int], driver: int | None = None) -> None:
        self.name, self.driver = f"sm_{capability[0]}{capability[1]}", driver
        # 8.6 runs what 8.0 runs; from 9.0 on what uses all of an architecture runs on that one alone.
        names = [self.name, *(["sm_80"] if capability[0] == 8 else []), "ptx"]
        self.path = next((FOLDER / f"{n}.zip" for n in names if (FOLDER / f"{n}.zip").exists()), None)
        self._archive = None if self.path is None else zipfile.ZipFile(self.path)
        self.manifest: dict[str, Any] = {} if self._archive is None else json.loads(self._archive.read("manifest.json"))
        self._modules: dict[str, Any] = {}

    def _too_new(self, entry: dict[str, Any]) -> bool:
        return self.driver is not None and int(entry.get("driver", 0)) > self.driver

    def count(self, twin: str = "") -> int:
        """How many kernels, or kernels of this twin, the driver takes."""
        return sum(k.startswith(twin) and not self._too_new(e) for k, e in self.manifest.items())

    @property
    def says(self) -> str:
        """What there is, for `fastlm info`."""
        if self.path is None:
            return "this build has no kernels for it: tools/gpu_build.py makes them"
        lacking = max((int(e["driver"]) for e in self.manifest.values() if self._too_new(e)), default=0)
        more = f", {len(self.manifest) - self.count()} more need a driver for CUDA {version(lacking)}" if lacking else ""
        return f"{self.count()} kernels in {self.path.name}{more}"

    def find(self, op: str, twin: str, key: str) -> dict[str, Any]:
        """The manifest's entry, or a RuntimeError."""
        if self._archive is None:
            raise RuntimeError(f"[{op}] this build has no kernels for {self.name}: build them with tools/gpu_build.py.")
        entry = self.manifest.get(f"{twin} {key}")
        if entry is None:
            raise RuntimeError(
                f"[{op}] {self.path} has no {twin} kernel {key!r}: it is older than this code. Build it with tools/gpu_build.py."
            )
        if self.driver is not None and self._too_new(entry):
            raise RuntimeError(
                f"[{op}] the {twin} kernels were compiled for CUDA {version(entry['driver'])}, the driver supports "
                f"{version(self.driver)}: update the driver."
            )
        found: dict[str, Any] = entry
        return found

    def image(self, entry: dict[str, Any]) -> bytes:
        assert self._archive is not None
        return self._archive.read(entry["file"])

    def module(self, entry: dict[str, Any], load: Any) -> Any:
        """The loaded image of an entry whose file has several."""
        module = self._modules.get(entry["file"])
        if module is None:
            module = self._modules[entry["file"]] = load(self.image(entry))
        return module
