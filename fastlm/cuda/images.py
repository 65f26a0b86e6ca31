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


class Images:
    """The archive that fits a device: that of its own architecture, else the portable one (PTX), which the driver compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.name = f"sm_{capability[0]}{capability[1]}"
        names = [self.name, *([f"sm_{capability[0]}0"] if capability[1] else []), "ptx"]  # 8.6 runs what 8.0 runs
        self.path = next((FOLDER / f"{n}.zip" for n in names if (FOLDER / f"{n}.zip").exists()), None)
        self._archive = None if self.path is None else zipfile.ZipFile(self.path)
        self.manifest: dict[str, Any] = {} if self._archive is None else json.loads(self._archive.read("manifest.json"))
        self._modules: dict[str, Any] = {}

    def find(self, op: str, twin: str, key: str) -> dict[str, Any]:
        """The manifest's entry, or a RuntimeError."""
        if self._archive is None:
            raise RuntimeError(f"[{op}] this build has no kernels for {self.name}: build them with tools/gpu_build.py.")
        entry = self.manifest.get(f"{twin} {key}")
        if entry is None:
            raise RuntimeError(
                f"[{op}] {self.path} has no {twin} kernel {key!r}: it is older than this code. Build it with tools/gpu_build.py."
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
