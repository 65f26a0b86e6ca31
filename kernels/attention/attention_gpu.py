"""Attention on the GPU, the host's side: the functions of csrc/bind/attention.cpp.

The kernels want head dimensions and strides that are multiples of 16, so that rows are read by whole vectors. What is not so, the
head dimensions 31 or 8, goes through copies that are padded with zeros; a cache in another type than q, read by many queries, is
copied into q's once. A bfloat16 bias becomes float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LOG2E = 1.4426950408889634

HEADS = (64, 128, 256)  # head dimensions that kernels are compiled for
# Triton has forms with and without a bias for these: where it pays, or where being told at run time costs a register too many. The
# others have one form.
UNBIASED = (("bf16", 64), ("bf16", 128), ("fp32", 256))
# Triton: (rows, keys, warps, stages) by type, head dimension and whether there may be a bias. They are held to 99 KB of shared memory,
# so that the portable form runs on every card, and to no spilled register.
FORWARD = {
    ("bf16", 64, False): (128, 64, 8, 3),
    ("bf16", 64, True): (128, 32, 8, 2),
    ("bf16", 128, False): (64, 64, 8, 2),
    ("bf16", 128, True): (64, 32, 8, 2),
    ("bf16", 256, True): (32, 32, 8, 2),
    ("fp32", 64, True): (32, 16, 4, 2),
    ("fp32", 128, True): (32, 32, 8, 2),
    ("fp32", 256, False): (16, 16, 8, 2),
    ("fp32", 256, True): (16, 16, 8, 2),
}
BACKWARD = {
    ("q", "bf16", 64, False): (128, 64, 8, 2),
    ("q", "bf16", 64, True): (64, 64, 4, 2),
    ("q", "bf16", 128, False): (64, 32, 4, 2),
    ("q", "bf16", 128, True): (64, 32, 4, 2),
    ("q", "bf16", 256, True): (32, 32, 8, 1),
    ("q", "fp32", 64, True): (32, 32, 4, 1),
    ("q", "fp32", 128, True): (32, 16, 4, 1),
    ("q", "fp32", 256, False): (16, 16, 8, 1),
    ("q", "fp32", 256, True): (16, 16, 8, 1),
    ("kv", "bf16", 64, False): (32, 64, 4, 2),
    ("kv", "bf16", 64, True): (32, 64, 4, 2),
    ("kv", "bf16", 128, False): (32, 64, 8, 2),
    ("kv", "bf16", 128, True): (32, 64, 8, 2),
    ("kv", "bf16", 256, True): (32, 32, 8, 1),
    ("kv", "fp32", 64, True): (16, 32, 4, 1),
    ("kv", "fp32", 128, True): (16, 16, 8, 1),
    ("kv", "fp32", 256, False): (16, 16, 8, 1),
    ("kv", "fp32", 256, True): (16, 16, 8, 1),
    ("bias", "bf16", 64, True): (64, 32, 8, 2),
    ("bias", "fp32", 64, True): (32, 16, 8, 1),
}
# By whether products are of bfloat16.
DECODE = {
    (True, 64): (16, 64, 4, 3),
    (True, 128): (16, 32, 4, 3),
    (True, 256): (16, 32, 8, 2),
    (False, 64): (16, 32, 4, 3),
    (False, 128): (16, 16, 4, 2),
    (False, 256): (16, 16, 8, 3),
}
# CUDA C++: (warps, keys of a tile) forward, (warps, rows or keys of a tile) backward. A warp owns 16 rows.
CUDA = {
    ("bf16", 64): (4, 64, 4, 64),
    ("bf16", 128): (4, 64, 4, 32),
    ("bf16", 256): (4, 32, 2, 16),
    ("fp32", 64): (4, 32, 4, 32),
    ("fp32", 128): (2, 16, 2, 16),
    ("fp32", 256): (1, 8, 1, 16),
}
COPIES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "i8"), ("bf16", "i8"))  # to, from
# On tensor cores (tools/gpu_build.py --check).
EXPECTS = {
    f"attention_{kernel} {first}:?bf16 *HEAD={head} *": {"80": "HMMA", "90": "HGMMA"}
    for kernel, first in (("forward", "y"), ("backward_q", "dq"))
    for head in HEADS[:2]
}
EXPECTS |= {f"attention_{kernel}*_bf16_*": {"80": "HMMA", "90": "HMMA"} for kernel in ("forward", "backward")}
EXPECTS |= {n: {"80": "HMMA", "90": "HMMA", "100": "HMMA"} for n in ("attention_decode_bf16_*", "attention_backward_bias_bf16")}
# CUDA C++, decoding: (warps, keys of a warp's tile, rows of a block), by whether products are of bfloat16.
CUDA_DECODE = {
    **{(True, head): (2 if head == 256 else 4, 16, 16) for head in HEADS},
    **{(False, head): (2 if head == 256 else 4, 8, 8) for head in HEADS},
}
SPLITS = 64  # at most; a chunk has CHUNK keys or more
CHUNK = 256
DECODE_QUERIES = 16  # up to so many queries without a gradient, the keys are split


def attention_forward(
    gpu: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, bias: Any, lengths: Any, window: int, scale: float, causal: bool,
    table: Any = None,
) -> None:  # fmt: skip
    (B, T, _, _), S = q.shape, k.shape[1] if table is None else table.shape[1] * k.shape[1]
    bias = None if bias is None else _float32(gpu, bias)
    if stats is None and 0 < T <= DECODE_QUERIES and S:
        _decode(gpu, y, q, k, v, bias, lengths, window, scale, causal, table)
        return
    if table is not None:
        k, v = (_gathered(gpu, x, q.dtype, table, lengths) for x in (k, v))
    seen = {"lengths": _numbers(gpu, lengths), "form": int(lengths is not None)}
    _forward(gpu, y, stats, q, k, v, bias, seen, B, T, S, window, scale, causal)


def attention_packed_forward(
    gpu: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, offsets: Any, longest: int, window: int, scale: float, causal: bool
) -> None:
    seen = {"lengths": offsets, "form": 2}
    y, q, k, v = (x[None] for x in (y, q, k, v))
    _forward(gpu, y, stats, q, k, v, None, seen, offsets.shape[0] - 1, longest, longest, window, scale, causal)


def attention_backward(
    gpu: Any, dq: Any, dk: Any, dv: Any, dbias: Any, dy: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, bias: Any,
    lengths: Any, window: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    (B, T, _, _), S = q.shape, k.shape[1]
    seen = {"lengths": _numbers(gpu, lengths), "form": int(lengths is not None)}
    bias = None if bias is None else _float32(gpu, bias)
    _backward(gpu, dq, dk, dv, dbias, dy, y, stats, q, k, v, bias, seen, B, T, S, window, scale, causal)


def attention_packed_backward(
    gpu: Any, dq: Any, dk: Any, dv: Any, dy: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, offsets: Any, longest: int,
    window: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    seen = {"lengths": offsets, "form": 2}
    dq, dk, dv, dy, y, q, k, v = (x[None] for x in (dq, dk, dv, dy, y, q, k, v))
    B = offsets.shape[0] - 1
    _backward(gpu, dq, dk, dv, None, dy, y, stats, q, k, v, None, seen, B, longest, longest, window, scale, causal)


_PLAIN = (
    "form",
    "biased",
    "B",
    "T",
    "S",
    "H",
    "share",
    "tiles",
    "splits",
    "chunk",
    "bias_batch",
    "bias_head",
    "bias_time",
    "causal",
)
_PLAIN += (
    "paged",
    "table_row",
    "page",
    "pages",
    "window",
    "batches",
    "heads",
    "row_tiles",
    "key_tiles",
    "rows",
    "width",
    "out_width",
)


def _forward(
    gpu: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, bias: Any, seen: dict[str, Any], B: int, T: int, S: int, window: int,
    scale: float, causal: bool,
) -> None:  # fmt: skip
    if not y.size:
        return
    E, whole, H = y.shape[3], _whole(gpu, y), q.shape[2]
    q = _aligned(gpu, q)
    k, v = (_aligned(gpu, x, q.dtype, seen) for x in (k, v))
    stats = gpu.empty((*q.shape[:3], 2), np.float32) if stats is None else stats
    head = _head(q.shape[3], E)
    given = {"q": q, "k": k, "v": v} | _bias(gpu, bias, q, head, stats) | seen | _sizes(q, k, v, T, S)
    strides, masks = _strides(q=q, k=k, v=v), _masks(bias, causal, window, scale)
    if gpu.twin == "cuda":
        warps, keys = CUDA[_name(q), head][:2]
        tiles = -(-T // (16 * warps))
        arguments = {"y": whole, "stats": stats} | given | strides | masks | {"tiles": tiles}
        _cuda(gpu, "forward", (tiles * B * H,), warps, keys, arguments, q, head, 16 * warps + 4 * keys)
        _into(gpu, y, whole)
        return
    rows, keys, warps, stages = FORWARD[_name(q), head, given["bias"] is not None]
    tiles = -(-T // rows)
    arguments = {"y": whole, "stats": stats} | given | {"tiles": tiles} | strides | masks
    gpu.triton(
        "attention_forward", (tiles * B * H,), arguments, plain=_PLAIN, warps=warps, stages=stages, HEAD=head, ROWS=rows, KEYS=keys
    )
    _into(gpu, y, whole)


def _backward(
    gpu: Any, dq: Any, dk: Any, dv: Any, dbias: Any, dy: Any, y: Any, stats: Any, q: Any, k: Any, v: Any, bias: Any,
    seen: dict[str, Any], B: int, T: int, S: int, window: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    outs = [dq, dk, dv]
    dq, dk, dv = (_whole(gpu, x) for x in outs)
    q, k, v, dy, y = (_aligned(gpu, x) for x in (q, k, v, dy, y))
    (H, G), head = (q.shape[2], k.shape[2]), _head(q.shape[3], v.shape[3])
    cuda = gpu.twin == "cuda"

    def tile(kernel: str) -> tuple[int, ...]:
        """Rows, keys, warps, stages."""
        if not cuda:
            return BACKWARD[kernel, _name(q), HEADS[0] if kernel == "bias" else head, shared["bias"] is not None]
        warps, other = CUDA[_name(q), HEADS[0] if kernel == "bias" else head][2:]
        return (other, 16 * warps, warps, 2) if kernel == "kv" else (16 * warps, other, warps, 2)

    delta = gpu.empty(q.shape[:3], np.float32)
    masks, sizes = _masks(bias, causal, window, scale), _sizes(q, k, v, T, S)

    def launch(kernel: str, programs: int, before: dict[str, Any], after: dict[str, int], strides: dict[str, int]) -> None:
        rows, keys, warps, stages = tile(kernel)
        name = f"backward_{kernel}"
        if cuda:
            arguments = before | shared | sizes | inputs | masks | strides | after
            parts = -(-head // (128 if _name(q) == "bf16" else 64)) if kernel == "kv" else 1
            own, other = 16 * warps, rows if kernel == "kv" else keys
            held = 2 * own + (2 if kernel == "bias" else 4) * other
            form = None if kernel == "bias" else head
            _cuda(gpu, name, (programs, parts), warps, other, arguments, q, form, held)
            return
        first = {"B": after.pop("B")} if "B" in after else {}
        told = {n: x for n, x in shared.items() if kernel != "bias" or n != "biased"}
        arguments = before | told | first | sizes | after | strides | inputs | masks
        constants = {"HEAD": HEADS[0] if kernel == "bias" else head, "ROWS": rows, "KEYS": keys}
        parts = 4 if kernel == "kv" and _name(q) == "fp32" and head == 256 else 1  # LARGE
        gpu.triton(f"attention_{name}", (programs, parts), arguments, plain=_PLAIN, warps=warps, stages=stages, **constants)

    inputs = _strides(q=q, k=k, v=v)
    shared = {"q": q, "k": k, "v": v} | _bias(gpu, bias, q, head, delta) | seen
    given, tiles = {"dq": dq, "delta": delta, "dy": dy, "y": y, "stats": stats}, -(-T // tile("q")[0])
    launch("q", tiles * B * H, given, {"tiles": tiles}, _strides(dq=dq))
    given, tiles = {"dk": dk, "dv": dv, "delta": delta, "dy": dy, "stats": stats}, -(-S // tile("kv")[1])
    launch("kv", tiles * B * G, given, {"tiles": tiles}, _strides(dk=dk, dv=dv))
    if dbias is not None:
        (batches, heads), (rows, keys) = dbias.shape[:2], tile("bias")[:2]
        row_tiles, key_tiles = -(-T // rows), -(-S // keys)
        after = {"B": B, "batches": batches, "heads": heads, "row_tiles": row_tiles, "key_tiles": key_tiles}
        given = {"dbias": dbias, "delta": delta, "dy": dy, "stats": stats}
        launch("bias", batches * heads * row_tiles * key_tiles, given, after, {})
    for out, whole in zip(outs, (dq, dk, dv), strict=True):
        _into(gpu, out, whole)


def _decode(
    gpu: Any, y: Any, q: Any, k: Any, v: Any, bias: Any, lengths: Any, window: int, scale: float, causal: bool, table: Any
) -> None:
    """Chunks of keys into partial sums, then their sum. What is launched depends on shapes alone: lengths and pages are in memory."""
    if not y.size:
        return
    E, whole, bytes_ = y.shape[3], _whole(gpu, y), _is_bytes(k)
    cuda, narrow = gpu.twin == "cuda", _name(q) == "bf16" and _name(k) != "fp32"
    q = _aligned(gpu, q, q.dtype if cuda or narrow else np.float32)
    seen = {"lengths": _numbers(gpu, lengths), "form": int(lengths is not None)}
    fits = bytes_ and q.shape[3] == k.shape[3] - 4 and E % 16 == 0 and all(_fits(x, 4) for x in (k, v))
    if not fits:  # pages are copied whole
        k, v = (_aligned(gpu, x, q.dtype if bytes_ else x.dtype, None if table is not None else seen) for x in (k, v))
        narrow = _name(q) == "bf16" and _name(k) != "fp32"
    (B, T, H, D), G, E = q.shape, k.shape[2], whole.shape[3]
    S = k.shape[1] if table is None else table.shape[1] * k.shape[1]
    chunk = max(CHUNK, -(-S // (64 * SPLITS)) * 64)
    splits, head, rows = -(-S // chunk), _head(D, E), T * (H // G)
    partial, sums = gpu.empty((B * T * H, splits, E), np.float32), gpu.empty((B * T * H, splits, 2), np.float32)
    sizes = {"T": T, "S": S, "H": H, "share": H // G, "D": D, "E": E}
    places = {"k_head": k.shape[3], "v_head": v.shape[3]}
    pages = _pages(gpu, k, table)
    strides, masks = _strides(q=q, k=k, v=v), _masks(bias, causal, window, scale)
    if cuda:
        arguments: dict[str, Any] = {"partial": partial, "sums": sums, "q": q, "k": k, "v": v, "bias": bias, "table": table}
        arguments |= seen | sizes | strides | masks | {"q_narrow": int(_name(q) == "bf16")} | places
        arguments |= {"splits": splits, "chunk": chunk} | {n: pages[n] for n in ("table_row", "page", "pages")}
        warps, keys, each = CUDA_DECODE[narrow, head]
        entry = f"attention_decode_{'bf16' if narrow else 'fp32'}_{_name(k)}_{head}"
        grid, shared = (splits * G * B, -(-rows // each)), _decode_shared(narrow, k.dtype.itemsize, head)
        gpu.cuda(entry, grid, 32 * warps, list(arguments.values()), shared=shared)
        gpu.cuda("attention_combine", (B * T * H,), 64, [whole, int(_name(whole) == "bf16"), partial, sums, splits, E])
        _into(gpu, y, whole)
        return
    each, keys, warps, stages = DECODE[narrow, head]
    unit = 4 if fits else 1
    strides |= {n: s // unit for n, s in strides.items() if n[0] in "kv"} | {n: s // unit for n, s in places.items()}
    order = (*(f"q_{a}" for a in ("batch", "time")), *(f"{n}_{a}" for n in "kv" for a in ("batch", "time", "head")))
    arguments = {"partial": partial, "sums": sums, "q": q, "k": k, "v": v, "bias": sums if bias is None else bias} | seen | pages
    arguments |= (
        {"biased": int(bias is not None)} | sizes | {"splits": splits, "chunk": chunk} | {n: strides[n] for n in order} | masks
    )
    del arguments["unit"]
    plain = _PLAIN + (tuple(n for n in order if n[0] in "kv") if fits else ())
    grid = (splits * G * B, -(-rows // each))
    gpu.triton("attention_decode", grid, arguments, plain=plain, warps=warps, stages=stages, HEAD=head, ROWS=each, KEYS=keys)
    arguments = {"y": whole, "partial": partial, "sums": sums, "splits": splits, "E": E}
    gpu.triton("attention_combine", (B * T * H, -(-E // 64)), arguments, plain=("splits",), SPLITS=SPLITS, BLOCK=64)
    _into(gpu, y, whole)


def _decode_shared(narrow: bool, size: int, head: int) -> int:
    """Bytes of shared memory, as attention_cuda_decode.h lays it out: the queries, and for each warp two tiles of keys and values."""
    warps, keys, rows = CUDA_DECODE[narrow, head]
    wide = head * size
    row = wide + 16 if narrow and size > 1 else wide if wide % 128 else wide + 64
    tile = keys * row + (4 * keys if size == 1 else 0)
    queries = rows * (head + 8) * 2 if narrow else rows * head * 4
    extra = (keys * (head + 8) * 2 if size == 1 else 0) if narrow else (keys + 1) * rows * 4
    return int(queries + warps * (4 * tile + extra))


def _pages(gpu: Any, k: Any, table: Any) -> dict[str, Any]:
    """Where keys are: in pages by a table (B, blocks), or as they lie."""
    row, page, pages = (0, 1, 1) if table is None else (table.strides[0] // 4, k.shape[1], k.shape[0])
    paged = int(table is not None)
    return {"table": _numbers(gpu, table), "paged": paged, "table_row": row, "page": page, "pages": pages}


def _gathered(gpu: Any, x: Any, dtype: Any, table: Any, lengths: Any) -> Any:
    """Pages (pages, page, G, width) as (B, S, G, width), of this dtype, no further than the lengths."""
    (B, blocks), width = table.shape, x.shape[3] - 4 * _is_bytes(x)
    out = gpu.empty((B, blocks * x.shape[1], x.shape[2], -(-width // 16) * 16), dtype)
    _copy(gpu, out, x, width, {"lengths": _numbers(gpu, lengths), "form": int(lengths is not None)}, table)
    return out


def _cuda(
    gpu: Any,
    name: str,
    grid: tuple[int, ...],
    warps: int,
    keys: int,
    arguments: dict[str, Any],
    q: Any,
    head: int | None,
    rows: int,
) -> None:
    """head: None where one form is for all. rows: of q, k, v, dy in shared memory, each 16 bytes longer than the head dimension."""
    weights = 16 * warps * (keys + 1) * 4 if _name(q) == "fp32" else 0
    shared = rows * ((head or HEADS[0]) * q.dtype.itemsize + 16) + weights
    entry = f"attention_{name}_{_name(q)}{'' if head is None else f'_{head}'}"
    gpu.cuda(entry, grid, 32 * warps, list(arguments.values()), shared=shared)


# --- arguments ---


def _name(x: Any) -> str:
    return {1: "i8", 2: "bf16", 4: "fp32"}[x.dtype.itemsize]


def _is_bytes(x: Any) -> bool:
    return bool(x.dtype.itemsize == 1)


def _head(D: int, E: int) -> int:
    """The head dimension that holds both."""
    for head in HEADS:
        if max(D, E) <= head:
            return head
    raise ValueError(f"[attention] on a GPU head dimensions must be at most {HEADS[-1]}, got {max(D, E)}.")


def _stride(x: Any, axis: int) -> int:
    """In elements; that of an axis of one is arbitrary."""
    return 0 if x.shape[axis] <= 1 else int(x.strides[axis] // x.dtype.itemsize)


def _strides(**arrays: Any) -> dict[str, int]:
    return {f"{n}_{axis}": _stride(x, i) for n, x in arrays.items() for i, axis in enumerate(("batch", "time"))}


def _sizes(q: Any, k: Any, v: Any, T: int, S: int) -> dict[str, int]:
    return {"T": T, "S": S, "H": q.shape[2], "share": q.shape[2] // k.shape[2], "D": q.shape[3], "E": v.shape[3]}


def _masks(bias: Any, causal: bool, window: int, scale: float) -> dict[str, Any]:
    strides = (0, 0, 0) if bias is None else tuple(_stride(bias, i) for i in range(3))
    names = ("bias_batch", "bias_head", "bias_time")
    unit = abs(scale) * LOG2E if scale else LOG2E
    masks = {"causal": int(causal), "window": window, "scale": float(scale), "unit": unit}
    return dict(zip(names, strides, strict=True)) | masks


def _bias(gpu: Any, bias: Any, q: Any, head: int, some: Any) -> dict[str, Any]:
    """The bias as a kernel takes it; `some` array of float32 stands for none in Triton's forms that are told so at run time."""
    if gpu.twin == "cuda":
        return {"bias": bias}
    if (_name(q), head) in UNBIASED:
        return {"bias": bias, "biased": None}
    return {"bias": some if bias is None else bias, "biased": int(bias is not None)}


