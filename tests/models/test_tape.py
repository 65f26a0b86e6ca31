"""What the tape saves must not show: the same bits where nothing is overwritten, and where nothing, or all, is computed again."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import backend, models, ops, tensor

SIZES = {"vocab_size": 90, "d_model": 48, "n_layer": 2, "n_head": 4}
CONFIGS = {
    "gpt2": models.GPTConfig(**SIZES, context=32),
    "llama": models.LlamaConfig(**SIZES, context=32, d_ff=80, n_kv_head=2, head_dim=12),
    "mixtral": models.preset("mixtral-8x7b", **SIZES, context=32, d_ff=80, n_kv_head=2, head_dim=12),
    "t5": models.preset("t5-small", **SIZES, d_ff=80, n_encoder_layer=2, head_dim=12),
    "bert": models.preset("bert-base-uncased", **SIZES, context=32, d_ff=80, head="masked_lm"),
    "xlnet": models.preset("xlnet-base-cased", **SIZES, d_ff=80),
}


def gradients(model, name):
    rng = np.random.default_rng(0)
    ids, targets, more = (rng.integers(2, 90, (3, 16)).astype(np.int32) for _ in range(3))
    model.zero_grad()
    for _ in range(2):  # the second pass adds
        loss = model.loss(ids, more, targets) if name == "t5" else model.loss(ids, targets)
        loss.backward()
    return {k: p.grad.tobytes() for k, p in model.named_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_bits(name, monkeypatch):
    model = models.create(CONFIGS[name]).train()
    found = gradients(model, name)
    assert found
    monkeypatch.setattr(tensor, "_alone", lambda d, held: False)
    assert gradients(model, name) == found
    monkeypatch.undo()
    for least in (0, 1 << 40):
        monkeypatch.setattr(tensor, "_REMADE", least)
        assert gradients(model, name) == found


def test_what_an_activation_kept_is_freed_before_the_products():
    """8 MB of its inputs: else they would lie beside the gradients of 4 MB, 8 MB and 2 MB, and what the products work in."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        array = backend.empty(shape)
        array[...] = rng.standard_normal(shape)
        return tensor.Tensor(array, requires_grad=True)

    x, up, down = leaf(1024, 512), leaf(2048, 512), leaf(64, 2048)
    y = ops.linear(ops.linear(x, up, activation="gelu"), down)
    before = backend.memory()["live"]
    backend.reset_peak()
    y.backward(np.ones((1024, 64), np.float32))
    assert backend.memory()["peak"] - before < 18 << 20
