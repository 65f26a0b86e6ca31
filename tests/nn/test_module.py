from __future__ import annotations

import numpy as np
import pytest

from fastlm.nn import Attention, FusedAttention, GatedMLP, Module, Rope, initialise, parameter, rope_scaling
from fastlm.nn.rope import DynamicScaling


class Pair(Module):
    def __init__(self):
        self.b = parameter(2, 3, std=1.0)
        self.parts_ = [GatedMLP(3, 4), GatedMLP(3, 4)]
        self.number = 5
        self.a = parameter(3, value=1.0)


def test_names_are_in_the_order_of_definition():
    names = list(Pair().named_parameters())
    assert names == ["b"] + [f"parts_.{i}.{p}.weight" for i in (0, 1) for p in ("gate", "up", "down")] + ["a"]


def test_freeze_and_train():
    model = Pair()
    initialise(model)
    model.a.grad_buffer()[:] = 3
    model.zero_grad()
    assert model.a.grad is None
    assert model.freeze() is model
    assert model.a.grad is None
    assert not any(p.requires_grad for p in model.named_parameters().values())
    shared = np.ones(3, np.float32)
    shared.flags.writeable = False
    model.a.data = shared
    model.train()
    assert all(p.requires_grad and p.data.flags.writeable for p in model.named_parameters().values())


def test_attention_refuses():
    with pytest.raises(ValueError, match=r"n_head must be a multiple of n_kv_head, got 6 and 4"):
        Attention(48, 6, 4)
    with pytest.raises(ValueError, match=r"d_model must be a multiple of n_head, got 50 and 6"):
        FusedAttention(50, 6)
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        Rope(5)


def test_rope_tables_grow():
    rope = Rope(8)
    few = rope.tables(10)[0][:10].copy()
    cos, sin = rope.tables(5000)
    assert len(cos) >= 5000
    np.testing.assert_array_equal(cos[:10], few)
    np.testing.assert_allclose(cos.astype(np.float64) ** 2 + sin.astype(np.float64) ** 2, 1, atol=1e-6)
    assert rope.tables(20)[0] is cos


def test_rope_turns_a_part():
    """15 of 20 dimensions are 8 pairs, with the frequencies of 15, as Phi-3 has them."""
    rope = Rope(20, turned=15)
    angles = np.arange(9)[:, None] * 10000.0 ** -(np.arange(0, 15, 2) / 15)
    np.testing.assert_allclose(rope.tables(9)[0][:9], np.cos(angles), atol=1e-6)
    with pytest.raises(ValueError, match="turned must be from 1 to head_dim = 15, and one less where that is odd, got 15"):
        Rope(15, turned=15)


def test_dynamic_rope_follows_the_length():
    rope = Rope(8, scaling=DynamicScaling(4.0, 64))
    short = rope.tables(64)[0][:64].copy()
    long = rope.tables(128)[0][:64].copy()
    assert not np.array_equal(short, long)
    np.testing.assert_array_equal(rope.tables(64)[0][:64], short)
    np.testing.assert_array_equal(Rope(8).tables(64)[0][:64], short)


def test_rope_scaling_refuses():
    for parameters, message in (
        ({"rope_type": "su"}, "rope_type must be one of default, linear, dynamic, yarn, llama3, factors, got 'su'"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"type": "linear", "factor": 2, "beta": 1}, "does not know beta"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor must be a positive number"),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_scaling(parameters, 64)
