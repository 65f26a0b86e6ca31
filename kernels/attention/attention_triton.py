"""Attention in Triton: forward, backward, decoding with split keys. The contract is attention.h.

A score is the bare product of q and k, and a weight 2^((score - largest) steep); with a bias it is scaled, and steep is log2(e). What
all kernels share: `form` says what `lengths` is, 0: nothing (S keys), 1: lengths (B,), 2: offsets (B + 1,) of packed sequences,
whose batch strides are 0. Head dimensions and strides of q, k, v and of gradients are multiples of 16, see attention_gpu.py.
unit is |scale| log2(e); the scale's sign goes into q (or k), so that the largest score has the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.attention.attention_gpu import BACKWARD, COPIES, DECODE, FORWARD, HEADS, SPLITS, UNBIASED

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(lengths, form, b, T, S):
    """Of sequence b: its queries, its keys, and the row where it begins among packed ones."""
    first = tl.load(lengths + b, mask=form == 2, other=0)
    keys = tl.load(lengths + b + (form == 2).to(tl.int32), mask=form != 0, other=0) - first
    return tl.where(form == 2, keys, T), tl.where(form == 0, S, keys), first


@triton.jit
def _span(t, rows, keys, causal, window):
    """The keys [low, high) that query t sees."""
    high = tl.where(causal != 0, tl.minimum(tl.maximum(keys - rows + t + 1, 0), keys), keys)
    return tl.where(window > 0, tl.maximum(high - window, 0), 0), high


@triton.jit
def _halves(x):
    """The columns 0, 2, ... and 1, 3, ..."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _four(a, b):
    a_even, a_odd = _halves(a)
    b_even, b_odd = _halves(b)
    a0, a2 = _halves(a_even)
    b0, b2 = _halves(b_even)
    a1, a3 = _halves(a_odd)
    b1, b3 = _halves(b_odd)
    even = tl.dot(a0, tl.trans(b0), input_precision="ieee") + tl.dot(a2, tl.trans(b2), input_precision="ieee")
    return even + (tl.dot(a1, tl.trans(b1), input_precision="ieee") + tl.dot(a3, tl.trans(b3), input_precision="ieee"))


@triton.jit
def _products(a, b):
    """a b^T. In float32 in four chains, of the elements d, d + 4, ...: one long chain would round worse than NumPy's sum."""
    return _four(a, b) if a.dtype == tl.float32 else tl.dot(a, tl.trans(b))


@triton.jit
def _signed(x, scale):
    """x with the sign of the scale, which may be 0."""
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return (x.to(tl.float32) * sign).to(x.dtype)


@triton.jit
def _weights(scores, largest, steep, FINE: tl.constexpr):
    """2^((scores - largest) steep). FINE: the difference is taken first, so that large weights are exact; else it is one fma."""
    if FINE:
        return tl.exp2((scores - largest) * steep)
    return tl.exp2(scores * steep - largest * steep)


