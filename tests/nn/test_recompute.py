"""Recomputation: the same bits of loss and gradients for less memory, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import backend, models, nn
from fastlm.models.gpt1 import GPT1Config
from fastlm.models.llama import LlamaConfig
from fastlm.models.mixtral import MixtralConfig
from fastlm.models.palm import PaLMConfig
from fastlm.nn.recompute import Recomputed
from fastlm.tensor import no_grad
from fastlm.train import train

SIZES = {"vocab_size": 300, "context": 64, "d_model": 96, "n_layer": 4, "n_head": 4}
CONFIGS = {
    "gpt2": models.GPTConfig(**SIZES),
    "llama": LlamaConfig(**SIZES, d_ff=160, n_kv_head=2, head_dim=24, tied=True),
    "gpt1": GPT1Config(**SIZES),  # its blocks read their input without a norm
    "palm": PaLMConfig(**SIZES, d_ff=160, head_dim=24),
}


def step(model, ids):
    """Loss, gradients by name, and the most memory at once."""
    model.zero_grad()
    backend.reset_peak()
    before = backend.memory()["live"]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {k: p.grad.copy() for k, p in model.named_parameters().items()}, backend.memory()["peak"] - before


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_and_memory(name):
    model = models.create(CONFIGS[name])
    ids = np.random.default_rng(0).integers(0, 300, (16, 65), dtype=np.int32)
    loss, gradients, peak = step(model, ids)
    names = list(model.named_parameters())
    assert nn.recompute(model) is model
    assert list(model.named_parameters()) == names
    again, recomputed, less = step(model, ids)
    assert again == loss
    for k, g in gradients.items():
        assert g.tobytes() == recomputed[k].tobytes(), k
    assert less < 0.7 * peak
    with no_grad():
        assert model.loss(ids[:, :-1], ids[:, 1:]).item() == loss
    nn.recompute(model, False)
    assert not any(isinstance(b, Recomputed) for b in model.blocks)


def test_training_has_the_same_bits():
    text = np.random.default_rng(0).integers(0, 300, 2000)
    runs = []
    for on in (False, True):
        model = models.create(CONFIGS["gpt2"])
        steps = list(train(model, text, steps=4, batch=4, context=64, accumulate=2, recompute=on))
        runs.append(([s.loss for s in steps], [p.data.tobytes() for p in model.named_parameters().values()]))
        assert all(s.memory > 0 for s in steps)
    assert runs[0] == runs[1]


def test_refuses():
    with pytest.raises(ValueError, match=r"\[recompute\] model must have blocks, RMSNorm has none"):
        nn.recompute(nn.RMSNorm(4))
    sizes = {"vocab_size": 50, "context": 8, "d_model": 16, "d_ff": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 2}
    experts = models.create(MixtralConfig(**sizes, n_expert=4, n_expert_used=2))
    with pytest.raises(ValueError, match=r"\[recompute\] blocks must have no experts"):
        nn.recompute(experts).loss(np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int32))
