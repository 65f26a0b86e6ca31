"""A model's matrices in another storage: ggml's blocks, 8 bits with a scale a row, fewer bits without loss, bfloat16, float32; and the
activations that quantised ones are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.checkpoint.quantized import ACTIVATIONS, FORMATS, LOSSLESS, MADE, ROW, QuantizedArray, columns_of
from fastlm.checkpoint.quantized import quantize as quantized
from fastlm.models.base import LanguageModel
from fastlm.models.convert import BFLOAT16
from fastlm.nn import Embedding, Linear, Module
from fastlm.nn.module import Declared
from fastlm.tensor import Tensor

_WIDE = {"float32": "float32", "int8": "int16"}  # what the head has where the other matrices have the first
_SAFE = 65504.0  # float16's largest number: where none is larger, neither is a block's scale
_TABLES = ("token_embedding", "tokens")  # embeddings of tokens, which may also be the head; those of positions stay


def matrices(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The weights of all linear layers, routers of experts apart, and of the token embedding, by name."""
    for name, part in module.parts():
        if isinstance(part, Tensor):
            continue
        kind = name.split(".")[0]
        if (isinstance(part, Linear) and kind != "router") or (isinstance(part, Embedding) and kind in _TABLES):
            yield f"{prefix}{name}.weight", part.weight
        else:
            yield from matrices(part, f"{prefix}{name}.")


def _one_input(module: Module) -> Iterator[list[Tensor]]:
    """The weights of linear layers that read the same x.

    The last one's columns serve for all. Its errors, values' or the gated ones', reach the output as they are, the others' through a
    softmax or a gate: perplexity rises by about as much as with columns of their own, by half as much again with those of all together.
    """
    for _, part in module.parts():
        if isinstance(part, Module):
            yield from _one_input(part)
    parts = [getattr(module, name) for name in module.one_input]
    if parts:
        yield [part.weight for part in parts]


def rounds(name: str) -> bool:
    """Whether this matrix is one that 8-bit activations are for: every one but the head's.

    Rounding what the head reads is a third of the whole error: that has 16 bits, which costs as much time as memory takes anyway.
    """
    return name != "head.weight" and name.split(".")[-2] not in _TABLES


def _of_expert(name: str) -> bool:
    return "experts" in name.split(".")


def _by_row(name: str) -> bool:
    """Whether this matrix may be Q8_ROW: one that is rounded for, and no expert's."""
    return rounds(name) and not _of_expert(name)


def quantize(model: LanguageModel, kind: str, activations: str | None = None) -> None:
    """Puts the matrices into blocks of `kind`, in place. Those whose rows are no multiple of 32 long stay as they are.

    A matrix that is quantised already is dequantised first. They want no gradient afterwards. activations: None keeps what is set.
    Q8_ROW, which knows int8 activations alone, is for the matrices that these are for, of any length; the others become Q8_0. LOSSLESS
    leaves every bit of float32 and bfloat16 matrices: those of experts, and those whose exponents are too many, stay as they are. Raises
    ValueError for a kind, for Q8_ROW with float32 activations, for a model without a matrix that can be quantised, and, with the
    parameter's name, for weights that are not finite or so large that float16 does not hold a block's scale; nothing is quantised then.
    """
    if kind not in MADE:
        raise ValueError(f"[quantize] kind must be one of {', '.join(MADE)}, got {kind!r}.")
    if kind == ROW and activations == "float32":
        raise ValueError(f"[quantize] {ROW} weights are multiplied with int8 activations alone, got 'float32'.")
    activations = activations or ("int8" if kind == ROW else "float32" if kind == LOSSLESS else activations_of(model))
    _check(activations)
    model.forget()
    if kind == LOSSLESS:
        _without_loss(model, activations)
        return
    chosen = ((name, p, "Q8_0" if kind == ROW and not _by_row(name) else kind) for name, p in matrices(model))
    found = [(name, p, k) for name, p, k in chosen if k == ROW or p.shape[-1] % FORMATS[k][1] == 0]
    if not found:
        raise ValueError("[quantize] the model has no matrix whose rows are a multiple of 32 long.")
    for name, p, k in found:  # before the first is replaced: its numbers would be lost
        _check_numbers(name, p.data, k)
    before = [(p, p.data) for _, p, _ in found if isinstance(p.data, QuantizedArray)]  # few bytes: these are kept until all is done
    lasts = {id(p): group[-1] for group in _one_input(model) for p in group}
    columns: dict[int, Any] = {}
    for name, p, k in found:
        last = lasts.get(id(p), p)
        try:
            if k == ROW and id(last) not in columns:
                columns[id(last)] = columns_of(_float(name, last.data))
            made = _made(name, p.data, k, columns[id(last)] if k == ROW else None)
            p.data = made.with_activations(activations if rounds(name) else _WIDE[activations])
        except ValueError:
            for q, w in before:
                q.data = w
            raise
    for _, p, _ in found:
        p.requires_grad, p.grad = False, None