def _numbers(gpu: Any, x: Any) -> Any:
    """x, or for None some array that is not read."""
    return gpu.empty((1,), np.int32) if x is None else x


# --- copies ---


def _fits(x: Any, unit: int) -> bool:
    """Whether x (B, T, heads, width) begins at a multiple of 16 bytes, its strides being multiples of `unit` elements."""
    return x.pointer % 16 == 0 and all(n % unit == 0 for n in (_stride(x, 0), _stride(x, 1), x.shape[3]))


def _aligned(gpu: Any, x: Any, dtype: Any = None, seen: dict[str, Any] | None = None) -> Any:
    """x (B, T, heads, width) as the kernels read it, or a copy: of this dtype, and no further than the lengths in `seen`."""
    dtype = x.dtype if dtype is None else dtype
    if x.dtype == dtype and _fits(x, 16):
        return x
    width = x.shape[3] - 4 * _is_bytes(x)
    out = gpu.empty((*x.shape[:3], -(-width // 16) * 16), dtype)
    _copy(gpu, out, x, width, seen)
    return out


def _whole(gpu: Any, y: Any) -> Any:
    """Where an output is written: y, or a padded array that `_into` copies from."""
    return y if _fits(y, 16) else gpu.empty((*y.shape[:3], -(-y.shape[3] // 16) * 16), y.dtype)


def _into(gpu: Any, y: Any, whole: Any) -> None:
    if whole is y:
        return
    if y.pointer % 16:
        gpu.device.assign(y, whole[..., : y.shape[3]])
    else:
        _copy(gpu, y, whole, y.shape[3])


def _float32(gpu: Any, bias: Any) -> Any:
    """bias (., ., T, S) in float32 from a multiple of 16 bytes."""
    if bias.dtype == np.float32:
        return bias if bias.pointer % 16 == 0 else bias.copy()
    out = gpu.empty(bias.shape, np.float32)
    b, h, T, S = bias.shape
    _copy(gpu, out.reshape(b * h, T, 1, S), bias.copy().reshape(b * h, T, 1, S), S)
    return out


def _copy(gpu: Any, out: Any, x: Any, width: int, seen: dict[str, Any] | None = None, table: Any = None) -> None:
    if not out.size:
        return
    x = x if x.pointer % 16 == 0 else x.copy()
    seen = {"lengths": _numbers(gpu, None), "form": 0} if seen is None or seen["form"] != 1 else seen
    B, T, heads, _ = out.shape
    rows = B * T * heads
    arguments = {"out": out, "x": x} | seen | _pages(gpu, x, table) | {"T": T, "heads": heads, "rows": rows, "width": width}
    arguments |= (
        {"out_width": out.shape[3]} | _strides(x=x) | {"x_head": x.shape[3]} | _strides(out=out) | {"out_head": out.shape[3]}
    )
    plain = tuple(n for n in arguments if n not in ("out", "x", "lengths", "table"))
    gpu.triton("attention_copy", (-(-rows // 32),), arguments, plain=plain, ROWS=32, BLOCK=64)
