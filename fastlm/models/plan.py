"""What a model costs before there is one: parameters, FLOPs, memory, and how to lay it over devices. Nothing is allocated.

Sources: 6 FLOPs a parameter and token for training, 2 for inference (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); 16 bytes a
parameter for mixed precision with Adam, its optimiser states split over the data-parallel replicas (Rajbhandari et al. 2020,
arXiv:1910.02054); tensor, pipeline and data parallelism together (Narayanan et al. 2021, arXiv:2104.04473).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastlm import models
from fastlm.nn import Attention, CrossAttention, Module, count_parameters

WEIGHT, GRADIENT, OPTIMISER = 2, 2, 12  # bytes a parameter: bfloat16, bfloat16, float32 copy and two moments
KEPT = 2  # bytes of an activation or of a number in the cache: bfloat16
TENSOR = (1, 2, 4, 8)  # devices that share each matrix: within one machine


@dataclass(frozen=True)
class Scores:
    """One attention: widths of all query heads and of all key heads, what a query sees, and whether generation keeps its keys."""

    heads: int
    kv: int
    window: int | None = None
    causal: bool = True
    cached: bool = True


@dataclass(frozen=True)
class Shape:
    """What of a model the plan needs. `experts`: parameters in experts, of which each token uses active - (total - experts)."""

    total: int
    active: int
    multiplied: int  # active parameters that are matrices of a product: no looked-up tables, no norms
    n_layer: int
    n_head: int
    attention: tuple[Scores, ...]
    kept: int  # numbers that a token leaves for the backward pass, over all layers
    n_expert: int = 1
    experts: int = 0
    context: int = 2048


@dataclass(frozen=True)
class Layout:
    """tensor x pipeline x data devices, and the bytes that the fullest of them holds in training, by kind."""

    tensor: int
    pipeline: int
    data: int
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def _glam() -> Shape:
    """GLaM 64B/64E (Du et al. 2022, arXiv:2112.06905): 64 layers, every other one 64 experts of two matrices, each token using 2."""
    d, ff, n_layer, heads, vocab, n_expert = 8192, 32768, 64, 128 * 128, 256_000, 64
    pairs = n_layer // 2
    expert, attention = 2 * d * ff, 4 * d * heads
    rest = vocab * d + n_layer * attention + pairs * (3 * d * ff + d * n_expert)  # matrices alone, as the paper counts
    kept = n_layer * (5 * heads + 3 * d) + pairs * (3 * ff + 2 * (2 * ff + d))
    active = rest + pairs * 2 * expert
    return Shape(
        rest + pairs * n_expert * expert, active, active, n_layer, 128,
        (Scores(heads, heads),) * n_layer, kept, n_expert, pairs * n_expert * expert, 1024,
    )  # fmt: skip


# Known by their sizes alone: planned, but not run. A preset of the same name goes first.
SIZES = {"glam-1.2t": _glam}


def shape_of(name: str) -> Shape:
    """The Shape of a preset. ValueError for an unknown name and for what the plan cannot count."""
    if name == "gpt4-like":
        raise ValueError(
            "[plan] GPT-4's architecture, size and training are undisclosed, so there is nothing exact to plan. "
            "What is often assumed, and not confirmed: rotary positions, grouped heads, SwiGLU, top-2 experts, a vocabulary of 100k."
        )
    if name in SIZES and name not in models.PRESETS:
        return SIZES[name]()
    return shape_of_model(models.declare(name))


def shape_of_model(model: Any) -> Shape:
    """The Shape of a declared model, read off its parts. A model with experts says `active_parameters()` itself."""
    c, parts = model.config, list(_walk(model))
    attentions = [part for part in parts if isinstance(part, Attention)]
    if len(attentions) < c.n_layer:
        raise ValueError(
            f"[plan] {type(model).__name__} has layers that the plan cannot count: used more than once, or with an attention of their own."
        )
    parameters = model.named_parameters()
    total = count_parameters(model)
    active = int(model.active_parameters()) if hasattr(model, "active_parameters") else total
    experts = sum(p.size for k, p in parameters.items() if ".experts." in k)
    tied = getattr(model, "head", None) is None
    tables = [k for k in parameters if "embedding" in k and not (tied and k.startswith("token_embedding"))]
    unused = sum(p.size for k, p in parameters.items() if p.ndim < 2 or k in tables)
    kept = 2 * c.d_model * c.n_layer  # what the norms give
    kept += sum(a.n_head * a.head_dim for a in attentions)
    idle = re.compile(r"\.experts\.(\d+)\.")  # of the experts, a token leaves something at as many as it uses
    for name, p in parameters.items():
        if p.ndim == 2 and name.startswith(("blocks.", "encoder.", "decoder.")):
            expert = idle.search(name)
            if expert is None or int(expert[1]) < c.n_expert_used:
                kept += p.data.shape[0] + (p.data.shape[1] if name.endswith(".down.weight") else 0)
    return Shape(
        total, active, active - unused, c.n_layer, c.n_head,
        tuple(_scores(a) for a in attentions), kept, getattr(c, "n_expert", 1), experts, getattr(c, "context", 512),
    )  # fmt: skip


def _scores(a: Attention) -> Scores:
    crossing = isinstance(a, CrossAttention)
    causal = a.sees.causal and not crossing
    return Scores(a.n_head * a.head_dim, a.n_kv_head * a.head_dim, a.sees.window, causal, causal or crossing)


def _walk(module: Module) -> Iterator[Module]:
    yield module
    for _, part in module.parts():
        if isinstance(part, Module):
            yield from _walk(part)


def flops(shape: Shape, context: int) -> float:
    """Of one token's forward pass, on average over a sequence of `context`: 2 a parameter, and the scores. Training takes 3 times.
    For an encoder-decoder, of a source token and a target token together."""
    scores = 0.0
    for a in shape.attention:
        w = min(a.window or context, context)
        seen = (w * (w + 1) / 2 + (context - w) * w) / context if a.causal else float(w)  # keys that a query sees, on average
        scores += 4 * a.heads * seen  # two products
    return 2 * shape.multiplied + scores


def cache_bytes(shape: Shape, context: int) -> float:
    """Keys and values of one sequence; a layer with a window needs no more than its window."""
    return float(sum(2 * KEPT * a.kv * min(a.window or context, context) for a in shape.attention if a.cached))


def training_bytes(shape: Shape, context: int, batch: int = 1) -> dict[str, float]:
    """Over all devices, without copies: by kind. Activations: of `batch` sequences, nothing computed twice, no scores kept."""
    return {
        "weights": WEIGHT * shape.total,
        "gradients": GRADIENT * shape.total,
        "optimiser": OPTIMISER * shape.total,
        "activations": KEPT * shape.kept * context * batch,
    }


def inference_bytes(shape: Shape, context: int) -> dict[str, float]:
    """Of one sequence: by kind."""
    return {"weights": WEIGHT * shape.total, "cache": cache_bytes(shape, context)}


def place(shape: Shape, context: int, tensor: int, pipeline: int, data: int) -> Layout:
    """The Layout with one sequence in each micro-batch and as many of these under way as there are stages (1F1B).

    A stage holds its layers' share of everything, the first ones a layer more where the layers do not divide evenly. Experts are
    spread over the replicas, and so are the optimiser's states.
    """
    largest = -(-shape.n_layer // pipeline) / shape.n_layer  # of the stages, as a share of the model
    spread = next(n for n in range(min(shape.n_expert, data), 0, -1) if shape.n_expert % n == 0 and data % n == 0)
    share = (shape.total - shape.experts + shape.experts / spread) * largest / tensor
    memory = {
        "weights": WEIGHT * share,
        "gradients": GRADIENT * share,
        "optimiser": OPTIMISER * shape.total * largest / (tensor * data),
        "activations": KEPT * shape.kept * context * largest * pipeline / tensor,
    }
    return Layout(tensor, pipeline, data, memory)


def layout(shape: Shape, devices: int, context: int, memory: float) -> Layout | None:
    """The layout that fits into 90 % of `memory` bytes a device with the least cutting up of the model, or None."""
    fits = []
    for tensor in TENSOR:
        if devices % tensor or shape.n_head % tensor:
            continue
        for pipeline in range(1, shape.n_layer + 1):
            if (devices // tensor) % pipeline == 0:
                found = place(shape, context, tensor, pipeline, devices // tensor // pipeline)
                if found.bytes <= 0.9 * memory:
                    fits.append(found)
    return min(fits, key=lambda found: (found.tensor * found.pipeline, found.pipeline), default=None)


def fewest_devices(shape: Shape, context: int, memory: float) -> int | None:
    """The smallest number of devices that a layout fits, in steps of whole machines of 8 from 8 on; None beyond 65,536."""
    for devices in (1, 2, 4, *range(8, 65_537, 8)):
        if 16 * shape.total <= 0.9 * memory * devices and layout(shape, devices, context, memory):
            return int(devices)
    return None


def reduced(config: Any, layers: int | None, width: int | None) -> Any:
    """The same wiring small: fewer layers, another width, with as many heads of 16 as fit into it, a vocabulary of 256
    and at most 8 experts."""
    fields = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {"vocab_size": min(config.vocab_size, 256)}
    if layers is not None:
        changes["n_layer"] = layers
    if width is not None:
        if width < 16 or width % 16:
            raise ValueError(f"[plan] width must be a multiple of 16, got {width}.")
        heads = min(width // 16, config.n_head)
        while width % heads:
            heads -= 1
        groups = max(g for g in range(1, min(getattr(config, "n_kv_head", config.n_head), heads) + 1) if heads % g == 0)
        changes |= {"d_model": width, "n_head": heads, "n_kv_head": groups, "head_dim": width // heads}
        if getattr(config, "d_ff", None) is not None:
            changes["d_ff"] = max(16, round(config.d_ff * width / config.d_model))
        if getattr(config, "n_expert", None) is not None:
            changes["n_expert"] = max(min(config.n_expert, 8), config.n_expert_used)
        if getattr(config, "pad", None) is not None:
            changes["pad"] = 0
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if k in fields})
