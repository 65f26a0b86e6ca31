"""AdamW and the global gradient norm: what a training step does after the backward pass, in place and without the tape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastlm import _C
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
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    scale: float = 1.0,
) -> None:
    """One step of AdamW over many tensors, in place, in one pass and one call.

    Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in the formulation of torch.optim.AdamW:

        g = scale * gradient;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
        parameter = (1 - lr weight_decay) parameter - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    parameters, gradients, ms, vs: equally long sequences of float32 arrays or Tensors, C-contiguous, of equal shape position by
    position; ms and vs start as zeros. step: 1 for the first. weight_decay: one for all or one per tensor. scale: multiplies the
    gradients (clipping, accumulation). Bias corrections are computed in float64. Raises TypeError for a dtype, ValueError for a
    shape or a number.
    """
    op = "adamw"
    lists = [[data(x) for x in group] for group in (parameters, gradients, ms, vs)]
    if not _C.adamw_ready(*lists):
        _refuse(op, lists)
    if isinstance(weight_decay, Sequence):
        if len(weight_decay) != len(parameters):
            raise ValueError(
                f"[{op}] weight_decay must be a number or one per parameter = {len(parameters)}, got {len(weight_decay)}."
            )
        decays = [check.number(op, "weight_decay", w, low=0.0) for w in weight_decay]
    else:
        decays = [check.number(op, "weight_decay", weight_decay, low=0.0)] * len(parameters)
    if int(step) < 1:
        raise ValueError(f"[{op}] step must be 1 for the first step and count upwards, got {step}.")
    lr = check.number(op, "lr", lr, low=0.0)
    beta1, beta2 = _beta(op, "beta1", beta1), _beta(op, "beta2", beta2)
    eps = check.number(op, "eps", eps, low=0.0)
    _C.adamw_step(*lists, decays, int(step), lr, beta1, beta2, eps, check.number(op, "scale", scale))


def global_norm(gradients: Sequence[Any]) -> float:
    """The L2 norm over all elements of a list of float32 arrays or Tensors, accumulated in float64. nan and inf propagate.

    The bits depend neither on the number of threads nor on the instruction set.
    """
    arrays = [check.array("global_norm", f"gradients[{i}]", data(g)) for i, g in enumerate(gradients)]
    return math.sqrt(_C.square_sum(arrays))


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
            if not x.flags.c_contiguous or (name != "gradient" and not x.flags.writeable):
                raise ValueError(
                    f"[{op}] {name} {i} must be a C-contiguous, writeable array, because it is changed in place. Copy it first."
                )