@triton.jit
def _rows(x, at, t, rows, d, D):
    """Rows t of x, zeros beyond: `at` are their places."""
    return tl.load(x + at[:, None] + d[None, :], mask=(t < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _units(bias, biased, scale, unit):
    """What scores are multiplied by, and what differences of scores: a bias is added to scaled ones. biased None: wherever it is given."""
    if bias is None:
        return 1.0, unit
    elif biased is None:
        return tl.abs(scale), LOG2E
    else:
        return tl.where(biased != 0, tl.abs(scale), 1.0), tl.where(biased != 0, LOG2E, unit)


@triton.jit
def _scores(raw, bias, biased, bias_at, c, t, rows, keys, low, high, factor, HIDES: tl.constexpr):
    """raw (rows, keys), with a bias scaled and added to it; -inf where hidden."""
    if bias is not None:
        inside = (t < rows)[:, None] & (c < keys)[None, :]
        if biased is not None:
            inside = inside & (biased != 0)
        raw = raw * factor + tl.load(bias + bias_at[:, None] + c[None, :], mask=inside, other=0.0)
    if HIDES:
        raw = tl.where((low[:, None] <= c[None, :]) & (c[None, :] < high[:, None]), raw, float("-inf"))
    return raw


@triton.jit
def _forward_step(
    acc, top, total, q, k, k_at, k_time, v, v_at, v_time, bias, biased, bias_at,
    start, t, rows, keys, low, high, factor, steep, D, E, HEAD: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """One tile of keys for the online softmax."""
    c = start + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    far = c.to(tl.int64)
    if HIDES:
        kt = tl.load(k + k_at + (far * k_time)[:, None] + d[None, :], mask=(c < keys)[:, None] & (d < D)[None, :], other=0.0)
    else:
        kt = tl.load(k + k_at + (far * k_time)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    s = _products(q, kt)
    s = _scores(s, bias, biased, bias_at, c, t, rows, keys, low, high, factor, HIDES)
    FINE: tl.constexpr = q.dtype == tl.float32
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = _weights(s, base[:, None], steep, FINE)
    shrink = _weights(top, base, steep, FINE)
    if HIDES:
        vt = tl.load(v + v_at + (far * v_time)[:, None] + d[None, :], mask=(c < keys)[:, None] & (d < E)[None, :], other=0.0)
    else:
        vt = tl.load(v + v_at + (far * v_time)[:, None] + d[None, :], mask=(d < E)[None, :], other=0.0)
    acc = tl.dot(p.to(vt.dtype), vt, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total * shrink + tl.sum(p, 1)


@triton.jit
def attention_forward(
    y, stats, q, k, v, bias, biased, lengths, form, T, S, H, share, D, E, tiles, q_batch, q_time, k_batch, k_time, v_batch, v_time,
    bias_batch, bias_head, bias_time, causal, window, scale, unit, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS queries of one head: first the tiles of keys that all of them see, then those at the masks' edges."""
    tile = tiles - 1 - tl.program_id(0) % tiles  # where causal, the longest rows begin first
    b = tl.program_id(0) // tiles // H
    h = tl.program_id(0) // tiles % H
    rows, keys, first = _sequence(lengths, form, b, T, S)
    begin = tile * ROWS
    if begin >= rows:
        return
    b64 = b.to(tl.int64)
    t = begin + tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    low, high = _span(t, rows, keys, causal, window)
    factor, steep = _units(bias, biased, scale, unit)
    qt = _signed(_rows(q, b64 * q_batch + (first + t).to(tl.int64) * q_time + h * D, t, rows, d, D), scale)
    k_at = b64 * k_batch + first.to(tl.int64) * k_time + h // share * D
    v_at = b64 * v_batch + first.to(tl.int64) * v_time + h // share * E
    bias_at = b64 * bias_batch + h.to(tl.int64) * bias_head + t.to(tl.int64) * bias_time
    # Keys that any row sees, [from, to), and those that all see, [full, edge), in whole tiles.
    last = tl.minimum(begin + ROWS, rows) - 1
    low_first, high_first = _span(begin, rows, keys, causal, window)
    low_last, high_last = _span(last, rows, keys, causal, window)
    lowest = low_first // KEYS * KEYS
    full = (low_last + KEYS - 1) // KEYS * KEYS
    edge = tl.maximum(high_first // KEYS * KEYS, full)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(full, edge, KEYS):
        acc, top, total = _forward_step(
            acc, top, total, qt, k, k_at, k_time, v, v_at, v_time, bias, biased, bias_at,
            start, t, rows, keys, low, high, factor, steep, D, E, HEAD, KEYS, False,
        )  # fmt: skip
    before = tl.minimum(full, tl.maximum(high_last, lowest)) - lowest
    for i in range(0, before + tl.maximum(high_last - edge, 0), KEYS):
        start = tl.where(i < before, lowest + i, edge + i - before)
        acc, top, total = _forward_step(
            acc, top, total, qt, k, k_at, k_time, v, v_at, v_time, bias, biased, bias_at,
            start, t, rows, keys, low, high, factor, steep, D, E, HEAD, KEYS, True,
        )  # fmt: skip
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    row = (tl.where(form == 2, first, b * T) + t).to(tl.int64) * H + h
    tl.store(stats + 2 * row, tl.where(top == float("-inf"), 0.0, top), mask=t < rows)
    tl.store(stats + 2 * row + 1, inverse, mask=t < rows)
    inside = (t < rows)[:, None] & (d < E)[None, :]
    tl.store(y + (row * E)[:, None] + d[None, :], (acc * inverse[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def attention_backward_q(
    dq, delta, dy, y, stats, q, k, v, bias, biased, lengths, form, T, S, H, share, D, E, tiles, dq_batch, dq_time, q_batch, q_time,
    k_batch, k_time, v_batch, v_time, bias_batch, bias_head, bias_time, causal, window, scale, unit,
    HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries of one head, and delta (rows, H) for the other kernels."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // H
    h = tl.program_id(0) // tiles % H
    rows, keys, first = _sequence(lengths, form, b, T, S)
    begin = tile * ROWS
    if begin >= rows:
        return
    b64 = b.to(tl.int64)
    t = begin + tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    low, high = _span(t, rows, keys, causal, window)
    factor, steep = _units(bias, biased, scale, unit)
    row = (tl.where(form == 2, first, b * T) + t).to(tl.int64) * H + h
    time = (first + t).to(tl.int64)
    qt = _signed(_rows(q, b64 * q_batch + time * q_time + h * D, t, rows, d, D), scale)
    dyt = _rows(dy, row * E, t, rows, d, E)
    top = tl.load(stats + 2 * row, mask=t < rows, other=0.0)
    inverse = tl.load(stats + 2 * row + 1, mask=t < rows, other=0.0)
    k_at = b64 * k_batch + first.to(tl.int64) * k_time + h // share * D
    v_at = b64 * v_batch + first.to(tl.int64) * v_time + h // share * E
    bias_at = b64 * bias_batch + h.to(tl.int64) * bias_head + t.to(tl.int64) * bias_time
    low_first, _ = _span(begin, rows, keys, causal, window)
    _, high_last = _span(tl.minimum(begin + ROWS, rows) - 1, rows, keys, causal, window)
    # delta is the sum of dy * y; in float32 it is summed over the keys again, since y's rounding would be the largest error.
    FINE: tl.constexpr = q.dtype.element_ty == tl.float32
    if FINE:
        dt = tl.zeros([ROWS], tl.float32)
        for start in range(low_first // KEYS * KEYS, high_last, KEYS):
            c = start + tl.arange(0, KEYS)
            kt = _rows(k, k_at + c.to(tl.int64) * k_time, c, keys, d, D)
            vt = _rows(v, v_at + c.to(tl.int64) * v_time, c, keys, d, E)
            s = _products(qt, kt)
            s = _scores(s, bias, biased, bias_at, c, t, rows, keys, low, high, factor, True)
            p = _weights(s, top[:, None], steep, FINE) * inverse[:, None]
            dt += tl.sum(p * _products(dyt, vt), 1)
    else:
        dt = tl.sum(dyt.to(tl.float32) * _rows(y, row * E, t, rows, d, E).to(tl.float32), 1)
    tl.store(delta + row, dt, mask=t < rows)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    for start in range(low_first // KEYS * KEYS, high_last, KEYS):
        c = start + tl.arange(0, KEYS)
        kt = _rows(k, k_at + c.to(tl.int64) * k_time, c, keys, d, D)
        vt = _rows(v, v_at + c.to(tl.int64) * v_time, c, keys, d, E)
        s = _products(qt, kt)
        s = _scores(s, bias, biased, bias_at, c, t, rows, keys, low, high, factor, True)
        p = _weights(s, top[:, None], steep, q.dtype.element_ty == tl.float32) * inverse[:, None]
        ds = p * (_products(dyt, vt) - dt[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision="ieee")
    inside = (t < rows)[:, None] & (d < D)[None, :]
    at = b64 * dq_batch + time * dq_time + h * D
    tl.store(dq + at[:, None] + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def attention_backward_kv(
    dk, dv, delta, dy, stats, q, k, v, bias, biased, lengths, form, T, S, H, share, D, E, tiles, dk_batch, dk_time, dv_batch, dv_time,
    q_batch, q_time, k_batch, k_time, v_batch, v_time, bias_batch, bias_head, bias_time, causal, window, scale, unit,
    HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of one group: over its heads in order, and each one's queries in order. Scores are (keys, rows)."""
    G = H // share
    b = tl.program_id(0) // tiles // G
    g = tl.program_id(0) // tiles % G
    rows, keys, first = _sequence(lengths, form, b, T, S)
    begin = tl.program_id(0) % tiles * KEYS
    held = tl.where(form == 2, keys, S)  # keys whose gradients there are
    if begin >= held:
        return
    b64 = b.to(tl.int64)
    c = begin + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    factor, steep = _units(bias, biased, scale, unit)
    place = (first + c).to(tl.int64)
    kt = _signed(_rows(k, b64 * k_batch + place * k_time + g * D, c, keys, d, D), scale)
    vt = _rows(v, b64 * v_batch + place * v_time + g * E, c, keys, d, E)
    # The queries that see any of these keys, in whole tiles.
    early = tl.where(causal != 0, tl.maximum(begin - keys + rows, 0), 0) // ROWS * ROWS
    late = tl.where((causal != 0) & (window > 0), tl.minimum(rows, begin + KEYS + window - 1 - keys + rows), rows)
    late = tl.where(begin < keys, late, 0)
    count = tl.maximum(late - early + ROWS - 1, 0) // ROWS
    LARGE: tl.constexpr = q.dtype.element_ty == tl.float32 and HEAD == 256  # its columns are shared by four programs
    OUT: tl.constexpr = 64 if LARGE else HEAD
    e = tl.program_id(1) * OUT + tl.arange(0, OUT)
    dk_sum = tl.zeros([KEYS, OUT], tl.float32)
    dv_sum = tl.zeros([KEYS, OUT], tl.float32)
    for i in range(share * count):
        h = g * share + i // count
        t = early + i % count * ROWS + tl.arange(0, ROWS)
        low, high = _span(t, rows, keys, causal, window)
        row = (tl.where(form == 2, first, b * T) + t).to(tl.int64) * H + h
        q_at = b64 * q_batch + (first + t).to(tl.int64) * q_time + h * D
        qt = _rows(q, q_at, t, rows, d, D)
        s = _products(kt, qt)
        if bias is not None:
            bias_at = b64 * bias_batch + h.to(tl.int64) * bias_head + t.to(tl.int64) * bias_time
            seen = (c < keys)[:, None] & (t < rows)[None, :]
            if biased is not None:
                seen = seen & (biased != 0)
            s = s * factor + tl.load(bias + c[:, None] + bias_at[None, :], mask=seen, other=0.0)
        s = tl.where((low[None, :] <= c[:, None]) & (c[:, None] < high[None, :]), s, float("-inf"))
        top = tl.load(stats + 2 * row, mask=t < rows, other=0.0)
        inverse = tl.load(stats + 2 * row + 1, mask=t < rows, other=0.0)
        p = _weights(s, top[None, :], steep, q.dtype.element_ty == tl.float32) * inverse[None, :]
        dyt = _rows(dy, row * E, t, rows, d, E)
        dye = _rows(dy, row * E, t, rows, e, E) if LARGE else dyt
        dv_sum = tl.dot(p.to(dye.dtype), dye, dv_sum, input_precision="ieee")
        dt = tl.load(delta + row, mask=t < rows, other=0.0)
        ds = p * (_products(vt, dyt) - dt[None, :])
        qe = _rows(q, q_at, t, rows, e, D) if LARGE else qt
        dk_sum = tl.dot(ds.to(qe.dtype), qe, dk_sum, input_precision="ieee")
    at = b64 * dk_batch + place * dk_time + g * D
    tl.store(dk + at[:, None] + e[None, :], (dk_sum * scale).to(dk.dtype.element_ty), mask=(c < held)[:, None] & (e < D)[None, :])
    at = b64 * dv_batch + place * dv_time + g * E
    tl.store(dv + at[:, None] + e[None, :], dv_sum.to(dv.dtype.element_ty), mask=(c < held)[:, None] & (e < E)[None, :])


@triton.jit
def attention_backward_bias(
    dbias, delta, dy, stats, q, k, v, bias, lengths, form, B, T, S, H, share, D, E, batches, heads, row_tiles, key_tiles,
    q_batch, q_time, k_batch, k_time, v_batch, v_time, bias_batch, bias_head, bias_time, causal, window, scale, unit,
    HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dbias (batches, heads, T, S) +=: a program owns a tile, and goes over the sequences and heads that share it, in order.

    Of a longer head dimension it multiplies HEAD elements after HEAD: one form for all.
    """
    at = tl.program_id(0) // (row_tiles * key_tiles)
    tile = tl.program_id(0) % (row_tiles * key_tiles)
    t = tile // key_tiles * ROWS + tl.arange(0, ROWS)
    c = tile % key_tiles * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    factor, steep = _units(bias, None, scale, unit)
    each = H // heads  # heads that share it
    acc = tl.zeros([ROWS, KEYS], tl.float32)
    for i in range(B // batches * each):
        b = at // heads + i // each
        h = at % heads + i % each
        b64 = b.to(tl.int64)
        rows, keys, _ = _sequence(lengths, form, b, T, S)
        low, high = _span(t, rows, keys, causal, window)
        row = (b * T + t).to(tl.int64) * H + h
        q_at = b64 * q_batch + t.to(tl.int64) * q_time + h * D
        k_at = b64 * k_batch + h // share * D + c.to(tl.int64) * k_time
        v_at = b64 * v_batch + h // share * E + c.to(tl.int64) * v_time
        s = tl.zeros([ROWS, KEYS], tl.float32)
        dp = tl.zeros([ROWS, KEYS], tl.float32)
        for start in range(0, tl.maximum(D, E), HEAD):
            e = start + d
            s += _products(_signed(_rows(q, q_at, t, rows, e, D), scale), _rows(k, k_at, c, keys, e, D))
            dp += _products(_rows(dy, row * E, t, rows, e, E), _rows(v, v_at, c, keys, e, E))
        top = tl.load(stats + 2 * row, mask=t < rows, other=0.0)
        inverse = tl.load(stats + 2 * row + 1, mask=t < rows, other=0.0)
        dt = tl.load(delta + row, mask=t < rows, other=0.0)
        bias_at = b64 * bias_batch + h.to(tl.int64) * bias_head + t.to(tl.int64) * bias_time
        s = _scores(s, bias, None, bias_at, c, t, rows, keys, low, high, factor, True)
        p = _weights(s, top[:, None], steep, q.dtype.element_ty == tl.float32) * inverse[:, None]
        acc += p * (dp - dt[:, None])
    place = dbias + ((at.to(tl.int64) * T + t) * S)[:, None] + c[None, :]
    inside = (t < T)[:, None] & (c < S)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def _place(row, paged, b, start, page, pages):
    """Of keys from `start` on: the array that they are in, and where there. A number that is no page's is taken for one that is."""
    n = tl.load(row + start // page, mask=paged != 0, other=0)
    n = tl.minimum(tl.maximum(n, 0), pages - 1)
    return tl.where(paged != 0, n, b).to(tl.int64), tl.where(paged != 0, start % page, start)


@triton.jit
def _cached(x, at, c, keys, d, D, UNIT: tl.constexpr):
    """Vectors of a cache as they lie, and their scales where they are int8 (which stand behind them)."""
    vectors = _rows(x, at, c, keys, d, D)
    if UNIT == 4:
        scales = tl.load((x + at + D).to(tl.pointer_type(tl.float32), bitcast=True), mask=c < keys, other=0.0)
    else:
        scales = tl.full(c.shape, 1.0, tl.float32)
    return vectors, scales


@triton.jit
def attention_decode(
    partial, sums, q, k, v, bias, lengths, form, table, paged, table_row, page, pages, biased, T, S, H, share, D, E, splits, chunk,
    q_batch, q_time, k_batch, k_time, k_head, v_batch, v_time, v_head, bias_batch, bias_head, bias_time, causal, window, scale,
    HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """partial (B T H, splits, E), sums (B T H, splits, 2): a program takes a chunk of keys for ROWS of a group's (query, head) pairs.

    Strides of an int8 cache are in units of 4 bytes, so that its vectors are read by four.
    """
    NARROW: tl.constexpr = q.dtype.element_ty == tl.bfloat16 and k.dtype.element_ty != tl.float32  # products of bfloat16
    UNIT: tl.constexpr = 4 if k.dtype.element_ty == tl.int8 else 1
    G = H // share
    split = tl.program_id(0) % splits
    g = tl.program_id(0) // splits % G
    b = tl.program_id(0) // (splits * G)
    b64 = b.to(tl.int64)
    _, keys, _ = _sequence(lengths, form, b, T, S)
    keys = tl.minimum(tl.maximum(keys, 0), S)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = r // share
    h = g * share + r % share
    d = tl.arange(0, HEAD)
    low, high = _span(t, T, keys, causal, window)
    qt = _signed(_rows(q, b64 * q_batch + t.to(tl.int64) * q_time + h * D, t, T, d, D), scale)
    bias_at = b64 * bias_batch + h.to(tl.int64) * bias_head + t.to(tl.int64) * bias_time
    row = table + b64 * table_row
    begin = split * chunk
    some = tl.minimum(tl.program_id(1) * ROWS // share, T - 1)  # the first query here sees the lowest keys
    lowest, _ = _span(some, T, keys, causal, window)
    begin = tl.maximum(begin, lowest // KEYS * KEYS)
    end = tl.minimum(split * chunk + chunk, keys)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, KEYS):
        c = start + tl.arange(0, KEYS)
        place, first = _place(row, paged, b, start, page, pages)
        far = (first + tl.arange(0, KEYS)).to(tl.int64)
        kt, k_scale = _cached(k, (place * k_batch + far * k_time + g * k_head) * UNIT, c, keys, d, D, UNIT)
        vt, v_scale = _cached(v, (place * v_batch + far * v_time + g * v_head) * UNIT, c, keys, d, E, UNIT)
        s = _products(qt, kt.to(tl.bfloat16)) if NARROW else _products(qt.to(tl.float32), kt.to(tl.float32))
        s = s * k_scale[None, :] * tl.abs(scale)
        inside = (t < T)[:, None] & (c < keys)[None, :] & (biased != 0)
        s += tl.load(bias + bias_at[:, None] + c[None, :], mask=inside, other=0.0)
        s = tl.where((low[:, None] <= c[None, :]) & (c[None, :] < high[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((top - base) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        p = p * v_scale[None, :]
        if NARROW:
            acc = tl.dot(p.to(tl.bfloat16), vt.to(tl.bfloat16), acc * shrink[:, None])
        else:
            acc = tl.dot(p, vt.to(tl.float32), acc * shrink[:, None], input_precision="ieee")
        top = new
    at = ((b * T + t).to(tl.int64) * H + h) * splits + split
    tl.store(sums + 2 * at, top, mask=t < T)
    tl.store(sums + 2 * at + 1, total, mask=t < T)
    tl.store(partial + (at * E)[:, None] + d[None, :], acc, mask=(t < T)[:, None] & (d < E)[None, :])


@triton.jit
def attention_combine(y, partial, sums, splits, E, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows, E): a row's chunks are joined, in one order whatever their number."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, SPLITS)
    top = tl.load(sums + (row * splits + i) * 2, mask=i < splits, other=float("-inf"))
    total = tl.load(sums + (row * splits + i) * 2 + 1, mask=i < splits, other=0.0)
    best = tl.max(top, 0)
    weight = tl.exp2((top - tl.where(best == float("-inf"), 0.0, best)) * LOG2E)
    whole = tl.sum(weight * total, 0)
    at = partial + ((row * splits + i) * E)[:, None] + e[None, :]
    parts = tl.load(at, mask=(i < splits)[:, None] & (e < E)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) * tl.where(whole == 0, 0.0, 1.0 / whole)
    tl.store(y + row * E + e, out.to(y.dtype.element_ty), mask=e < E)


@triton.jit
def attention_copy(
    out, x, lengths, form, table, paged, table_row, page, pages, T, heads, rows, width, out_width, x_batch, x_time, x_head,
    out_batch, out_time, out_head,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, T, heads, out_width) = x (B, T, heads, width), as numbers of out's type, zeros behind; rows = B T heads.

    x may be an int8 cache, or pages (pages, page, heads, width). Of a sequence with a length no more is copied.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, t, h = r // heads // T, r // heads % T, r % heads
    n = tl.load(lengths + b, mask=(r < rows) & (form == 1), other=0)
    inside = (r < rows) & (t < tl.where(form == 1, n, T))
    place = tl.load(table + b * table_row + t // page, mask=inside & (paged != 0), other=0)
    place = tl.where(paged != 0, tl.minimum(tl.maximum(place, 0), pages - 1), b)
    from_ = place.to(tl.int64) * x_batch + tl.where(paged != 0, t % page, t) * x_time + h * x_head
    to = b * out_batch + t * out_time + h * out_head
    for start in range(0, out_width, BLOCK):
        e = start + tl.arange(0, BLOCK)
        value = tl.load(x + from_[:, None] + e[None, :], mask=inside[:, None] & (e < width)[None, :], other=0).to(tl.float32)
        if x.dtype.element_ty == tl.int8:
            bits = tl.zeros([ROWS], tl.int32)
            for i in range(4):
                bits |= (tl.load(x + from_ + width + i, mask=inside, other=0).to(tl.int32) & 255) << (8 * i)
            value *= bits.to(tl.float32, bitcast=True)[:, None]
        tl.store(out + to[:, None] + e[None, :], value.to(out.dtype.element_ty), mask=inside[:, None] & (e < out_width)[None, :])


_SEQUENCES = {"lengths": "*i32", "form": "i32"}
_PAGES = {"table": "*i32"} | dict.fromkeys(("paged", "table_row", "page", "pages"), "i32")
_SIZES = dict.fromkeys(("T", "S", "H", "share"), "i32") | {"D": "i32:16", "E": "i32:16"}
_BIAS = dict.fromkeys(("bias_batch", "bias_head", "bias_time", "causal", "window"), "i32") | {"scale": "fp32", "unit": "fp32"}


def _strides(*names: str) -> dict[str, str]:
    return {f"{n}_{axis}": "i32:16" for n in names for axis in ("batch", "time")}


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that attention_gpu.py may ask for: kernel, types, constants, options."""

    def form(shape: tuple[int, int, int, int, int]) -> tuple[dict[str, int], dict[str, int]]:
        head, rows, keys, warps, stages = shape
        return {"HEAD": head, "ROWS": rows, "KEYS": keys}, {"num_warps": warps, "num_stages": stages}

    types: dict[str, str | None]
    for f, head in product(("fp32", "bf16"), HEADS):
        p = f"*{f}"
        qkv: dict[str, str | None] = {"q": p, "k": p, "v": p}
        for bias in (None, "*fp32") if (f, head) in UNBIASED else ("*fp32",):
            shared = (
                qkv | {"bias": bias, "biased": None if (f, head) in UNBIASED else "i32"} | _SEQUENCES | _SIZES | {"tiles": "i32"}
            )
            types = {"y": p, "stats": "*fp32"} | shared | _strides("q", "k", "v") | _BIAS
            yield "attention_forward", types, *form((head, *FORWARD[f, head, bias is not None]))
            types = {"dq": p, "delta": "*fp32", "dy": p, "y": p, "stats": "*fp32"} | shared | _strides("dq", "q", "k", "v") | _BIAS
            yield "attention_backward_q", types, *form((head, *BACKWARD["q", f, head, bias is not None]))
            types = {"dk": p, "dv": p, "delta": "*fp32", "dy": p, "stats": "*fp32"} | shared
            types |= _strides("dk", "dv", "q", "k", "v") | _BIAS
            yield "attention_backward_kv", types, *form((head, *BACKWARD["kv", f, head, bias is not None]))
        if head == HEADS[0]:
            types = {"dbias": "*fp32", "delta": "*fp32", "dy": p, "stats": "*fp32"} | qkv | {"bias": "*fp32"} | _SEQUENCES
            types |= {"B": "i32"} | _SIZES | dict.fromkeys(("batches", "heads", "row_tiles", "key_tiles"), "i32")
            types |= _strides("q", "k", "v") | _BIAS
            yield "attention_backward_bias", types, *form((head, *BACKWARD["bias", f, head, True]))
        for cache in ("fp32", "bf16", "i8") if f == "fp32" else ("bf16", "i8"):
            types = {"partial": "*fp32", "sums": "*fp32", "q": p, "k": f"*{cache}", "v": f"*{cache}", "bias": "*fp32"}
            types |= _SEQUENCES | _PAGES | {"biased": "i32"} | _SIZES | {"splits": "i32", "chunk": "i32"} | _strides("q")
            stride = "i32" if cache == "i8" else "i32:16"
            types |= {f"{n}_{axis}": stride for n in "kv" for axis in ("batch", "time", "head")} | _BIAS
            del types["unit"]
            yield "attention_decode", types, *form((head, *DECODE[f == "bf16" and cache != "fp32", head]))
        types = {"y": p, "partial": "*fp32", "sums": "*fp32", "splits": "i32", "E": "i32:16"}
        if head == HEADS[0]:
            yield "attention_combine", types, {"SPLITS": SPLITS, "BLOCK": 64}, {"num_warps": 4, "num_stages": 3}
    for out, x in COPIES:
        types = {"out": f"*{out}", "x": f"*{x}"} | _SEQUENCES | _PAGES
        types |= dict.fromkeys(("T", "heads", "rows", "width", "out_width"), "i32")
        types |= {f"{n}_{axis}": "i32" for n in ("x", "out") for axis in ("batch", "time", "head")}
        yield "attention_copy", types, {"ROWS": 32, "BLOCK": 64}, {"num_warps": 4, "num_stages": 3}
