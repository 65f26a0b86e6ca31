from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm.nn import Attention, FusedAttention, GatedMLP, Module, Rope, initialise, parameter, rope_scaling
from fastlm.nn.rope import DynamicScaling

GOLDEN = Path(__file__).parent.parent / "data" / "rope_scaling.npz"


class Pair(Module):
    def __init__(self):
        self.b = parameter(2, 3, std=1.0)
        self.parts_ = [GatedMLP(3, 4), GatedMLP(3, 4)]
        self.number = 5
        self.a = parameter(3, value=1.0)


def test_names_are_in_the_order_of_definition():
    names = list(Pair().named_parameters())
    assert names == ["b"] + [f"parts_.{i}.{p}.weight" for i in (0, 1) for p in ("gate", "up", "down")] + ["a"]


def test_seeds_are_64_bits():
    """Those from 2^63 on went through float64, so that neighbours drew the same and the last ones what the platform makes of them;
    larger ones were an OverflowError, and fractions were cut off."""

    def drawn(seed):
        module = Pair()
        initialise(module, seed)
        return b"".join(p.data.tobytes() for p in module.named_parameters().values())

    assert len({drawn(seed) for seed in (0, 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 2, (1 << 64) - 1)}) == 6
    assert drawn(-1) == drawn((1 << 64) - 1)
    assert drawn(np.uint64(1 << 63)) == drawn(1 << 63) == drawn(-(1 << 63))
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ValueError, match=rf"\[create\] seed must be an integer of 64 bits, got {seed}"):
            drawn(seed)
    for seed in (1.5, None, "1", True):
        with pytest.raises(TypeError, match=rf"\[create\] seed must be an integer of 64 bits, got {seed!r}"):
            drawn(seed)


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


@pytest.mark.parametrize("name", json.loads(str(np.load(GOLDEN)["cases"])))
def test_rope_scaling(name):
    """Frequencies and factors of transformers."""
    golden = np.load(GOLDEN)
    case = json.loads(str(golden["cases"]))[name]
    given = dict(case["scaling"])
    scaling = rope_scaling(given, given.pop("max_position_embeddings", 131072))
    np.testing.assert_allclose(scaling.frequencies(case["base"], case["dim"], case["n_positions"]), golden[name], rtol=1e-6)
    assert scaling.magnitude == pytest.approx(float(golden[name + "/factor"]), rel=1e-12)


def test_rope_scaling_with_keys_left_out():
    """As the reference fills them in: the original context is the model's, yarn's null factor what lies between the two."""
    bands = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rope_scaling(bands, 64) == rope_scaling(bands | {"original_max_position_embeddings": 64}, 64)
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert rope_scaling(yarn | {"factor": None}, 64) == rope_scaling(yarn | {"factor": 4.0}, 64)
    both = {"mscale": 0.7, "mscale_all_dim": 0.0}  # one alone says nothing
    assert rope_scaling(yarn | {"factor": 4.0} | both, 64).magnitude == rope_scaling(yarn | {"factor": 4.0}, 64).magnitude


def test_rope_scaling_refuses():
    for parameters, message in (
        ({"rope_type": "su"}, "rope_type must be one of default, linear, dynamic, yarn, llama3, factors, got 'su'"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"type": "linear", "factor": 2, "beta": 1}, "does not know beta"),
        ({"rope_type": "yarn"}, "needs factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": -1.0}, "mscale must be a positive number"),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 0}, "needs factor"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor must be a positive number"),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_scaling(parameters, 64)
