"""Plans: the arithmetic against sums by hand and published figures, layouts that fit, one step of every wiring made small."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import models
from fastlm.cli import main
from fastlm.cli.plan import quantity, step
from fastlm.models import plan
from fastlm.models.base import CausalLM
from fastlm.nn import count_parameters

GIANTS = {"megatron-turing-530b": 2240, "palm-540b": 6144, "glam-1.2t": 1024}


def test_sums_by_hand():
    """GPT-2: 12 layers of 12 d^2, a tied head; half of all pairs are seen."""
    shape, d = plan.shape_of("gpt2"), 768
    assert shape.total == shape.active == 124_439_808
    assert shape.multiplied == 12 * 12 * d * d + 50257 * d
    assert plan.flops(shape, 1024) == 2 * shape.multiplied + 12 * 4 * d * (1024 + 1) / 2
    assert plan.cache_bytes(shape, 1000) == 12 * 2 * 1000 * d * 2
    assert shape.kept == 12 * 16 * d  # norms 2, qkv 3, heads 1, out 1, up 4, its activation 4, down 1
    assert plan.training_bytes(shape, 100) == {
        "weights": 2 * shape.total,
        "gradients": 2 * shape.total,
        "optimiser": 12 * shape.total,
        "activations": 2 * 100 * shape.kept,
    }


def test_windows_and_groups():
    mistral = plan.shape_of("mistral-7b")
    assert plan.cache_bytes(mistral, 32768) == 32 * 2 * 4096 * (8 * 128) * 2  # no more than the window
    assert plan.cache_bytes(plan.shape_of("palm-540b"), 2048) == 118 * 2 * 2048 * 256 * 2  # one key/value head
    banded = plan.Shape(0, 0, 0, 1, 1, (plan.Scores(heads=1, kv=1, window=3),), 0)
    seen = [min(t + 1, 3) for t in range(10)]
    assert plan.flops(banded, 10) == pytest.approx(4 * np.mean(seen))
    bert = plan.shape_of("bert-base-uncased")
    assert plan.cache_bytes(bert, 512) == 0
    assert plan.flops(bert, 512) == 2 * bert.multiplied + 12 * 4 * 768 * 512


def test_glam():
    """1.2T parameters, 96.6B of them active, as published (Du et al. 2022)."""
    shape = plan.shape_of("glam-1.2t")
    assert round(shape.total / 1e8) / 10 == 1161.8
    assert round(shape.active / 1e6) / 1000 == 96.603


@pytest.mark.parametrize(("name", "devices"), GIANTS.items())
def test_layouts_of_giants(name, devices):
    shape = plan.shape_of(name)
    found = plan.layout(shape, devices, shape.context, 80e9)
    assert found.tensor * found.pipeline * found.data == devices
    assert found.bytes <= 0.9 * 80e9
    whole = plan.place(shape, shape.context, 1, 1, devices)
    assert whole.bytes > 80e9  # it had to be cut up
    assert plan.layout(shape, 8, shape.context, 80e9) is None
    fewest = plan.fewest_devices(shape, shape.context, 80e9)
    assert plan.layout(shape, fewest, shape.context, 80e9) is not None
    assert plan.layout(shape, fewest - 8, shape.context, 80e9) is None


def test_published_layout_of_megatron():
    """8-way tensor, 35-way pipeline (Smith et al. 2022): 3 layers a stage, in 80 GB with room to spare."""
    shape = plan.shape_of("megatron-turing-530b")
    found = plan.place(shape, 2048, 8, 35, 8)
    assert found.memory["weights"] == pytest.approx(2 * shape.total / 280)
    assert found.bytes < 40e9


@pytest.mark.parametrize("name", [n for n, c in models.PRESETS.items() if issubclass(models.module_of(c).Model, CausalLM)])
def test_reduced_wiring(name):
    """Two layers of width 64 of every causal preset."""
    config = plan.reduced(models.PRESETS[name], 2, 64)
    assert (config.n_layer, config.d_model) == (2, 64)
    assert count_parameters(models.declare(config)) < 3_000_000
    assert "nan" not in step(name, 2, 64, 16)


def test_command(capsys):
    assert main(["plan", "palm-540b", "--devices", "6144", "--context", "2048", "--layers", "2", "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert "540,354,281,472 in all, 540,354,281,472 active" in out
    assert "6,144 devices" in out
    assert "2 layers, width 64" in out
    assert main(["plan", "palm-540b", "--devices", "8"]) == 0
    assert "none fits 8 devices of 80GB; the fewest that will do:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-5"], "preset must be one of"),
        (["gpt4-like"], "undisclosed"),
        (["gpt2", "--context", "2048"], "context must be at most 1,024"),
        (["gpt2", "--width", "50"], "width must be a multiple of 16, got 50"),
        (["palm-540b", "--layers", "2"], "a step here is for small models"),
        (["albert-base-v2"], "has layers that the plan cannot count"),
        (["bert-base-uncased", "--layers", "2", "--width", "64"], "a step here is for causal models"),
    ],
)
def test_refuses(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_quantity():
    assert [quantity(x) for x in (0, 999, 1234, 999_600, 5.4e11)] == ["0", "999", "1.23K", "1M", "540G"]
