"""Linear and Embedding: the two parts that hold matrices."""

from __future__ import annotations

from typing import Any

from fastlm import ops
from fastlm.nn.module import Module, parameter


class Linear(Module):
    """act(x W^T + b) + residual. x (..., d_in) -> (..., d_out); weight (d_out, d_in) in float32, bfloat16 or quantised."""

    fast = False  # see ops.linear

    def __init__(self, d_in: int, d_out: int, bias: bool = True, std: float = 0.02) -> None:
        self.weight = parameter(d_out, d_in, std=std)
        self.bias = parameter(d_out) if bias else None

    def __call__(self, x: Any, activation: str | None = None, residual: Any = None) -> Any:
        return ops.linear(x, self.weight, self.bias, activation, residual, self.fast)


def side_by_side(x: Any, *parts: Linear) -> list[Any]:
    """Every part's output for the same x: the bits of calling each, for a few rows in one launch."""
    return ops.linears(x, [part.weight for part in parts], [part.bias for part in parts], all(part.fast for part in parts))


def make_fast(*parts: Module) -> None:
    """Every Linear within is fast from now on: for what whole sequences go through, never one token after the other."""
    for part in parts:
        if isinstance(part, Linear):
            part.fast = True
        make_fast(*(inner for _, inner in part.parts() if isinstance(inner, Module)))


class Embedding(Module):
    """Rows of a table: ids (...) int32 -> (..., d_model) float32. dtype: on a device, what the rows of a quantised table become."""

    dtype: Any = None

    def __init__(self, count: int, d_model: int, std: float = 0.02) -> None:
        self.weight = parameter(count, d_model, std=std)

    def __call__(self, ids: Any) -> Any:
        return ops.embedding(ids, self.weight, self.dtype)
