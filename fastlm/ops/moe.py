"""Mixture of experts: a router, rows dealt to experts, grouped products, their weighted sum, and the auxiliary losses.

Shazeer et al. 2017, arXiv:1701.06538; GShard, Lepikhin et al. 2020, arXiv:2006.16668; Switch, Fedus et al. 2021, arXiv:2101.03961.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels, on_device
from fastlm.checkpoint.quantized import FORMATS, QuantizedArray, expand
from fastlm.ops import check
from fastlm.ops.linear import ACTIVATIONS, packed
from fastlm.ops.matmul import STORAGE
from fastlm.tensor import data, leaf, needs_grad, record, record_many, recording, wrap


@dataclass(frozen=True)
class Routing:
    """Where each row goes. R rows, E experts, k choices a row, P places: rows times choices, less what is dropped."""

    logits: Any  # (R, E) float32, array or Tensor
    probabilities: Any  # (R, E), their softmax
    weights: Any  # (R, k): what each choice counts
    experts: Array  # (R, k) int32: the choices, best first, before anything is dropped
    slots: Array  # (R, k) int32: the place of each choice, -1 where it is dropped
    rows: (
        Array  # (P,) int32: the row at each place; by expert, then in the order of rows. Recorded, on a device: (R k,), 0 behind P
    )
    counts: Array  # (E,) int64: places of each expert

    @property
    def dropped(self) -> int:
        """Choices that found their expert full."""
        return int(self.experts.size - backend.host(self.counts).sum())


def route(logits: Any, k: int, *, renormalise: bool = False, capacity: int | None = None, groups: int = 1) -> Routing:
    """The k most probable experts of each row; of equal ones, the lower index.

    logits: (R, E) float32. The weight of a choice is its probability (Switch); with `renormalise`, divided by the sum of the row's
    chosen ones (Mixtral, GShard). capacity: the most that an expert takes of each of `groups` equal runs of rows; first choices come
    before second ones, and each in the order of rows (GShard, algorithm 1); the others are dropped and their weights have no
    gradient. Raises TypeError for a dtype, ValueError for a shape or a number.
    """
    ld = check.array("route", "logits", data(logits), ndim=2)
    R, E = ld.shape
    if not (isinstance(k, int) and 1 <= k <= E):
        raise ValueError(f"[route] k must be an integer from 1 to the number of experts, {E}, got {k!r}. logits is {ld.shape}.")
    if capacity is not None and not (isinstance(capacity, int) and capacity >= 1):
        raise ValueError(f"[route] capacity must be None or an integer of at least 1, got {capacity!r}.")
    if not (isinstance(groups, int) and groups >= 1) or R % groups:
        raise ValueError(f"[route] groups must divide the number of rows, {R}, got {groups!r}.")
    probabilities, weights = backend.empty((R, E), like=ld), backend.empty((R, k), like=ld)
    experts, slots, rows = (backend.empty(shape, np.int32, like=ld) for shape in ((R, k), (R, k), (R * k,)))
    counts = backend.empty((E,), np.int64, like=ld)
    kernels(ld).moe_route(probabilities, experts, weights, ld, renormalise)
    kernels(ld).moe_places(slots, rows, counts, experts, groups, capacity or 0)
    if capacity is not None and not backend.recording() and not on_device(ld):
        rows = rows[: int(counts.sum())]
    if not recording(logits):
        return Routing(logits, wrap(probabilities, logits), wrap(weights, logits), experts, slots, rows, counts)

    def backward(dweights: Array | None, dprobabilities: Array | None) -> Sequence[Array | None]:
        if on_device(ld):
            d = backend.empty_like(ld)
            kernels(ld).moe_route_backward(d, dweights, dprobabilities, probabilities, experts, weights, renormalise)
            return (d,)
        dp = np.zeros_like(probabilities) if dprobabilities is None else dprobabilities.copy()
        if dweights is not None:
            if renormalise:
                total = _row_sums(np.take_along_axis(probabilities, experts, axis=1))
                dweights = (dweights - _row_sums(dweights * weights)) / total
            at = np.arange(R)[:, None], experts
            dp[at] += dweights  # the experts of a row differ
        return (probabilities * (dp - np.sum(dp * probabilities, axis=1, keepdims=True)),)

    w, p = record_many((weights, probabilities), (logits,), backward)
    return Routing(logits, p, w, experts, slots, rows, counts)


def _row_sums(x: Array) -> Array:
    """(R, k) -> (R, 1), in the order of k."""
    total = x[:, :1].copy()
    for j in range(1, x.shape[1]):
        total += x[:, j : j + 1]
    return total


def dispatch(x: Any, routing: Routing) -> Any:
    """x (R, C) float32 -> (P, C): every row as often as it is kept, by expert. The gradient of a row sums its places in the order of
    choices. Raises TypeError for a dtype, ValueError for a shape."""
    xd = check.array("dispatch", "x", data(x), ndim=2)
    R, C = len(routing.slots), xd.shape[1]
    check.shape("dispatch", "x", xd, "(R, C)", (R, C), f"The routing has {R} rows.")
    y = backend.empty_like(xd, (len(routing.rows), C))
    kernels(xd).moe_gather(y, xd, routing.rows)
    if not recording(x):
        return wrap(y, x)

    def backward(dy: Array) -> Sequence[Array | None]:
        dx = backend.empty_like(xd)
        kernels(xd).moe_combine(dx, contiguous(dy), routing.slots, None, None)
        return (dx,)

    return record(y, (x,), backward)


def combine(y: Any, routing: Routing, residual: Any = None) -> Any:
    """y (P, C) float32 -> (R, C): the sum of each row's places times their weights, in the order of choices, + residual (R, C).

    A row whose choices are all dropped is zero. Raises TypeError for a dtype, ValueError for a shape.
    """
    yd = check.array("combine", "y", data(y), ndim=2)
    R, P, C = len(routing.slots), len(routing.rows), yd.shape[1]
    check.shape("combine", "y", yd, "(P, C)", (P, C), f"The routing has {P} places.")
    rd = None if residual is None else check.array("combine", "residual", data(residual), ndim=2)
    if rd is not None:
        check.shape("combine", "residual", rd, "(R, C)", (R, C), f"The routing has {R} rows.")
    weights = data(routing.weights)
    out = backend.empty_like(yd, (R, C))
    kernels(yd).moe_combine(out, yd, routing.slots, weights, rd)
    if not recording(y, routing.weights, residual):
        return wrap(out, y, routing.weights, residual)

    def backward(dout: Array) -> Sequence[Array | None]:
        dy, dweights = backend.empty_like(yd), backend.empty_like(weights)
        kernels(yd).moe_combine_backward(dy, dweights, contiguous(dout), yd, routing.slots, weights)
        return dy, dweights, dout if needs_grad(residual) else None

    return record(out, (y, routing.weights, residual), backward)


def grouped_linear(x: Any, weights: Any, counts: Any, activation: str | None = None) -> Any:
    """act(x_e W_e^T) for every expert e on its own run of rows. A row has the bits that `linear` gives it.

    x: (P, K) float32, counts[0] rows of expert 0, then those of expert 1, ... weights: (E, N, K) float32, or a list of E matrices
    (N, K) in float32, bfloat16, float16 or QuantizedArray; all but float32 are frozen. Returns (P, N) float32: a Tensor where an
    input is one. Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("grouped_linear", "x", data(x), ndim=2)
    P, K = xd.shape
    if on_device(xd):
        return _grouped_there(x, xd, weights, counts, activation)
    counts = np.asarray(counts)
    each = _experts(weights, len(counts), K)
    live = backend.recording()  # then nobody knows the counts: the kernel reads them in each run
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (not live and ((counts < 0).any() or int(counts.sum()) != P)):
        raise ValueError(f"[grouped_linear] counts must be integers that add up to the rows of x, {P}, got {counts!r:.80}.")
    N = int(each[0].shape[0])
    kind = check.choice("grouped_linear", "activation", activation, ACTIVATIONS)  # type: ignore[arg-type]
    stacked = not isinstance(weights, (list, tuple))
    parents = (x, weights) if stacked else (x, *weights)
    recorded = recording(*parents)
    y = backend.empty((P, N))
    z = backend.empty((P, N)) if recorded and kind else None
    used = range(len(each)) if live else np.flatnonzero(counts).tolist()
    multiplied = [_multiplied(each[e]) for e in used]
    taken = np.ascontiguousarray(counts if live else counts[used], np.int64)
    _C.grouped_linear(y, z, xd, taken, *([m[i] for m in multiplied] for i in range(3)), kind)
    if not recorded:
        return wrap(y, *parents)
    ends = np.cumsum(counts).tolist()
    spans = [slice(end - n, end) for end, n in zip(ends, counts.tolist(), strict=True)]

    def backward(dy: Array) -> Sequence[Array | None]:
        dy = np.ascontiguousarray(dy)
        dz = backend.empty(dy.shape) if kind else dy
        if kind:
            _C.linear_backward(dz, None, None, dy, z, kind)
        dx = backend.empty(xd.shape) if needs_grad(x) else None
        if dx is not None:
            plain = [each[e].dequantize() if isinstance(each[e], QuantizedArray) else each[e] for e in used]
            _products([dx[spans[e]] for e in used], [dz[spans[e]] for e in used], plain)
        into, adds, returned = _targets(weights)
        for e in np.flatnonzero(counts == 0).tolist():
            if not adds[e]:
                into[e][...] = 0
        for add in (False, True):
            for trained in _apart([e for e in used if into[e] is not None and adds[e] == add], into):
                _products(
                    [into[e] for e in trained], [dz[spans[e]] for e in trained], [xd[spans[e]] for e in trained],
                    a_transposed=True, accumulate=add,
                )  # fmt: skip
        return dx, *returned

    return record(y, parents, backward)


