"""Plans: the arithmetic against sums by hand and published figures, layouts that fit, one step of every wiring made small."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastlm import models
from fastlm.cli import main
from fastlm.cli.plan import quantity, step
from fastlm.models import plan
from fastlm.models.encoder import Encoder
from fastlm.nn import Declared, count_parameters

GIANTS = {"megatron-turing-530b": 2240, "palm-540b": 6144, "glam-1.2t": 1024, "gpt4-like": 3840}


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
    banded = plan.Shape(0, 0, 0, 1, 1, (plan.Scores(heads=1, cache=2, window=3),), 0)
    seen = [min(t + 1, 3) for t in range(10)]
    assert plan.flops(banded, 10) == pytest.approx(4 * np.mean(seen))
    bert = plan.shape_of("bert-base-uncased")
    assert plan.cache_bytes(bert, 512) == 0
    assert (bert.multiplied, bert.pooled) == (12 * 12 * 768 * 768, 768 * 768)  # a pooler, for one token of a sequence
    assert plan.flops(bert, 512) == 2 * (bert.multiplied + 768 * 768 / 512) + 12 * 4 * 768 * 512
    task = plan.shape_of_model(models.declare(models.preset("roberta-base", head="sequence_classification")))
    assert (task.multiplied, task.pooled) == (bert.multiplied, 768 * 768 + 2 * 768)


def test_glam():
    """1.2T parameters, 96.6B of them active, as published (Du et al. 2022), which counts matrices alone."""
    shape = plan.shape_of("glam-1.2t")
    assert round(shape.total / 1e8) / 10 == 1161.8
    assert round(shape.multiplied / 1e6) / 1000 == 96.603
    assert round(shape.active / 1e8) / 10 == 96.6


# What was counted by running the reference, or follows from the papers' sizes: (preset, head): total.
COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "palm-8b": 8_631_877_632,
    "palm-62b": 62_495_129_600,
    "palm-540b": 540_354_281_472,
    "glam-64b-64e": 1_161_756_418_048,
    "mixtral-8x7b": 46_702_792_704,
    "megatron-turing-530b": 529_581_506_560,
    "xlnet-base-cased": 116_750_336,
    "xlnet-large-cased": 360_300_800,
    "bert-base-uncased": 109_482_240,
    "bert-base-uncased masked_lm": 109_514_298,
    "bert-large-uncased": 335_141_888,
    "roberta-base masked_lm": 124_697_433,
    "roberta-large masked_lm": 355_412_057,
    "distilbert-base-uncased": 66_362_880,
    "distilbert-base-uncased masked_lm": 66_985_530,
    "albert-base-v2": 11_683_584,
    "electra-small": 13_483_008,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "switch-base-8": 619_339_008,
    "switch-large-128": 26_309_291_008,
    "switch-c-2048": 1_571_308_972_448,
}


@pytest.mark.parametrize("name", COUNTS)
def test_exact_counts(name):
    preset, _, head = name.partition(" ")
    model = models.declare(models.preset(preset, head=head) if head else preset)
    assert all(isinstance(p.data, Declared) for p in model.named_parameters().values()), "something was allocated"
    assert plan.shape_of_model(model).total == count_parameters(model) == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in models.PRESETS if name != "switch-c-2048"])
def test_every_preset(name):
    """What must hold between the numbers of a plan; the layout multiplies to the devices and divides the heads."""
    shape = plan.shape_of(name)
    config = models.PRESETS[name]
    module = models.module_of(config)
    assert shape.multiplied > 0
    assert shape.active <= shape.total
    assert (shape.active < shape.total) == (shape.n_expert > 1)
    assert shape.n_layer == config.n_layer + getattr(config, "n_encoder_layer", 0)
    assert plan.flops(shape, shape.usual_context) > 2 * shape.multiplied
    assert shape.kept > shape.n_layer * 8 * config.d_model
    assert (plan.cache_bytes(shape, 100) > 0) == (not issubclass(module.Model, Encoder))
    training = plan.training_bytes(shape, shape.usual_context)
    assert training.keys() == {"weights", "gradients", "optimiser", "activations"}
    assert min(training.values()) > 0
    assert plan.inference_bytes(shape, 100)["weights"] == 2 * shape.total
    for devices in (8, 48, 1024, 6144):
        found = plan.layout(shape, devices, min(shape.usual_context, 4096), 80e9)
        if found is not None:
            assert found.tensor * found.pipeline * found.data == devices
            assert shape.n_head % found.tensor == 0
            assert found.pipeline <= shape.n_layer


def test_layers_are_divided_evenly():
    """105 layers: 35 stages of 3, not 16 of unequal length, where both fit."""
    shape = plan.shape_of("megatron-turing-530b")
    assert shape.n_layer % plan.layout(shape, 280 * 8, 2048, 80e9).pipeline == 0
    assert plan.layout(shape, 16, 2048, 1e15).pipeline == 1


def test_shared_layers():
    """ALBERT: parameters once, products and activations for each of its 12 layers."""
    albert, bert = plan.shape_of("albert-base-v2"), plan.shape_of("bert-base-uncased")
    assert albert.multiplied == bert.multiplied + 128 * 768
    assert (albert.n_layer, albert.kept, albert.attention) == (12, bert.kept, bert.attention)


def test_xlnet():
    """Three products of a score's size, memories of hidden states, five matrices in attention."""
    shape, d = plan.shape_of("xlnet-base-cased"), 768
    assert shape.multiplied == 12 * 13 * d * d + 32000 * d
    assert plan.flops(shape, 512) == 2 * shape.multiplied + 12 * 6 * d * 512
    assert plan.cache_bytes(shape, 512) == 12 * 512 * d * 2


