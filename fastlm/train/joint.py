"""What is trained as one though it is more than a model: a student beside its teacher's answers, a generator and a discriminator.

A joint model has `model`, the one that the run is for, `saved`, what a checkpoint holds by folder, `trains`, and the `loss` that takes
the fields of its objective's Batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import create
from fastlm.models.distilbert import DistilBertConfig
from fastlm.models.electra import joint_loss
from fastlm.models.encoder import Encoder
from fastlm.models.heads import labels_of
from fastlm.nn import Module
from fastlm.tensor import Tensor, data, no_grad


class Joint(Module):
    """The base: parameters that two parts share are one parameter."""

    model: Encoder
    trains: str
    saved: dict[str, Encoder]

    @property
    def config(self) -> Any:
        return self.model.config

    def named_parameters(self, prefix: str = "") -> dict[str, Tensor]:
        found, seen = {}, set()
        for name, p in super().named_parameters(prefix).items():
            if id(p) not in seen:
                found[name] = p
                seen.add(id(p))
        return found


class Distilled(Joint):
    """A masked language model that learns from a teacher: ce * KL at a temperature + mlm * masked loss + cos * distance of the states.

    Sanh et al. 2019, arXiv:1910.01108, section 3, with the weights of its code. KL and distance are taken at every position that is no
    padding. The distance needs states of the teacher's width: cos=0 leaves it out.
    """

    trains = "distillation"

    def __init__(self, student: Encoder, temperature: float = 2.0, ce: float = 5.0, mlm: float = 2.0, cos: float = 1.0) -> None:
        _check_encoders("distilled", student)
        if student.config.head != "masked_lm":
            raise ValueError(f"[distilled] student must have the head masked_lm, got {student.config.head!r}.")
        self.model, self.saved = student, {"": student}
        self.temperature, self.weights = temperature, (ce, mlm, cos)

    def loss(
        self, ids: Any, targets: Any, mask: Any = None, segments: Any = None, *, teacher_logits: Array, teacher_states: Array
    ) -> Tensor:
        """A scalar. teacher_logits (B, T, V), teacher_states (B, T, C)."""
        x = self.model.run(ids, mask, segments)
        C, ce, mlm, cos = x.shape[-1], *self.weights
        if cos and teacher_states.shape[-1] != C:
            raise ValueError(
                f"[distilled] teacher_states must be as wide as the student, {C}, got {teacher_states.shape[-1]}; or cos=0."
            )
        there = np.flatnonzero(np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask)).astype(np.int32)
        rows = ops.embedding(there, ops.reshape(x, (-1, C)))
        logits = self.model.need_head()(self.model, rows)
        wanted = labels_of(targets, x.shape[:2]).reshape(-1)[there]
        loss = ops.scale(ops.kl_divergence(logits, _rows(teacher_logits, there), self.temperature), ce)
        loss = ops.add(loss, ops.scale(ops.cross_entropy(logits, wanted), mlm))
        if cos:
            loss = ops.add(loss, ops.scale(ops.cosine_distance(rows, _rows(teacher_states, there)), cos))
        out: Tensor = loss
        return out


def _check_encoders(op: str, *models: Any) -> None:
    for model in models:
        if not isinstance(model, Encoder):
            raise TypeError(f"[{op}] a model must be an encoder of fastlm.models, got {type(model).__name__}.")


def _rows(x: Array, there: Array) -> Array:
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1])[there], np.float32)


def teacher(model: Encoder) -> Any:
    """The function that `data.Distillation` asks: (ids, mask, segments) -> logits (B, T, V), states (B, T, C)."""
    _check_encoders("teacher", model)
    head = model.need_head()

    def answer(ids: Any, mask: Any = None, segments: Any = None) -> tuple[Array, Array]:
        with no_grad():
            x = model.run(ids, mask, segments)
            return data(head(model, x)), data(x)

    return answer


def student_of(model: Encoder, layers: Sequence[int] = (0, 2, 4, 7, 9, 11), seed: int = 0) -> Encoder:
    """A DistilBERT that begins as these layers of a BERT with a masked LM head, with its embeddings and its head. No segments: that of
    the first one is added to the positions, so that all tokens are in it."""
    _check_encoders("student_of", model)
    c = model.config
    if not hasattr(layers, "__len__"):
        raise TypeError(f"[student_of] layers must be numbers of layers, such as (0, 2, 4), got {layers!r:.60}.")
    if type(model).__name__ != "Bert" or c.head not in ("masked_lm", "pretraining"):
        raise ValueError(
            f"[student_of] model must be a Bert with the head masked_lm or pretraining, got {type(model).__name__}, {c.head!r}."
        )
    bad = [i for i in layers if not 0 <= i < c.n_layer]
    if bad or not layers:
        raise ValueError(f"[student_of] layers must be from 0 to {c.n_layer - 1}, got {list(layers)}.")
    same = {f.name: getattr(c, f.name) for f in fields(DistilBertConfig) if hasattr(c, f.name)}
    student: Encoder = create(DistilBertConfig(**same | {"n_layer": len(layers), "head": "masked_lm"}), seed)
    theirs = model.named_parameters()
    for name, p in student.named_parameters().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(layers[int(parts[1])])
        if parts[0] == "head" and c.head == "pretraining":
            parts.insert(1, "tokens")
        np.copyto(p.data, theirs[".".join(parts)].data)
    student.token_ids = model.token_ids
    student.named_parameters()["embeddings.positions.weight"].data += theirs["embeddings.segments.weight"].data[0]
    return student


class Electra(Joint):
    """A discriminator, the model of the run, and the generator that it learns from; see models.electra.joint_loss."""

    trains = "electra"

    def __init__(self, discriminator: Encoder, generator: Encoder, weight: float = 50.0) -> None:
        _check_encoders("electra", discriminator, generator)
        heads = discriminator.config.head, generator.config.head
        if heads != ("replaced_token", "masked_lm"):
            raise ValueError(
                f"[electra] discriminator and generator must have the heads replaced_token and masked_lm, got {heads}."
            )
        self.model, self.generator, self.weight = discriminator, generator, weight
        self.saved = {"": discriminator, "generator": generator}

    def loss(self, ids: Any, targets: Any, mask: Any = None, segments: Any = None, *, uniforms: Array) -> Tensor:
        """A scalar. uniforms (B, T): by which the generator's tokens are drawn."""
        loss: Tensor = joint_loss(self.generator, self.model, ids, targets, mask, segments, weight=self.weight, uniforms=uniforms)
        return loss
