"""`fastlm verify`: where a model departs from a reference, layer by layer.

The reference is an npz file. `ids` (B, T) integers; optional `mask` and `segments` (B, T), for encoders; and any of

    embedding    (B, T, C)  what goes into layer 0
    layer.<i>    (B, T, C)  what comes out of layer i, before the final norm
    final        (B, T, C)  what the head reads
    logits       (B, T, V)  or of the head's own shape

For an encoder-decoder `ids` is the source, `mask` its mask, `decoder_ids` (B, T) what the decoder reads, and the states are
`encoder.embedding`, `encoder.layer.0` ... `decoder.final`, `logits`. `SCRIPT` writes one with transformers, in float64.
"""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import hub
from fastlm.backend import Array
from fastlm.models.base import CausalLM
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.nn import Module
from fastlm.tensor import data, no_grad

SCRIPT = '''"""python reference.py FOLDER golden.npz: hidden states and logits of 2 x 12 random tokens, by transformers in float64."""
import sys
import numpy, torch, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
config._attn_implementation = config._experts_implementation = "eager"  # torch's grouped product knows no float64
model = getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1], config=config).double().eval()
ids, other = (torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
states, inputs = {}, {"input_ids": ids}
stacks = {"": model}
if config.is_encoder_decoder:
    inputs["decoder_input_ids"] = other
    stacks = {"encoder.": model.get_encoder(), "decoder.": model.get_decoder()}


def watch(prefix, layer):
    def keep(module, args, kwargs, output):
        number = sum(key.startswith(prefix + "layer.") for key in states)
        for name, x in (("embedding", args[0] if args else kwargs["hidden_states"]), (f"layer.{number}", output)):
            x = x[0] if isinstance(x, (tuple, list)) else x
            if name != "embedding" or number == 0:
                states[prefix + name] = x if x.shape[:2] == ids.shape else x.transpose(0, 1)  # XLNet goes by time first
    layer.register_forward_hook(keep, with_kwargs=True)


for prefix, stack in stacks.items():
    for layer in next(m for m in stack.modules() if isinstance(m, torch.nn.ModuleList)):
        watch(prefix, layer)
with torch.no_grad():
    out = model(**inputs, output_hidden_states=True)
for prefix in stacks:
    states[prefix + "final"] = out[prefix.replace(".", "_") + "hidden_states"][-1]
if "logits" in out:
    states["logits"] = out.logits
more = {"decoder_ids": other.numpy()} if config.is_encoder_decoder else {}
numpy.savez_compressed(sys.argv[2], ids=ids.numpy(), **more, **{name: state.float().numpy() for name, state in states.items()})
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


def observe(
    model: Any, ids: Array, mask: Array | None = None, segments: Array | None = None, decoder_ids: Array | None = None
) -> dict[str, Array]:
    """The model's hidden states and logits under the names above. ValueError where what is given does not go with the model."""
    if isinstance(model, CausalLM) and not (mask is None and segments is None):
        raise ValueError("[verify] the reference must have no mask and no segments for a causal model: leave out padding.")
    two = isinstance(model, EncoderDecoder)
    if two != (decoder_ids is not None) or (two and segments is not None):
        raise ValueError("[verify] the reference must have decoder_ids, and no segments, for an encoder-decoder, and for no other.")
    with no_grad():
        if isinstance(model, EncoderDecoder):
            found, memory = _watched(model.encoder, lambda: model.encode(ids, mask), "encoder.")
            found["encoder.final"] = data(memory.states)
            seen, (final, _) = _watched(model.decoder, lambda: model._run(decoder_ids, memory), "decoder.")
            return found | seen | {"decoder.final": data(final), "logits": model.logits(ids, decoder_ids, mask)}
        if isinstance(model, Encoder):
            found, final = _watched(model, lambda: model.run(ids, mask, segments))
            logits = {} if model.head is None else {"logits": model.logits(ids, mask, segments)}
        else:
            found, final = _watched(model, lambda: model._run(ids, None))
            logits = {"logits": model.logits(ids)}
        return found | {"final": data(final)} | logits


def _watched(stack: Any, run: Callable[[], Any], prefix: str = "") -> tuple[dict[str, Array], Any]:
    """The states in a stack's layers, its `blocks` or the `groups` that share them, while `run` runs; and what it returns."""
    name = "blocks" if hasattr(stack, "blocks") else "groups"
    blocks, states = getattr(stack, name), list[tuple[Array, Array]]()
    setattr(stack, name, [Watched(block, states) for block in blocks])
    try:
        result = run()
    finally:
        setattr(stack, name, blocks)
    return {f"{prefix}embedding": states[0][0], **{f"{prefix}layer.{i}": y for i, (_, y) in enumerate(states)}}, result


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
        wide = want.astype(np.float64)
        with np.errstate(invalid="ignore"):  # an infinite value is right where both are
            error = np.where(got == wide, 0, np.abs(got - wide) / np.maximum(1, np.abs(wide)))
        error = np.where(np.isnan(error), np.inf, error)
        if mask is not None and not name.startswith("decoder.") and error.shape[:2] == mask.shape:
            error[np.asarray(mask) == 0] = 0
        where = np.unravel_index(int(error.argmax()), error.shape)
        largest[name] = float(error[where]), tuple(int(i) for i in where)
    return largest


_INPUTS = ("ids", "mask", "segments", "decoder_ids")


def read(path: str) -> dict[str, Array]:
    """The arrays of the reference. ValueError where it is no npz file, or there are no ids or nothing to compare."""
    try:
        with zipfile.ZipFile(path), np.load(Path(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:  # not even a zip file, damaged, or with objects in it
        raise ValueError(f"[verify] {path} must be an npz file of arrays of numbers, as numpy.savez writes it: {error}") from None
    if wrong := [f"{name} ({array.dtype})" for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
        raise ValueError(f"[verify] {path} must hold real numbers alone, got {', '.join(wrong)}.")
    if "ids" not in arrays or not arrays.keys() - set(_INPUTS):
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
    given: Any = {name: reference.pop(name, None) for name in _INPUTS}
    model, _ = hub.load_folder_or_gguf(arguments.folder)
    largest = errors(observe(model, **given), reference, given["mask"])
    print(f"{'':<18} {'largest error':>14}  at")
    first = None
    for name, (error, where) in largest.items():
        wrong = not error <= arguments.tolerance
        first = name if wrong and first is None else first
        print(f"{name:<18} {error:>14.2e}  {where}{'  <-' if wrong else ''}")
    if first is None:
        print(f"all within {arguments.tolerance:g} x max(1, |value|)")
        return 0
    print(f"the first beyond {arguments.tolerance:g} x max(1, |value|): {first}")
    return 1
