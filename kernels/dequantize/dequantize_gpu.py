"""Quantised blocks to float32 or bfloat16 on the GPU, the host's side: the function of csrc/bind/dequantize.cpp."""

from __future__ import annotations

from typing import Any

from fastlm.cuda.array import retyped as _retyped

# ggml's number of a kind -> weights of a block, its bytes, blocks of a program
_FORMATS = {
    2: (32, 18, 64),
    3: (32, 20, 64),
    6: (32, 22, 64),
    7: (32, 24, 64),
    8: (32, 34, 64),
    12: (256, 144, 8),
    13: (256, 176, 8),
    14: (256, 210, 8),
}


def dequantize(gpu: Any, w: Any, blocks: Any, ids: Any, kind: int) -> None:
    """w (..., C) float32 or bfloat16. An id outside of the rows of blocks gives nan."""
    values, size, count = _FORMATS[kind]
    n = w.size // values
    if n == 0:
        return
    rows = _retyped(blocks, "int32") if ids is None else gpu.device.table.embedding_ids(ids)
    arguments = {"w": w, "blocks": blocks, "ids": rows, "n": n, "each": w.shape[-1] // values, "rows": blocks.shape[0]}
    plain = ("n", "each", "rows", "chosen")
    arguments |= {"chosen": int(ids is not None)}
    gpu.triton("dequantize", (-(-n // count),), arguments, plain=plain, fused=False, KIND=kind, BYTES=size, COUNT=count)