def _grouped_there(x: Any, xd: Array, weights: Any, counts: Any, activation: str | None) -> Any:
    """`grouped_linear` on a device. counts (E,) int64 there are read when it runs: rows of x behind the last run mean nothing."""
    op = "grouped_linear"
    if not on_device(counts) or counts.dtype != np.int64 or counts.ndim != 1:
        raise TypeError(f"[{op}] counts must be (E,) int64 on the device that x is on, got {counts!r:.80}.")
    stacked = not isinstance(weights, (list, tuple))
    whole = data(weights) if stacked else None
    each = [data(w) for w in weights] if whole is None else [whole[e] for e in range(whole.shape[0])]
    for e, w in enumerate(each):
        blocks = w.blocks if isinstance(w, QuantizedArray) else w
        if not on_device(blocks) or w.ndim != 2 or tuple(w.shape) != (each[0].shape[0], xd.shape[1]):
            raise TypeError(f"[{op}] weights[{e}] must be (N, K) on the device with K = {xd.shape[1]}, all alike, got {w!r:.80}.")
    if len(each) != counts.size or not each:
        raise ValueError(f"[{op}] weights must be as many matrices as counts, {counts.size}, at least 1, got {len(each)}.")
    kind = check.choice(op, "activation", activation, ACTIVATIONS)  # type: ignore[arg-type]
    parents = (x, weights) if stacked else (x, *weights)
    recorded = recording(*parents)
    shape = xd.shape[0], int(each[0].shape[0])
    y = backend.empty_like(xd, shape)
    z = backend.empty_like(xd, shape) if recorded and kind else None
    if isinstance(each[0], QuantizedArray):
        _quantized_there(y, z, xd, counts, each, kind)
    else:
        none = [0] * len(each)
        kernels(xd).grouped_linear(y, z, xd, counts, each, none, none, kind)
    if not recorded:
        return wrap(y, *parents)

    def backward(dy: Array) -> Sequence[Array | None]:
        dy = contiguous(dy)
        dz = dy
        if kind:
            dz = backend.empty_like(dy)
            kernels(xd).linear_backward(dz, None, None, dy, z, kind)
        dx = None
        if needs_grad(x):
            dx = backend.empty_like(xd)
            kernels(xd).grouped_linear_dx(dx, dz, counts, [_plain_there(w, dz) for w in each])
        into, adds, returned = _targets(weights)
        for array, add in zip(into, adds, strict=True):
            if not add:
                array.device.fill(array.pointer, 0, array.nbytes)
        if all(b is not None for b in into):
            again = [e for part in _apart(list(range(len(into))), into)[1:] for e in part]
            own = {e: backend.zeros(into[e].shape, into[e].dtype, like=into[e]) for e in again}
            kernels(xd).grouped_linear_dweights([own.get(e, array) for e, array in enumerate(into)], dz, xd, counts)
            for e, array in own.items():
                kernels(xd).scale_add(into[e], array, 1.0, True)
        return dx, *returned

    return record(y, parents, backward)