def test_encoder_decoder():
    """T5: layers of both stacks; cached are the decoder's keys and values, and those of the source."""
    shape, d = plan.shape_of("t5-base"), 768
    assert (shape.n_layer, len(shape.attention)) == (24, 36)
    assert shape.multiplied == 12 * (12 + 16) * d * d + 32128 * d
    assert plan.cache_bytes(shape, 512) == 12 * 2 * 2 * 512 * d * 2
    assert plan.flops(shape, 512) == 2 * shape.multiplied + 24 * 4 * d * 512 + 12 * 4 * d * 513 / 2
    switch = plan.shape_of("switch-base-8")
    assert switch.multiplied == shape.multiplied + 12 * 8 * d  # the routers
    assert switch.experts == 12 * 8 * 2 * d * 3072


def test_guess(capsys):
    """The plan of what nobody has published says so."""
    assert main(["plan", "gpt4-like", "--layers", "2", "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert "a guess, not GPT-4" in out
    assert "undisclosed" in out
    shape = plan.shape_of("gpt4-like")
    assert shape.active < shape.total / 5


@pytest.mark.parametrize(("name", "devices"), GIANTS.items())
def test_layouts_of_giants(name, devices):
    shape = plan.shape_of(name)
    found = plan.layout(shape, devices, shape.usual_context, 80e9)
    assert found.tensor * found.pipeline * found.data == devices
    assert found.bytes <= 0.9 * 80e9
    whole = plan.place(shape, shape.usual_context, 1, 1, devices)
    assert whole.bytes > 80e9  # it had to be cut up
    assert plan.layout(shape, 8, shape.usual_context, 80e9) is None
    fewest = plan.fewest_devices(shape, shape.usual_context, 80e9)
    assert plan.layout(shape, fewest, shape.usual_context, 80e9) is not None
    assert plan.layout(shape, fewest - 8, shape.usual_context, 80e9) is None


def test_published_layout_of_megatron():
    """8-way tensor, 35-way pipeline (Smith et al. 2022): 3 layers a stage, in 80 GB with room to spare."""
    shape = plan.shape_of("megatron-turing-530b")
    found = plan.place(shape, 2048, 8, 35, 8)
    assert found.memory["weights"] == pytest.approx(2 * shape.total / 280)
    assert found.bytes < 40e9


@pytest.mark.parametrize("name", models.PRESETS)
def test_reduced_wiring(name):
    """Two layers of width 64 of every preset."""
    config = plan.reduced(models.PRESETS[name], 2, 64)
    assert (config.n_layer, config.d_model) == (2, 64)
    assert count_parameters(models.declare(config)) < 3_000_000
    assert "nan" not in step(name, 2, 64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "15"], "width must be a multiple of 16, got 15"),
        (["--layers", "11000"], "n_layer must be an integer from 1 to 10000, got 11000"),
        (["--width", "8192"], "a step here is for small models, got .* parameters"),
    ],
)
def test_a_step_that_cannot_be_is_refused_first(options, message, capsys):
    """The report was printed before."""
    assert main(["plan", "gpt2", *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"fastlm: .*{message}.*\n", error)


def test_command(capsys):
    assert main(["plan", "palm-540b", "--devices", "6144", "--context", "2048", "--layers", "2", "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert "540,354,281,472 in all, 540,354,281,472 active" in out
    assert "6,144 devices" in out
    assert "2 layers, width 64" in out
    assert main(["plan", "palm-540b", "--devices", "8"]) == 0
    assert "none fits 8 devices of 80GB; the fewest that will do:" in capsys.readouterr().out
    assert main(["plan", "qwen2.5-7b"]) == 0  # activations of 131,072 tokens, which 28 heads do not split
    assert (
        "none fits 8 devices of 80GB; no number of devices up to 65,536 will do: give a shorter --context"
        in capsys.readouterr().out
    )
    assert main(["plan", "gpt2-xl", "--memory", "1", "--context", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-5"], "preset must be one of"),
        (["LLaMA3-8B"], "got 'LLaMA3-8B'. The nearest: llama-3-8b"),
        (["palm"], "got 'palm'. The nearest: palm-8b, palm-62b, palm-540b."),
        (["zzzz"], "got 'zzzz'.\n"),
        (["gpt2", "--context", "2048"], "context must be at most 1,024"),
        (["gpt2", "--width", "50"], "width must be a multiple of 16, got 50"),
        (["palm-540b", "--layers", "2"], "a step here is for small models"),
    ],
)
def test_refuses(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_quantity():
    assert [quantity(x) for x in (0, 999, 1234, 999_600, 5.4e11)] == ["0", "999", "1.23K", "1M", "540G"]
