"""Rows to ggml's blocks on the GPU, the host's side: the function of csrc/bind/quantize.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np

_BYTES = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34}  # ggml's number of a kind -> bytes of a block
_NONE = 2**31 - 1


def quantize(gpu: Any, blocks: Any, x: Any, kind: int) -> int:
    """The first row that cannot be written, or -1. Waits for the device."""
    n = x.size // 32
    bad = gpu.device.put(np.array([_NONE], np.int32))
    arguments = {"blocks": blocks, "x": x, "bad": bad, "n": n, "each": x.shape[-1] // 32}
    constants = {"KIND": kind, "BYTES": _BYTES[kind], "BLOCKS": 64}
    gpu.triton("quantize", (-(-n // 64),), arguments, plain=("n", "each"), fused=False, **constants)
    row = int(bad.item())
    return -1 if row == _NONE else row
