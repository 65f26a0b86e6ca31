"""A mixture of experts around its products on the GPU, the host's side: the functions of csrc/bind/moe.cpp. The products: matmul_gpu.py."""

from __future__ import annotations

from typing import Any

BLOCK = 1024


def moe_route(gpu: Any, probabilities: Any, experts: Any, weights: Any, logits: Any, renormalise: bool) -> None:
    named = {"probabilities": probabilities, "experts": experts, "weights": weights, "logits": logits}
    named |= {"E": logits.shape[1], "k": experts.shape[1], "renormalise": int(renormalise)}
    gpu.triton("moe_route", (logits.shape[0],), named, plain=("E", "k", "renormalise"), **_block(logits.shape[1]))


def moe_route_backward(
    gpu: Any, dlogits: Any, dweights: Any, dprobabilities: Any, probabilities: Any, experts: Any, weights: Any, renormalise: bool
) -> None:
    """dlogits (R, E) = that of the weights (R, k) and of the probabilities (R, E); either may be None."""
    dweights = gpu.zeros(weights.shape) if dweights is None else dweights
    dprobabilities = gpu.zeros(probabilities.shape) if dprobabilities is None else dprobabilities
    named = {"dlogits": dlogits, "dweights": dweights, "dprobabilities": dprobabilities, "probabilities": probabilities}
    named |= {"experts": experts, "weights": weights, "E": dlogits.shape[1], "k": experts.shape[1], "renormalise": int(renormalise)}
    gpu.triton("moe_route_backward", (dlogits.shape[0],), named, plain=("E", "k", "renormalise"), **_block(dlogits.shape[1]))


def moe_places(gpu: Any, slots: Any, rows: Any, counts: Any, experts: Any, groups: int, capacity: int) -> None:
    (R, k), E = experts.shape, counts.size
    named = {"slots": slots, "counts": counts, "experts": experts, "R": R, "k": k, "groups": groups, "capacity": capacity}
    gpu.triton("moe_kept", (E,), named, plain=("R", "k", "groups", "capacity"), BLOCK=BLOCK)
    named = {"slots": slots, "rows": rows, "counts": counts, "experts": experts, "n": R * k, "k": k, "E": E}
    gpu.triton("moe_places", (E + 1,), named, plain=("n", "k", "E"), BLOCK=BLOCK)


def moe_gather(gpu: Any, y: Any, x: Any, rows: Any) -> None:
    P, C = y.shape
    named = {"y": y, "x": x, "rows": rows, "C": C, "R": x.shape[0]}
    gpu.triton("moe_gather", (P, -(-C // BLOCK)), named, plain=("R",), BLOCK=BLOCK)


def moe_combine(gpu: Any, out: Any, y: Any, slots: Any, weights: Any, residual: Any) -> None:
    (R, k), (P, C) = slots.shape, y.shape
    named = {"out": out, "y": y, "slots": slots, "weights": weights, "residual": residual, "C": C, "k": k, "P": P}
    gpu.triton("moe_combine", (R, -(-C // BLOCK)), named, plain=("C", "k", "P"), BLOCK=BLOCK)


def moe_combine_backward(gpu: Any, dy: Any, dweights: Any, dout: Any, y: Any, slots: Any, weights: Any) -> None:
    P, C = y.shape
    named = {"dy": dy, "dweights": dweights, "dout": dout, "y": y, "slots": slots, "weights": weights}
    named |= {"C": C, "k": slots.shape[1], "P": P}
    gpu.triton("moe_combine_backward", (slots.size,), named, plain=("C", "k", "P"), BLOCK=BLOCK)


def moe_load(gpu: Any, load: Any, experts: Any, first: int, scale: float, add: bool) -> None:
    """load (groups, E) = or += scale times how often an expert is among the first choices of experts (R, k), in each group of rows."""
    (groups, E), (R, k) = load.shape, experts.shape
    named = {"load": load, "experts": experts, "rows": R // groups, "k": k, "first": first, "E": E, "scale": scale, "add": int(add)}
    gpu.triton("moe_load", (groups * E,), named, plain=("rows", "k", "first", "E", "add"), BLOCK=BLOCK)


def moe_balance(gpu: Any, probabilities: Any, load: Any) -> Any:
    """(layers, pieces): the sums of p * load over pieces of BLOCK of the layers' probabilities, a list of (R, E)."""
    pieces = -(-probabilities[0].size // BLOCK)
    partial = gpu.empty((len(probabilities), pieces))
    for layer, p in enumerate(probabilities):
        named = {"partial": partial, "probabilities": p, "load": load, "first": layer * pieces} | _pieces(p, load)
        gpu.triton("moe_balance", (pieces,), named, plain=("first", "n", "E", "rows"), BLOCK=BLOCK)
    return partial


def moe_balance_backward(gpu: Any, dprobabilities: Any, dy: Any, load: Any) -> None:
    named = {"dprobabilities": dprobabilities, "dy": dy, "load": load} | _pieces(dprobabilities, load)
    gpu.triton("moe_balance_backward", (-(-dprobabilities.size // BLOCK),), named, plain=("n", "E", "rows"), BLOCK=BLOCK)


def moe_z(gpu: Any, logs: Any, squares: Any, logits: Any, scale: float) -> None:
    """logs (layers, R) = log(sum(exp(logits))), logits a list of (R, E); squares = scale times the square."""
    for layer, z in enumerate(logits):
        R, E = z.shape
        named = {"logs": logs, "squares": squares, "logits": z, "first": layer * R, "E": E, "scale": scale}
        gpu.triton("moe_z", (R,), named, plain=("first", "E"), **_block(E))


def moe_z_backward(gpu: Any, dlogits: Any, dy: Any, logs: Any, probabilities: Any, layer: int, scale: float) -> None:
    """dlogits (R, E) of a layer, from logs (layers, R) and its probabilities."""
    R, E = dlogits.shape
    named = {"dlogits": dlogits, "dy": dy, "logs": logs, "probabilities": probabilities, "first": layer * R}
    named |= {"n": R * E, "E": E, "scale": scale}
    gpu.triton("moe_z_backward", (-(-R * E // BLOCK),), named, plain=("first", "n", "E"), BLOCK=BLOCK)


def _pieces(x: Any, load: Any) -> dict[str, int]:
    return {"n": x.size, "E": x.shape[1], "rows": x.shape[0] // load.shape[0]}


def _block(E: int) -> dict[str, int]:
    if E > 1024:
        raise ValueError(f"[route] at most 1024 experts are routed on the GPU, got {E}.")
    return {"BLOCK": 64, "warps": 1} if E <= 64 else {"BLOCK": 1024, "warps": 8}