def _quantized_there(y: Array, z: Array | None, x: Array, counts: Array, weights: list[Any], kind: int) -> None:
    first = weights[0]
    for e, w in enumerate(weights):
        if not isinstance(w, QuantizedArray) or (w.kind, w.activations) != (first.kind, first.activations) or w.kind not in FORMATS:
            raise NotImplementedError(
                f"[grouped_linear] weights[{e}] must be {first.kind} on a device, as weights[0] is, got {w.dtype}."
            )
    if first.activations == "int8":
        rounded = backend.empty_like(x)
        kernels(x).int8_round(rounded, x)
        x = rounded
    kernels(x).grouped_quantized(y, z, x, counts, [w.blocks for w in weights], FORMATS[first.kind][0], kind)


def _plain_there(w: Any, like: Array) -> Array:
    """A weight as float32 or bfloat16."""
    plain: Array = w
    if isinstance(w, QuantizedArray):
        plain = backend.empty_like(like, w.shape)
        expand(plain, w)
    return plain


def _targets(weights: Any) -> tuple[list[Any], list[bool], list[Array | None]]:
    """Where each matrix's gradient goes, None for a frozen one; whether it is added to what is there; what is returned for each input.
    weights: one array (E, N, K) or a list of matrices."""
    into: list[Any] = []
    adds: list[bool] = []
    returned: list[Array | None] = []
    stacked = not isinstance(weights, (list, tuple))
    for w in [weights] if stacked else weights:
        array, add, target = None, True, None
        if needs_grad(w) and not isinstance(w.data, QuantizedArray) and (w.dtype == np.float32 or on_device(w.data)):
            target = leaf(w)
            array, add = target.grad_target() if target is not None else (backend.empty(w.shape, like=w.data), False)
        E = w.shape[0] if stacked else 1
        into += [None] * E if array is None else [array[e] for e in range(E)] if stacked else [array]
        adds += [add] * E
        returned.append(None if target is not None else array)
    return into, adds, returned


