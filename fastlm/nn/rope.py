"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them over longer contexts.

A scaling is an object with `frequencies(base, dim, length)` -> (dim / 2,) float32 and `magnitude`, a factor on cos and sin.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.nn.cache import Context


class Scaling(Protocol):
    @property
    def magnitude(self) -> float: ...
    def frequencies(self, base: float, dim: int, length: int) -> Array: ...


def plain_frequencies(base: float, dim: int) -> Array:
    """base^(-2i / dim), in float32 throughout as in the reference, whose models were trained with these roundings."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.float32(base) ** exponents


@dataclass(frozen=True)
class Unscaled:
    magnitude: float = 1.0

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        return plain_frequencies(base, dim)


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`. Chen et al. 2023, arXiv:2306.15595."""

    factor: float
    magnitude: float = 1.0

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        return plain_frequencies(base, dim) / np.float32(self.factor)


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with the sequence once it is longer than `context` (NTK-aware; as in transformers, over the whole call)."""

    factor: float
    context: int
    magnitude: float = 1.0

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        stretch = self.factor * max(length, self.context) / self.context - (self.factor - 1)
        return plain_frequencies(base * stretch ** (dim / (dim - 2)), dim)


@dataclass(frozen=True)
class YarnScaling:
    """Low frequencies interpolated, high ones kept, a ramp between. Peng et al. 2023, arXiv:2309.00071, section 3.2."""

    factor: float
    context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float = 0.0  # DeepSeek's, of which both must be given
    mscale_all_dim: float = 0.0

    @property
    def magnitude(self) -> float:
        def grown(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        both = self.mscale and self.mscale_all_dim
        return grown(self.mscale) / grown(self.mscale_all_dim) if both else grown(1.0)

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        def turn(rotations: float) -> float:  # the dimension that makes so many rotations over the original context
            return dim * math.log(self.context / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = turn(self.beta_fast), turn(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        plain = plain_frequencies(base, dim)
        mixed: Array = plain / self.factor * (1 - kept) + plain * kept
        return mixed.astype(np.float32)


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between: LLaMA 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int
    magnitude: float = 1.0

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        plain = plain_frequencies(base, dim)
        turns = self.context * plain / (2 * math.pi)  # rotations over the original context
        smooth = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return ((1 - smooth) * plain / self.factor + smooth * plain).astype(np.float32)


@dataclass(frozen=True)
class FactorScaling:
    """Every frequency divided by a factor of its own: the tensor `rope_freqs` of a GGUF file."""

    factors: tuple[float, ...]
    magnitude: float = 1.0

    def frequencies(self, base: float, dim: int, length: int) -> Array:
        if len(self.factors) != dim // 2:
            raise ValueError(
                f"[rope] factors must be {dim // 2} numbers, half the rotated dimensions {dim}, got {len(self.factors)}."
            )
        return plain_frequencies(base, dim) / np.asarray(self.factors, np.float32)


_YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim")
_KEYS: dict[str, tuple[set[str], set[str]]] = {  # rope_type: required keys, allowed keys
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": ({"factor"}, {"original_max_position_embeddings", *_YARN}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "factors": ({"factors"}, set()),
}


def rope_scaling(parameters: Mapping[str, Any] | None, context: int) -> Scaling:
    """The scaling that a dict in the form of Hugging Face's `rope_scaling` describes; `context` is the model's own.

    Raises ValueError for an unknown kind or key, and for a missing one.
    """
    given = {k: v for k, v in (parameters or {}).items() if v is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"[rope] rope_type must be one of {', '.join(_KEYS)}, got {kind!r}.")
    required, allowed = _KEYS[kind]
    original = given.get("original_max_position_embeddings", context)
    if kind == "yarn" and "factor" in (parameters or {}) and type(original) in (int, float) and original > 0:
        given.setdefault("factor", context / original)  # null, as the reference has it
    if missing := required - given.keys():
        raise ValueError(f"[rope] rope_type {kind!r} needs {', '.join(sorted(missing))}, got {given}.")
    if unknown := given.keys() - required - allowed:
        raise ValueError(f"[rope] rope_type {kind!r} does not know {', '.join(sorted(unknown))}.")
    for key, value in given.items():
        if key == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"[rope] truncate must be true or false, got {value!r}.")
            continue
        many = key == "factors" and isinstance(value, Sequence) and not isinstance(value, str)
        if key == "factors" and not many:
            raise ValueError(f"[rope] factors must be a list of numbers, got {value!r}.")
        if key.startswith("mscale") and value == 0:  # as where it is not there
            continue
        if not all(type(n) in (int, float) and 0 < n <= sys.float_info.max for n in (value if many else [value])):
            raise ValueError(f"[rope] {key} must be a positive number, got {value!r}.")
    if kind == "llama3" and given["low_freq_factor"] > given["high_freq_factor"]:
        raise ValueError(
            f"[rope] low_freq_factor must be at most high_freq_factor = {given['high_freq_factor']}, got {given['low_freq_factor']}."
        )
    original = int(original)
    if kind == "default":
        return Unscaled()
    if kind == "linear":
        return LinearScaling(float(given["factor"]))
    if kind == "dynamic":
        return DynamicScaling(float(given["factor"]), context)
    if kind == "yarn":
        return YarnScaling(float(given["factor"]), original, **{k: given[k] for k in _YARN if k in given})
    if kind == "llama3":
        return Llama3Scaling(float(given["factor"]), float(given["low_freq_factor"]), float(given["high_freq_factor"]), original)
    return FactorScaling(tuple(float(f) for f in given["factors"]))


class Rope:
    """Rotates queries and keys by their positions. The tables grow as they are needed; one Rope serves all layers.

    turned: how many of a head's dimensions, the first, are rotated; None: all. Of an odd number one more is, by the frequencies of the
    odd number, as in the reference.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, scaling: Scaling | None = None, turned: int | None = None) -> None:
        if turned is None and (head_dim < 2 or head_dim % 2):
            raise ValueError(f"[rope] head_dim must be even, got {head_dim}.")
        dim = head_dim if turned is None else turned
        if not 0 < dim + dim % 2 <= head_dim:
            raise ValueError(f"[rope] turned must be from 1 to head_dim = {head_dim}, and one less where that is odd, got {dim}.")
        if dim < 4 and isinstance(scaling, DynamicScaling):  # its base grows with the power dim / (dim - 2)
            raise ValueError(f"[rope] head_dim must be at least 4 with rope_type 'dynamic', got {dim}.")
        self.dim, self.base, self.scaling = dim, base, scaling or Unscaled()
        self._cos = self._sin = np.zeros((0, (dim + 1) // 2), np.float32)
        self._frequencies: Array | None = None
        self._there: tuple[Array, Any, Any] | None = None  # the host's cos, and both on a device

    def tables(self, length: int) -> tuple[Array, Array]:
        """cos and sin of at least `length` positions, (P, D / 2) float32.

        The angle is the float32 product of position and frequency, as in the reference: what models were trained with.
        """
        fixed = not isinstance(self.scaling, DynamicScaling)
        if fixed and length <= len(self._cos):
            return self._cos, self._sin
        frequencies = self.scaling.frequencies(self.base, self.dim, length)
        known = self._frequencies is not None and np.array_equal(frequencies, self._frequencies)
        if length > len(self._cos) or not known:
            rows = max(length, 256, min(2 * len(self._cos), 1 << 17))
            angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies
            magnitude = self.scaling.magnitude
            self._cos = (np.cos(angles.astype(np.float64)) * magnitude).astype(np.float32)
            self._sin = (np.sin(angles.astype(np.float64)) * magnitude).astype(np.float32)
            self._frequencies = frequencies
        return self._cos, self._sin

    def _on(self, device: Any, cos: Array, sin: Array) -> tuple[Any, Any]:
        """The tables on a device, copied there when they have changed."""
        if self._there is None or self._there[0] is not cos or self._there[1].device is not device:
            self._there = cos, device.put(cos), device.put(sin)
        return self._there[1:]

    def __call__(self, q: Any, k: Any, context: Context) -> tuple[Any, Any]:
        """q (B, T, H, D), k (B, T, G, D) -> both rotated."""
        if backend.recording() and isinstance(self.scaling, DynamicScaling) and context.end > self.scaling.context:
            raise backend.Unrecordable("dynamic rope_scaling turns by the length of the sequence")
        cos, sin = self.tables(context.end)
        if context.device is not None:
            cos, sin = self._on(context.device, cos, sin)
        return ops.rope(q, cos, sin, context.positions), ops.rope(k, cos, sin, context.positions)
