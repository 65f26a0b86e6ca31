"""Embedding in Triton. The contract is embedding.h; tables, rows and their gradients are float32 or bfloat16, ids int32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def embedding_forward(y, ids, weight, V, C, BLOCK: tl.constexpr):
    """y (N, C): a program copies BLOCK columns of a row. An id outside the table gives nan."""
    id = tl.load(ids + tl.program_id(0))
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(weight + id.to(tl.int64) * C + c, mask=(c < C) & (id >= 0) & (id < V), other=float("nan"))
    tl.store(y + tl.program_id(0).to(tl.int64) * C + c, row.to(tl.float32).to(y.dtype.element_ty), mask=c < C)


@triton.jit
def embedding_narrow(to, ids, N, BLOCK: tl.constexpr):
    """int64 ids as int32, -1 for what int32 does not hold."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + i, mask=i < N, other=0)
    tl.store(to + i, tl.where((id < 0) | (id > 0x7FFFFFFF), -1, id).to(tl.int32), mask=i < N)


@triton.jit
def embedding_sort(order, sorted, ids, first, n, V, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The n ids from `first` on in rising order, equal ones as they come: sorted (n,) and their places, order (n,).

    Each finds its rank by counting those before it. What is outside of the table is taken for V, the last.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(ids + first + i, mask=i < n, other=0)
    a = tl.where((a < 0) | (a >= V), V, a)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)
        b = tl.load(ids + first + j, mask=j < n, other=0)
        b = tl.where((b < 0) | (b >= V), V, b)
        before = (b[None, :] < a[:, None]) | ((b[None, :] == a[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((before & (j < n)[None, :]).to(tl.int32), 1)
    tl.store(order + rank, i, mask=i < n)
    tl.store(sorted + rank, a, mask=i < n)


@triton.jit
def embedding_backward(dweight, dy, order, sorted, first, n, V, C, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """A program whose id is the first of its kind adds up the rows of all of that kind, TILE at once, in their order."""
    at = tl.program_id(0)
    id = tl.load(sorted + at)
    other = tl.load(sorted + at - 1, mask=at > 0, other=-1)
    if (id != other) & (id < V):
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros([TILE, BLOCK], tl.float32)
        found = TILE
        while found == TILE:
            k = at + tl.arange(0, TILE)
            same = tl.load(sorted + k, mask=k < n, other=-1) == id
            row = (first + tl.load(order + k, mask=same, other=0)).to(tl.int64)
            inside = same[:, None] & (c < C)[None, :]
            sums += tl.load(dy + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            found = tl.sum(same.to(tl.int32), 0)
            at += TILE
        to = dweight + id.to(tl.int64) * C + c
        tl.store(to, tl.load(to, mask=c < C, other=0.0) + tl.sum(sums, 0), mask=c < C)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that embedding_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3}
    for y, weight in (("*fp32", "*fp32"), ("*bf16", "*bf16"), ("*fp32", "*bf16")):
        for C in ("i32:16", "i32"):
            yield "embedding_forward", {"y": y, "ids": "*i32", "weight": weight, "V": "i32", "C": C}, {"BLOCK": 1024}, options
    yield "embedding_narrow", {"to": "*i32", "ids": "*i64", "N": "i32"}, {"BLOCK": 1024}, options
    whole: dict[str, str | None] = {"first": "i32", "n": "i32", "V": "i32"}
    yield "embedding_sort", {"order": "*i32", "sorted": "*i32", "ids": "*i32"} | whole, {"BLOCK": 64, "TILE": 128}, options
    for f in ("*fp32", "*bf16"):
        types = {"dweight": "*fp32", "dy": f, "order": "*i32", "sorted": "*i32"} | whole | {"C": "i32"}
        yield "embedding_backward", types, {"TILE": 8, "BLOCK": 256}, options