def _apart(experts: list[int], into: Sequence[Any]) -> list[list[int]]:
    """The experts cut into lists of which no two have one gradient: threads would add to it at once."""
    lists: list[list[int]] = []
    taken: dict[int, int] = {}
    for e in experts:
        turn = taken[id(into[e])] = taken.get(id(into[e]), -1) + 1
        if turn == len(lists):
            lists.append([])
        lists[turn].append(e)
    return lists


def _multiplied(w: Any) -> tuple[Array, int, int]:
    """What the kernel reads of a weight, how it multiplies, and the type."""
    if isinstance(w, QuantizedArray):
        return packed(w), 2 if w.activations == "int8" else 1, FORMATS[w.kind][0]
    return w, 0, STORAGE[w.dtype]


def _products(
    c: Sequence[Any],
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    a_transposed: bool = False,
    accumulate: bool = False,
) -> None:
    """c[i] = or += a[i] b[i] on contiguous arrays, in one call."""
    if c:
        _C.grouped_matmul(c, a, b, a_transposed, [STORAGE[w.dtype] for w in b], accumulate)


def _experts(weights: Any, E: int, K: int) -> list[Any]:
    if not isinstance(weights, (list, tuple)):
        w = check.array("grouped_linear", "weights", data(weights), ndim=3)
        check.shape("grouped_linear", "weights", w, "(E, N, K)", (E, w.shape[1], K), f"counts has {E} experts.")
        each = list(w)
    else:
        each = [data(w) for w in weights]
        for e, w in enumerate(each):
            if isinstance(w, QuantizedArray):
                if w.kind not in FORMATS:
                    raise ValueError(f"[grouped_linear] weights[{e}] must be float or of ggml's kinds, got {w.kind}.")
                if w.activations == "int16":
                    raise ValueError(f"[grouped_linear] weights[{e}] must have float32 or int8 activations, got int16.")
                continue
            if not isinstance(w, np.ndarray) or w.dtype not in STORAGE:
                got = w.dtype if isinstance(w, np.ndarray) else type(w).__name__
                raise TypeError(f"[grouped_linear] weights[{e}] must be float32, bfloat16, float16 or a QuantizedArray, got {got}.")
            each[e] = np.ascontiguousarray(w)
    if len(each) != E or E == 0:
        raise ValueError(f"[grouped_linear] weights must be as many matrices as counts, {E}, at least 1, got {len(each)}.")
    for e, w in enumerate(each):
        if len(w.shape) != 2 or w.shape != (each[0].shape[0], K):
            raise ValueError(f"[grouped_linear] weights[{e}] must be (N, K) with K = {K}, all alike, got {tuple(w.shape)}.")
    return each


