"""Of a prompt's last layer nothing but keys, values and the last position is computed, and no bit shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.generate.test_recorded import TINY, tiny

CAUSAL = sorted(set(TINY) - {"t5", "switch"})
IDS = np.random.default_rng(5).integers(0, 60, (2, 9)).astype(np.int32)


def watched(model: Any) -> list[tuple[int, ...]]:
    """The shapes that the model's blocks give from now on."""
    shapes: list[tuple[int, ...]] = []

    def watch(block: Any) -> Any:
        def call(*given: Any) -> Any:
            y = block(*given)
            shapes.append(y.shape)
            return y

        return call

    model.__dict__["blocks"] = [watch(block) for block in model.blocks]
    return shapes


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_last_position(name: str, cached: bool) -> None:
    model = tiny(name)
    caches = [model.new_cache(2, 16) if cached else None for _ in range(2)]
    shapes = watched(model)
    for ids in (IDS[:, :4], IDS[:, 4:]) if cached else (IDS,):  # the second piece begins where others are
        whole = model.logits(ids, caches[0])
        seen = len(shapes)
        last = model.logits(ids, caches[1], last=True)
        T, C = ids.shape[1], model.config.d_model
        assert shapes[seen:] == [(2, T, C)] * (model.config.n_layer - 1) + [(2, 1, C)]
        assert last.tobytes() == whole[:, -1].tobytes()
    for a, b in zip(*(cache.arrays for cache in caches if cache is not None), strict=True) if cached else ():
        assert a[:, : IDS.shape[1]].tobytes() == b[:, : IDS.shape[1]].tobytes()


def test_rows_of_different_lengths() -> None:
    """The last position of each sequence is that of its own keys."""
    model = tiny("llama")
    caches = [model.new_cache(2, 16) for _ in range(2)]
    for cache in caches:
        model.logits(IDS[:1, :5], cache.row(0))
        model.logits(IDS[1:, :2], cache.row(1))
    whole = model.logits(IDS[:, 5:8], caches[0])
    assert model.logits(IDS[:, 5:8], caches[1], last=True).tobytes() == whole[:, -1].tobytes()
