"""AdamW and the global gradient norm: what a training step does after the backward pass, in place and without the tape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import BFLOAT16, kernels, on_device
from fastlm.ops import check
from fastlm.tensor import data


def adamw(
    parameter: Any,
    gradient: Any,
    m: Any,
    v: Any,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    scale: float = 1.0,
) -> None:
    """One step of AdamW in place on `parameter`, `m` and `v`: `adamw_step` for a single tensor."""
    adamw_step(
        [parameter],
        [gradient],
        [m],
        [v],
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
    )


def adamw_step(
    parameters: Sequence[Any],
    gradients: Sequence[Any],
    ms: Sequence[Any],
    vs: Sequence[Any],
    *,
    step: Any,
    lr: Any,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    scale: Any = 1.0,
    copies: Sequence[Any] | None = None,
) -> None:
    """One step of AdamW over many tensors, in place, in one pass and one call.

    Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in the formulation of torch.optim.AdamW:

        g = scale * gradient;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
        parameter = (1 - lr weight_decay) parameter - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    parameters, gradients, ms, vs: equally long sequences of float32 arrays or Tensors, C-contiguous, of equal shape position by
    position; ms and vs start as zeros. step: 1 for the first. weight_decay: one for all or one per tensor. scale: multiplies the
    gradients (clipping, accumulation). Bias corrections are computed in float64. Raises TypeError for a dtype, ValueError for a
    shape or a number.

    On a device, step, lr and scale may be (1,) there, int32, float32, float32: read when the step runs, so that a recorded one can be
    given others; a scale there that is not finite changes nothing. copies: bfloat16 arrays there, each gets its new parameter.
    """
    op = "adamw"
    lists = [[data(x) for x in group] for group in (parameters, gradients, ms, vs)]
    there = lists[0][0] if lists[0] and on_device(lists[0][0]) else None
    if there is not None or not _C.adamw_ready(*lists):
        _refuse(op, lists)
    if isinstance(weight_decay, Sequence):
        if len(weight_decay) != len(parameters):
            raise ValueError(
                f"[{op}] weight_decay must be a number or one per parameter = {len(parameters)}, got {len(weight_decay)}."
            )
        decays = [check.number(op, "weight_decay", w, low=0.0) for w in weight_decay]
    else:
        decays = [check.number(op, "weight_decay", weight_decay, low=0.0)] * len(parameters)
    if not _is_there(op, "step", step, there, np.int32):
        step = check.integer(op, "step", step, what="an integer, 1 for the first step")
        if not 1 <= step < 1 << 63:
            raise ValueError(f"[{op}] step must be 1 for the first step and count upwards, below 2**63, got {step}.")
    lr = lr if _is_there(op, "lr", lr, there, np.float32) else check.number(op, "lr", lr, low=0.0)
    beta1, beta2 = _beta(op, "beta1", beta1), _beta(op, "beta2", beta2)
    eps = check.number(op, "eps", eps, low=0.0)
    scale = scale if _is_there(op, "scale", scale, there, np.float32) else check.number(op, "scale", scale)
    if there is not None:
        narrow = None if copies is None else _copies(op, copies, lists[0])
        kernels(there).adamw_step(*lists, decays, step, lr, beta1, beta2, eps, scale, narrow)
        return
    if copies is not None:
        raise ValueError(f"[{op}] copies are written on a device only.")
    _C.adamw_step(*lists, decays, step, lr, beta1, beta2, eps, scale)


def global_norm(gradients: Sequence[Any]) -> Any:
    """The L2 norm over all elements of a list of float32 arrays or Tensors, accumulated in float64. nan and inf propagate.

    The bits depend neither on the number of threads nor on the instruction set. A float; of arrays on a device, () float32 there.
    """
    arrays = [check.array("global_norm", f"gradients[{i}]", data(g)) for i, g in enumerate(gradients)]
    if arrays and on_device(arrays[0]):
        for i, a in enumerate(arrays):
            _float32_there("global_norm", f"gradients[{i}]", a)
        norm = backend.empty((), like=arrays[0])
        kernels(arrays[0]).global_norm(norm, arrays)
        return norm
    return math.sqrt(_C.square_sum(arrays))


def clip_scale(norm: Any, clip: float) -> Any:
    """What `scale` of `adamw_step` makes of a global norm at most about `clip`: min(1, clip / (norm + 1e-6)), nan where the norm is not
    finite. norm: a number, or what `global_norm` gives on a device: then (1,) float32 there. Raises ValueError for a number."""
    clip = check.number("clip_scale", "clip", clip, above=0.0)
    if not on_device(norm):
        return min(1.0, clip / (norm + 1e-6)) if math.isfinite(norm) else math.nan
    scale = backend.empty((1,), like=norm)
    kernels(norm).clip_scale(scale, norm, clip)
    return scale


def _is_there(op: str, name: str, x: Any, like: Any, dtype: Any) -> bool:
    """Whether x lies on the device, as one element of dtype."""
    if not on_device(x):
        return False
    if like is None or x.dtype != dtype or x.size != 1:
        where = "" if like is not None else ", where the parameters are on a device"
        raise TypeError(f"[{op}] {name} must be a number or one element of {np.dtype(dtype)}{where}, got {x!r}.")
    return True


def _float32_there(op: str, name: str, x: Any) -> None:
    if not on_device(x) or x.dtype != np.float32:
        raise TypeError(f"[{op}] {name} must be float32 on the device that the others are on, got {x!r:.80}.")


def _copies(op: str, copies: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    """The arrays that get the new parameters in bfloat16."""
    arrays = [data(c) for c in copies]
    if len(arrays) != len(parameters):
        raise ValueError(f"[{op}] copies must be one per parameter = {len(parameters)}, got {len(arrays)}.")
    for i, (c, p) in enumerate(zip(arrays, parameters, strict=True)):
        if not on_device(c) or c.dtype != BFLOAT16 or not c.contiguous or c.shape != p.shape:
            raise TypeError(
                f"[{op}] copies[{i}] must be contiguous bfloat16 on the device, of the parameter's shape, got {c!r:.80}."
            )
    return arrays


def _beta(op: str, name: str, x: float) -> float:
    value = check.number(op, name, x, low=0.0)
    if value >= 1:
        raise ValueError(f"[{op}] {name} must be from 0 to below 1, got {value}.")
    return value


def _refuse(op: str, lists: list[list[Any]]) -> None:
    """Raises what is wrong with the arrays."""
    lengths = [len(group) for group in lists]
    if len(set(lengths)) > 1:
        raise ValueError(f"[{op}] parameters, gradients, ms and vs must be equally long, got {', '.join(str(n) for n in lengths)}.")
    for i, group in enumerate(zip(*lists, strict=True)):
        for name, x in zip(("parameter", "gradient", "m", "v"), group, strict=True):
            check.array(op, f"{name} {i}", x)
            check.shape(op, f"{name} {i}", x, "the parameter's shape", tuple(group[0].shape))
            if on_device(group[0]):
                _float32_there(op, f"{name} {i}", x)
                if x.contiguous:
                    continue
                raise ValueError(f"[{op}] {name} {i} must be contiguous. Copy it first.")
            if not x.flags.c_contiguous or (name != "gradient" and not x.flags.writeable):
                raise ValueError(
                    f"[{op}] {name} {i} must be a C-contiguous, writeable array, because it is changed in place. Copy it first."
                )