def mixtral_load_balancing_loss(routings: Sequence[Routing]) -> Any:
    """E * sum over experts of f * p, over all layers together: f, choices of the expert a row; p, its mean probability.

    What Hugging Face adds to Mixtral's loss. Its minimum, an even load, is k. A scalar; the gradient goes through p alone.
    """
    E, rows = _sizes("mixtral_load_balancing_loss", routings)
    if on_device(data(routings[0].probabilities)):
        return _balance_there(routings, 1, routings[0].experts.shape[1])
    f = np.sum([np.bincount(r.experts.reshape(-1), minlength=E) for r in routings], axis=0) / rows
    return _weighted_mean(routings, [np.broadcast_to(f * E / rows, data(r.probabilities).shape) for r in routings])


def switch_load_balancing_loss(routings: Sequence[Routing], groups: int = 1) -> Any:
    """E^2 * mean over groups and experts of f * p, the layers' rows together in each group; f counts first choices only.

    Switch, equations 4 to 6, as Hugging Face computes it with sequences for groups. Its minimum, an even load, is 1.
    """
    E, rows = _sizes("switch_load_balancing_loss", routings)
    if groups < 1 or len(routings[0].experts) % groups:
        raise ValueError(f"[switch_load_balancing_loss] groups must divide a layer's rows, {rows // len(routings)}, got {groups}.")
    if on_device(data(routings[0].probabilities)):
        return _balance_there(routings, groups, 1)
    first = [r.experts[:, 0].reshape(groups, -1) for r in routings]
    each = rows // groups
    f = np.sum([np.stack([np.bincount(g, minlength=E) for g in layer]) for layer in first], axis=0) / each  # (groups, E)
    factors = []
    for r in routings:
        n = len(r.experts) // groups
        factors.append(np.repeat(f * (E / (groups * each)), n, axis=0))
    return _weighted_mean(routings, factors)


