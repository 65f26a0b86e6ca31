"""`fastlm verify`: where a model departs from a reference, layer by layer.

The reference is an npz file. `ids` (B, T) integers; optional `mask` and `segments` (B, T), for encoders; and any of

    embedding    (B, T, C)  what goes into layer 0
    layer.<i>    (B, T, C)  what comes out of layer i, before the final norm
    final        (B, T, C)  what the head reads
    logits       (B, T, V)  or of the head's own shape

`SCRIPT` writes one with transformers, in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import hub
from fastlm.backend import Array
from fastlm.models.base import CausalLM
from fastlm.models.encoder import Encoder
from fastlm.nn import Module
from fastlm.tensor import data, no_grad

SCRIPT = '''"""python reference.py FOLDER golden.npz: hidden states and logits of 2 x 16 random tokens, by transformers in float64."""
import sys
import numpy, torch, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
model = getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1], attn_implementation="eager").double().eval()
ids = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    out = model(ids, output_hidden_states=True)
names = ["embedding", *(f"layer.{i}" for i in range(len(out.hidden_states) - 2)), "final"]
states = {name: state.numpy() for name, state in zip(names, out.hidden_states)}
numpy.savez(sys.argv[2], ids=ids.numpy(), **states, **({"logits": out.logits.numpy()} if "logits" in out else {}))
'''


class Watched(Module):
    """A block that keeps what goes in and comes out."""

    def __init__(self, block: Module, states: list[tuple[Array, Array]]) -> None:
        self.block, self.states = block, states

    def __call__(self, x: Any, *rest: Any, **more: Any) -> Any:
        y = self.block(x, *rest, **more)
        self.states.append((_first(x).copy(), _first(y).copy()))
        return y


def _first(x: Any) -> Array:
    """The array of a block's state; of XLNet's streams the content."""
    found: Array = data(x[0] if isinstance(x, list) else x)
    return found


def observe(model: Any, ids: Array, mask: Array | None = None, segments: Array | None = None) -> dict[str, Array]:
    """The model's hidden states and logits under the names above. ValueError for a model that is no decoder and no encoder."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(model, (CausalLM, Encoder)) or not isinstance(blocks, list):
        raise ValueError(f"[verify] the model must be a decoder or an encoder with blocks, got {type(model).__name__}.")
    if isinstance(model, CausalLM) and not (mask is None and segments is None):
        raise ValueError("[verify] the reference must have no mask and no segments for a causal model: leave out padding.")
    states: list[tuple[Array, Array]] = []
    model.blocks = [Watched(block, states) for block in blocks]  # type: ignore[union-attr]
    try:
        with no_grad():
            final = data(model._run(ids, None) if isinstance(model, CausalLM) else model.run(ids, mask, segments))
    finally:
        model.blocks = blocks  # type: ignore[union-attr]
    found = {"embedding": states[0][0], **{f"layer.{i}": y for i, (_, y) in enumerate(states)}, "final": final}
    if isinstance(model, CausalLM):
        found["logits"] = model.logits(ids)
    elif model.head is not None:
        found["logits"] = model.logits(ids, mask, segments)
    return found


def errors(
    found: dict[str, Array], reference: dict[str, Array], mask: Array | None = None
) -> dict[str, tuple[float, tuple[int, ...]]]:
    """By name, in the order of the layers: the largest |difference| / max(1, |reference|), and where it is. Padding is left out."""
    if unknown := [name for name in reference if name not in found]:
        raise ValueError(f"[verify] the reference has {', '.join(unknown)}; this model has {', '.join(found)}.")
    largest = {}
    for name in (name for name in found if name in reference):
        got, want = found[name], reference[name]
        if got.shape != want.shape:
            raise ValueError(f"[verify] {name} of the reference must have the shape {got.shape}, got {want.shape}.")
        error = np.abs(got - want.astype(np.float64)) / np.maximum(1, np.abs(want))
        error = np.where(np.isnan(error), np.inf, error)
        if mask is not None and error.shape[:2] == mask.shape:
            error[np.asarray(mask) == 0] = 0
        where = np.unravel_index(int(error.argmax()), error.shape)
        largest[name] = float(error[where]), tuple(int(i) for i in where)
    return largest


def read(path: str) -> dict[str, Array]:
    """The arrays of the reference. ValueError where there are no ids or nothing to compare."""
    with np.load(Path(path), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if "ids" not in arrays or not arrays.keys() - {"ids", "mask", "segments"}:
        raise ValueError(
            f"[verify] {path} must hold ids and any of embedding, layer.0 ..., final, logits; got {', '.join(arrays) or 'nothing'}. "
            "`fastlm verify --script` prints the script that writes it."
        )
    return arrays


def run(arguments: argparse.Namespace) -> int:
    if arguments.script:
        print(SCRIPT, end="")
        return 0
    if not arguments.folder or not arguments.reference:
        raise ValueError("[verify] give FOLDER and --reference golden.npz; --script prints how to write that.")
    reference = read(arguments.reference)
    ids, mask, segments = reference.pop("ids"), reference.pop("mask", None), reference.pop("segments", None)
    model, _ = hub.load_folder_or_gguf(arguments.folder)
    largest = errors(observe(model, ids, mask, segments), reference, mask)
    print(f"{'':<12} {'largest error':>14}  at")
    first = None
    for name, (error, where) in largest.items():
        wrong = not error <= arguments.tolerance
        first = name if wrong and first is None else first
        print(f"{name:<12} {error:>14.2e}  {where}{'  <-' if wrong else ''}")
    if first is None:
        print(f"all within {arguments.tolerance:g} x max(1, |value|)")
        return 0
    print(f"the first beyond {arguments.tolerance:g} x max(1, |value|): {first}")
    return 1