def _without_loss(model: LanguageModel, activations: str) -> None:
    if activations != "float32":
        raise ValueError(f"[quantize] {LOSSLESS} weights are multiplied with float32 activations alone, got {activations!r}.")
    done = 0
    for name, p in matrices(model):
        if _of_expert(name):
            continue
        as_it_is = isinstance(p.data, np.ndarray) and p.dtype == BFLOAT16
        w = p.data if as_it_is else _float(name, p.data)
        try:
            p.data = quantized(w, LOSSLESS)
        except ValueError:
            continue
        p.requires_grad, p.grad, done = False, None, done + 1
    if not done:
        raise ValueError(f"[quantize] the model has no matrix that can be {LOSSLESS}.")


def convert(model: LanguageModel, dtype: str) -> None:
    """Every matrix as "float32" or "bfloat16", in place; vectors stay float32. What `load(..., dtype=)` gives."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"[to] dtype must be 'float32' or 'bfloat16', got {dtype!r}. Quantised kinds: lm.quantize.")
    model.forget()
    target: Any = np.float32 if dtype == "float32" else BFLOAT16
    for name, p in model.named_parameters().items():
        if p.ndim > 1 and p.dtype != target:
            p.data = _float(name, p.data).astype(target)
            p.requires_grad, p.grad = dtype == "float32", None


def set_activations(model: LanguageModel, activations: str) -> None:
    """What quantised matrices are multiplied with, "float32" or "int8", a head 16 bits then. ValueError where the model has none."""
    _check(activations)
    found = [(name, p) for name, p in model.named_parameters().items() if isinstance(p.data, QuantizedArray)]
    if not found and activations != "float32":
        raise ValueError(f"[activations] {activations} activations need quantised weights: call lm.quantize('Q8_0') first.")
    if activations == "int8" and any(p.data.kind == LOSSLESS for _, p in found):
        raise ValueError(
            f"[activations] {LOSSLESS} weights are multiplied with float32 activations alone: quantize to another kind."
        )
    if activations == "float32" and (rows := [name for name, p in found if p.data.kind == ROW]):
        raise ValueError(f"[activations] {ROW} weights are multiplied with int8 activations alone, {rows[0]} is one.")
    for name, p in found:
        p.data = p.data.with_activations(activations if rounds(name) else _WIDE[activations])


def activations_of(model: LanguageModel) -> str:
    """ "int8" where the quantised matrices are multiplied with 8-bit activations, else "float32"."""
    kinds = {p.data.activations for p in model.named_parameters().values() if isinstance(p.data, QuantizedArray)}
    return "int8" if kinds & {"int8", "int16"} else "float32"


def _check(activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"[activations] must be 'float32' or 'int8', got {activations!r}.")


def _check_numbers(name: str, w: Any, kind: str) -> None:
    """ValueError for a plain matrix of the host that has no blocks of this kind."""
    if isinstance(w, QuantizedArray):
        return
    w = _float(name, w) if not isinstance(w, np.ndarray) else w
    bad = np.flatnonzero(~np.isfinite(w).reshape(-1, w.shape[-1]).all(axis=1))
    if bad.size:
        raise ValueError(f"[quantize] {name}: every number must be finite, and in row {bad[0]} not all are. Nothing was quantised.")
    if w.size and max(w.max(), -w.min()) > _SAFE:
        _made(name, w, kind)


def _made(name: str, w: Any, kind: str, columns: Any = None) -> QuantizedArray:
    """The blocks of a matrix."""
    numbers = _float(name, w)
    try:
        return quantized(numbers, kind, columns)
    except ValueError as error:
        reason = str(error).removeprefix("[quantize] ").removesuffix(".")
        raise ValueError(f"[quantize] {name}: {reason}. Nothing was quantised: LOSSLESS keeps such numbers as they are.") from None


def _float(name: str, w: Any) -> Any:
    if backend.device_of(w) is not None:
        raise ValueError(
            f"[quantize] {name}: it is on {w.device.name}, and weights are quantised on the CPU: call lm.to('cpu') first."
        )
    if isinstance(w, Declared):
        raise ValueError(f"[quantize] {name} has no value yet: load or initialise the model first.")
    return w.dequantize() if isinstance(w, QuantizedArray) else np.asarray(w, np.float32)
