"""Embedding on the GPU, the host's side: the functions of csrc/bind/embedding.cpp."""

from __future__ import annotations

from typing import Any

SORTED = 8192  # ids that are sorted at once: each is compared with all of these


def embedding_forward(gpu: Any, y: Any, ids: Any, weight: Any) -> None:
    V, C = weight.shape
    arguments = {"y": y, "ids": embedding_ids(gpu, ids), "weight": weight, "V": V, "C": C}
    gpu.triton("embedding_forward", (ids.size, -(-C // 1024)), arguments, plain=("V",) if C % 16 == 0 else ("V", "C"), BLOCK=1024)


def embedding_backward(gpu: Any, dweight: Any, ids: Any, dy: Any) -> None:
    """ids are sorted, so that the rows of one are added by one program; pieces of ids follow each other."""
    V, C = dweight.shape
    ids = embedding_ids(gpu, ids)
    size = min(ids.size, SORTED)
    order, sorted_ = gpu.empty((size,), "int32"), gpu.empty((size,), "int32")
    for first in range(0, ids.size, SORTED):
        n = min(SORTED, ids.size - first)
        whole = {"first": first, "n": n, "V": V}
        arguments = {"order": order, "sorted": sorted_, "ids": ids} | whole
        gpu.triton("embedding_sort", (-(-n // 64),), arguments, plain=tuple(whole), BLOCK=64, TILE=128)
        arguments = {"dweight": dweight, "dy": dy, "order": order, "sorted": sorted_} | whole | {"C": C}
        gpu.triton("embedding_backward", (n, -(-C // 256)), arguments, plain=(*whole, "C"), TILE=8, BLOCK=256)


def embedding_ids(gpu: Any, ids: Any) -> Any:
    """ids as int32: themselves, or a copy."""
    if ids.dtype.itemsize == 4:
        return ids
    to = gpu.empty(ids.shape, "int32")
    gpu.triton("embedding_narrow", (-(-ids.size // 1024),), {"to": to, "ids": ids, "N": ids.size}, plain=("N",), BLOCK=1024)
    return to
