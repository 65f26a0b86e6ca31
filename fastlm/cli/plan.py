"""`fastlm plan`: what a model costs, and one step of its wiring made small."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlm import models
from fastlm.models import plan
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.nn import count_parameters


def quantity(value: float, units: str = "KMGTPE") -> str:
    """1,234,567 as 1.23M: three digits, powers of 1000."""
    unit = ""
    for larger in units:
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{unit}" if unit else f"{value:.0f}"


def kinds(memory: Mapping[str, float]) -> str:
    parts = ", ".join(f"{kind} {quantity(value)}B" for kind, value in memory.items())
    return f"{quantity(sum(memory.values()))}B: {parts}"


def report(name: str, shape: plan.Shape, devices: int, context: int, memory: float) -> list[tuple[str, str]]:
    """The lines, as (label, text)."""
    forward = plan.flops(shape, context)
    found = plan.layout(shape, devices, context, memory)
    note = getattr(models.module_of(models.PRESETS[name]), "NOTES", {}).get(name)
    rows = [
        ("model", f"{name}, {shape.n_layer} layers, context {context:,}"),
        *([("note", note)] if note else []),
        ("parameters", f"{shape.total:,} in all, {shape.active:,} active for a token"),
        ("FLOPs a token", f"{quantity(forward)} forward, {quantity(3 * forward)} forward and backward"),
        ("training", kinds(plan.training_bytes(shape, context)) + " (bfloat16, Adam; activations of one sequence)"),
        ("inference", kinds(plan.inference_bytes(shape, context)) + " (bfloat16; cache of one sequence)"),
    ]
    if found is None:
        need = plan.fewest_devices(shape, context, memory)
        shorter = need is None and plan.fewest_devices(shape, 1, memory) is not None
        none = f"no number of devices up to 65,536 will do{': give a shorter --context' if shorter else ''}"
        advice = none if need is None else f"the fewest that will do: {need:,}"
        return [*rows, ("layout", f"none fits {devices:,} devices of {quantity(memory)}B; {advice}")]
    parts = f"{found.tensor} tensor x {found.pipeline} pipeline x {found.data} data = {devices:,} devices"
    if uneven := shape.n_layer % found.pipeline:
        least = shape.n_layer // found.pipeline
        parts += f"; {uneven} stages of {least + 1} layers, {found.pipeline - uneven} of {least}"
    return [*rows, ("layout", parts), ("each device", kinds(found.memory))]


def reduced(name: str, layers: int | None, width: int | None) -> Any:
    """The Config of the model that a step is made of, or a ValueError where that is too much."""
    config = plan.reduced(models.PRESETS[name], layers, width)
    if issubclass(models.module_of(config).Model, Encoder):
        config = dataclasses.replace(config, head="masked_lm")
    count = count_parameters(models.declare(config))
    if count > 500_000_000:
        raise ValueError(f"[plan] a step here is for small models, got {count:,} parameters. Give --layers 2 --width 64.")
    return config


def step(name: str, layers: int | None, width: int | None, context: int) -> str:
    """Creates the reduced model and does one forward and backward pass; what came out."""
    config = reduced(name, layers, width)
    model = models.create(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(context, config.context, 128) + 1), dtype=np.int32)
    start = time.perf_counter()
    if isinstance(model, Encoder):
        loss = model.loss(ids, ids)
    elif isinstance(model, EncoderDecoder):
        loss = model.loss(ids, ids[:, :-1], ids[:, 1:])
    else:
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    seconds = time.perf_counter() - start
    square = sum(float(np.square(p.grad_buffer()).sum()) for p in model.named_parameters().values())
    return (
        f"{config.n_layer} layers, width {config.d_model}, {count_parameters(model):,} parameters: loss {loss.item():.4f} "
        f"(ln {config.vocab_size} = {math.log(config.vocab_size):.4f}), gradient norm {math.sqrt(square):.4g}, {seconds * 1e3:.0f} ms"
    )


def run(arguments: argparse.Namespace) -> None:
    name = arguments.name
    shape = plan.shape_of(name)
    context = arguments.context or shape.usual_context
    if context > shape.context:
        raise ValueError(f"[plan] context must be at most {shape.context:,}, that of {name}, got {context:,}.")
    with_step = arguments.layers is not None or arguments.width is not None
    if with_step:
        reduced(name, arguments.layers, arguments.width)  # what cannot be is refused before anything is printed
    for label, text in report(name, shape, arguments.devices, context, arguments.memory * 1e9):
        print(f"{label:<14} {text}")
    if with_step:
        print(f"{'a step here':<14} {step(name, arguments.layers, arguments.width, context)}")
