"""Appending to a cache on the GPU, the host's side: the function of csrc/bind/cache_append.cpp."""

from __future__ import annotations

from typing import Any

from fastlm.cuda.array import floor16 as _floor16


def cache_append(gpu: Any, keys: Any, values: Any, k: Any, v: Any, positions: Any, kind: int, table: Any = None) -> None:
    B, T, G, D = k.shape
    E = v.shape[3]
    arrays: dict[str, Any] = {"keys": keys, "values": values, "k": k, "v": v}
    whole = {"D": D, "E": E}
    for name, x in arrays.items():
        arrays[name], whole[f"{name}_first"] = _floor16(x)
        whole[f"{name}_batch"], whole[f"{name}_time"] = (s // x.dtype.itemsize for s in x.strides[:2])
    row, page, pages = (0, 1, 1) if table is None else (table.strides[0] // 4, keys.shape[1], keys.shape[0])
    capacity = keys.shape[1] if table is None else table.shape[1] * page
    places = {"table": positions if table is None else table, "paged": int(table is not None)}
    places |= {"table_row": row, "page": page, "pages": pages}
    arguments = arrays | {"positions": positions} | places | {"T": T, "G": G, "D": D, "E": E, "capacity": capacity} | whole
    plain = (
        "T",
        "G",
        "capacity",
        "starts",
        "paged",
        "table_row",
        "page",
        "pages",
        *(whole if any(n % 16 for n in whole.values()) else ()),
    )
    arguments |= {"starts": int(positions.ndim == 1)}
    gpu.triton("cache_append", (B * T, -(-G // 8)), arguments, plain=plain, KIND=kind, HEADS=8, BLOCK=64)
