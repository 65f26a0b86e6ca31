"""What a model costs before there is one: parameters, FLOPs, memory, and how to lay it over devices. Nothing is allocated.

Sources: 6 FLOPs a parameter and token for training, 2 for inference (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); 16 bytes a
parameter for mixed precision with Adam, its optimiser states split over the data-parallel replicas (Rajbhandari et al. 2020,
arXiv:1910.02054); tensor, pipeline and data parallelism together (Narayanan et al. 2021, arXiv:2104.04473).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastlm import models
from fastlm.models.encoder import Encoder
from fastlm.nn import CrossAttention, Linear, Module, MoE, count_parameters

WEIGHT, GRADIENT, OPTIMISER = 2, 2, 12  # bytes a parameter: bfloat16, bfloat16, float32 copy and two moments
KEPT = 2  # bytes of an activation or of a number in the cache: bfloat16
TENSOR = (1, 2, 4, 8)  # devices that share each matrix: within one machine


@dataclass(frozen=True)
class Scores:
    """One attention: the width of all its query heads, the numbers that generation keeps of a position (0: none), what a query sees,
    and the products of that size: scores and values, of XLNet also positions."""

    heads: int
    cache: int
    window: int | None = None
    causal: bool = True
    products: int = 2


@dataclass(frozen=True)
class Shape:
    """What of a model the plan needs. `experts`: parameters in experts, of which each token uses active - (total - experts)."""

    total: int
    active: int
    multiplied: (
        int  # active parameters that are matrices of a product, as often as layers share them: no looked-up tables, no norms
    )
    n_layer: int  # that a pipeline can be cut into: of an encoder-decoder, of both
    n_head: int
    attention: tuple[Scores, ...]
    kept: int  # numbers that a token leaves for the backward pass, over all layers
    n_expert: int = 1
    experts: int = 0
    context: int = 2048  # the longest
    usual_context: int = 2048  # what it was trained on, where that is not the longest
    pooled: int = 0  # parameters of products that a sequence has once, of an encoder's pooler


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


def shape_of(name: str) -> Shape:
    """The Shape of a preset. ValueError for an unknown name and for what the plan cannot count."""
    return shape_of_model(models.declare(name))


def shape_of_model(model: Any) -> Shape:
    """The Shape of a declared model, read off its parts. A model with experts says `active_parameters()` itself; a part that more
    than one layer goes through says how many, `times`, one that a sequence goes through once `pools`; an attention of another kind has
    `n_head`, `n_kv_head`, `head_dim`, `sees` and may say what it keeps, `cached`, and how many `products` it has."""
    c, layers = model.config, list(_blocks(model))
    attentions = [(part, times) for block, times in layers for part in _used(block) if hasattr(part, "n_kv_head")]
    n_layer = sum(times for _, times in layers)
    parameters = model.named_parameters()
    total = count_parameters(model)
    active = int(model.active_parameters()) if hasattr(model, "active_parameters") else total
    blocks = sum(times * part.weight.size for block, times in layers for part in _linears(block))
    once = sum(part.weight.size for part in _linears(model)) - sum(p.weight.size for b, _ in layers for p in _linears(b))
    pooled = sum(part.weight.size for part in _pooled(model))
    tied = model.token_embedding.weight.size if not isinstance(model, Encoder) and model.head is None else 0
    kept = sum(times * _left(block) for block, times in layers)
    scores = tuple(_scores(part) for part, times in attentions for _ in range(times))
    experts = sum(p.size for k, p in parameters.items() if ".experts." in k)
    context = int(c.context)
    return Shape(
        total, active, blocks + once - pooled + tied, n_layer, c.n_head, scores, kept, getattr(c, "n_expert", 1), experts, context,
        getattr(c, "usual_context", context), pooled,
    )  # fmt: skip


def _left(block: Module) -> int:
    """What a token leaves in a block for its backward pass: the outputs of norms, of products, of the heads, of activations."""
    left = 0
    part: Any
    for part in _used(block):
        if isinstance(part, Linear):
            left += int(part.weight.shape[0])
        elif hasattr(part, "down"):
            left += int(part.down.weight.shape[1])
        elif hasattr(part, "n_kv_head"):
            normed = 0 if getattr(part, "q_norm", None) is None else part.n_head + part.n_kv_head
            left += (part.n_head + normed) * part.head_dim
        elif (weight := getattr(part, "weight", None)) is not None and weight.ndim == 1:
            left += weight.size
    return left


def _scores(a: Any) -> Scores:
    crossing = isinstance(a, CrossAttention)
    causal = a.sees.causal and not crossing
    cache = getattr(a, "cached", 2 * a.n_kv_head * a.head_dim if causal or crossing else 0)
    return Scores(a.n_head * a.head_dim, cache, a.sees.window, causal, getattr(a, "products", 2))


def _blocks(module: Module, times: int = 1) -> Iterator[tuple[Module, int]]:
    """Every block of the model, and how many layers go through it."""
    for name, part in module.parts():
        if isinstance(part, Module):
            often = times * getattr(part, "times", 1)
            if name.startswith("blocks."):
                yield part, often
            else:
                yield from _blocks(part, often)


def _used(module: Module) -> Iterator[Module]:
    """The module and its parts; of experts as many as a token uses."""
    yield module
    for name, part in module.parts():
        idle = isinstance(module, MoE) and name.startswith("experts.") and int(name.split(".")[1]) >= module.k
        if isinstance(part, Module) and not idle:
            yield from _used(part)


def _linears(module: Module) -> Iterator[Linear]:
    return (part for part in _used(module) if isinstance(part, Linear))


def _pooled(module: Module) -> Iterator[Linear]:
    if getattr(module, "pools", False):
        yield from _linears(module)
        return
    for _, part in module.parts():
        if isinstance(part, Module):
            yield from _pooled(part)


def flops(shape: Shape, context: int) -> float:
    """Of one token's forward pass, on average over a sequence of `context`: 2 a parameter, and the scores. Training takes 3 times.
    For an encoder-decoder, of a source token and a target token together."""
    scores = 0.0
    for a in shape.attention:
        w = min(a.window or context, context)
        seen = (w * (w + 1) / 2 + (context - w) * w) / context if a.causal else float(w)  # keys that a query sees, on average
        scores += 2 * a.products * a.heads * seen
    return 2 * (shape.multiplied + shape.pooled / context) + scores


def cache_bytes(shape: Shape, context: int) -> float:
    """Keys and values of one sequence, and those of its source; a layer with a window needs no more than its window."""
    return float(sum(KEPT * a.cache * min(a.window or context, context) for a in shape.attention))


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
    """The layout that fits into 90 % of `memory` bytes a device with the least cutting up of the model, or None.

    Heads are divided evenly; layers too, unless only stages of unequal length fit the number of devices.
    """
    fits = []
    for tensor in TENSOR:
        if devices % tensor or shape.n_head % tensor:
            continue
        for pipeline in range(1, shape.n_layer + 1):
            if (devices // tensor) % pipeline == 0:
                found = place(shape, context, tensor, pipeline, devices // tensor // pipeline)
                if found.bytes <= 0.9 * memory:
                    fits.append(found)
    return min(fits, key=lambda l: (shape.n_layer % l.pipeline != 0, l.tensor * l.pipeline, l.pipeline), default=None)


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
        changes |= {"n_layer": layers, "n_encoder_layer": layers}
        for sparse, dense in (("n_sparse", "n_layer"), ("n_encoder_sparse", "n_encoder_layer")):
            if sparse in fields:
                changes[sparse] = max(1, round(getattr(config, sparse) * layers / getattr(config, dense)))
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
        if "d_embedding" in fields:
            changes["d_embedding"] = width if config.d_embedding == config.d_model else min(config.d_embedding, width)
        if "n_expert" in fields:
            changes["n_expert"] = max(min(config.n_expert, 8), config.n_expert_used)
        if getattr(config, "pad", None) is not None:
            changes["pad"] = 0
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if k in fields})
