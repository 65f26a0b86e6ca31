"""Losses against a teacher on the GPU, the host's side. Each gives the loss, (), and writes dx for dy = 1 where it is given."""

from __future__ import annotations

from typing import Any


def kl_divergence(gpu: Any, dx: Any, x: Any, target: Any, temperature: float) -> Any:
    V = x.shape[-1]
    R = x.size // V
    loss = gpu.empty((R,))
    arguments = {"loss": loss, "dx": x if dx is None else dx, "x": x, "target": target, "V": V, "inverse": 1.0 / temperature}
    arguments |= {"factor": temperature / R, "wanted": int(dx is not None)}
    gpu.triton("kl_divergence", (R,), arguments, plain=("V", "wanted"), warps=8, BLOCK=4096)
    return _total(gpu, loss, temperature * temperature / R)


def cosine_distance(gpu: Any, dx: Any, x: Any, target: Any) -> Any:
    C = x.shape[-1]
    R = x.size // C
    loss = gpu.empty((R,))
    arguments = {"loss": loss, "dx": x if dx is None else dx, "x": x, "target": target, "C": C, "factor": 1.0 / R}
    gpu.triton("cosine_distance", (R,), arguments | {"wanted": int(dx is not None)}, plain=("C", "wanted"), BLOCK=1024)
    return _total(gpu, loss, 1.0 / R)


def _total(gpu: Any, loss: Any, scale: float) -> Any:
    total = gpu.empty(())
    arguments = {"total": total, "loss": loss, "R": loss.size, "scale": scale}
    gpu.triton("distillation_total", (1,), arguments, plain=("R",), BLOCK=1024)
    return total