def router_z_loss(routings: Sequence[Routing]) -> Any:
    """Mean over all rows and layers of log(sum(exp(logits)))^2. ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5. A scalar."""
    _, rows = _sizes("router_z_loss", routings)
    logits = [r.logits for r in routings]
    if on_device(data(logits[0])):
        return _z_there(logits, [data(r.probabilities) for r in routings], rows)
    logs = []
    for r in routings:
        z = data(r.logits).astype(np.float64)
        top = z.max(axis=1, keepdims=True)
        logs.append(top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))
    value = np.array(sum(float(np.square(log).sum()) for log in logs) / rows, np.float32)
    if not recording(*logits):
        return wrap(value, *logits)

    def backward(dy: Array) -> Sequence[Array | None]:
        return [
            (float(dy) * 2 / rows * log * data(r.probabilities)).astype(np.float32) for log, r in zip(logs, routings, strict=True)
        ]

    return record(value, logits, backward)


def _sizes(op: str, routings: Sequence[Routing]) -> tuple[int, int]:
    """Experts, and the rows of all layers together."""
    if not routings or len({data(r.logits).shape for r in routings}) != 1:
        shapes = [data(r.logits).shape for r in routings]
        raise ValueError(f"[{op}] routings must be those of at least one layer, all of one shape, got {shapes}.")
    R, E = data(routings[0].logits).shape
    if R == 0:
        raise ValueError(f"[{op}] routings must have rows, got {(R, E)}.")
    return E, R * len(routings)


def _weighted_mean(routings: Sequence[Routing], factors: Sequence[Array]) -> Any:
    """The sum of probabilities * factors, float64 inside."""
    inputs = [r.probabilities for r in routings]
    value = np.array(sum(float((data(p) * f).sum()) for p, f in zip(inputs, factors, strict=True)), np.float32)
    if not recording(*inputs):
        return wrap(value, *inputs)
    return record(value, inputs, lambda dy: [(float(dy) * f).astype(np.float32) for f in factors])


def _balance_there(routings: Sequence[Routing], groups: int, first: int) -> Any:
    """Both balancing losses on a device, in float32: E groups / rows^2 times the sum over layers, groups and experts of how often the
    group's rows have the expert among their `first` choices, times the group's probabilities of it."""
    inputs = [r.probabilities for r in routings]
    parts = [data(p) for p in inputs]
    (R, E), like = parts[0].shape, parts[0]
    rows = R * len(parts)
    load = backend.empty((groups, E), like=like)
    for layer, r in enumerate(routings):
        kernels(like).moe_load(load, r.experts, first, E * groups / rows**2, layer > 0)
    value = backend.sum_to(kernels(like).moe_balance(parts, load), ())
    if not recording(*inputs):
        return wrap(value, *inputs)

    def backward(dy: Array) -> Sequence[Array | None]:
        found: list[Array | None] = [backend.empty_like(p) if needs_grad(t) else None for p, t in zip(parts, inputs, strict=True)]
        for d in found:
            if d is not None:
                kernels(like).moe_balance_backward(d, dy, load)
        return found

    return record(value, inputs, backward)


def _z_there(logits: Sequence[Any], probabilities: Sequence[Array], rows: int) -> Any:
    """`router_z_loss` on a device, in float32."""
    parts = [data(z) for z in logits]
    like = probabilities[0]
    logs, squares = (backend.empty((len(parts), parts[0].shape[0]), like=like) for _ in range(2))
    kernels(like).moe_z(logs, squares, parts, 1 / rows)
    value = backend.sum_to(squares, ())
    if not recording(*logits):
        return wrap(value, *logits)

    def backward(dy: Array) -> Sequence[Array | None]:
        found = [backend.empty_like(z) for z in parts]
        for layer, d in enumerate(found):
            kernels(like).moe_z_backward(d, dy, logs, probabilities[layer], layer, 1 / rows)
        return found

    return record(value, logits, backward)
