"""Models that are declared and not yet filled: initialisation, the order of names, configurations and weights that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm import models
from fastlm.models import convert
from fastlm.nn import Declared, initialise

MODELS = Path(__file__).parents[1] / "data" / "models"


def test_initialise():
    config = models.GPTConfig(vocab_size=300, context=8, d_model=64, n_layer=8, n_head=4)
    a, b, c = models.create(config, 1), models.create(config, 1), models.create(config, 2)
    for name, p in a.named_parameters().items():
        np.testing.assert_array_equal(p.data, b.named_parameters()[name].data)
        assert p.ndim == 1 or not np.array_equal(p.data, c.named_parameters()[name].data)
    assert a.token_embedding.weight.data.std() == pytest.approx(0.02, rel=0.05)
    assert a.blocks[3].mlp.down.weight.data.std() == pytest.approx(0.005, rel=0.05)
    np.testing.assert_array_equal(a.final_norm.weight.data, 1)
    before = a.token_embedding.weight.data.copy()
    initialise(a, 5)  # what has values keeps them
    np.testing.assert_array_equal(a.token_embedding.weight.data, before)


def test_parameters_in_order():
    names = list(models.declare("gpt-char").named_parameters())
    assert names[:3] == ["token_embedding.weight", "position_embedding.weight", "blocks.0.attention_norm.weight"]
    assert names[-1] == "final_norm.weight"


def raw(name):
    return json.loads((MODELS / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied", "llama-bias"])
def test_config_round_trip(name):
    module = models.ARCHITECTURES[raw(name)["model_type"]]
    config = convert.config_from_hf(module, raw(name))
    assert convert.config_from_hf(module, convert.config_to_hf(module, config)) == config


def test_config_refuses():
    with pytest.raises(
        ValueError, match=r"unknown key 'experts' = 8; unknown key 'n_heads' = 3; 'hidden_act' must be 'silu', got 'relu'"
    ):
        convert.config_from_hf(models.llama, raw("llama") | {"experts": 8, "n_heads": 3, "hidden_act": "relu"})
    with pytest.raises(ValueError, match="auto_map"):
        convert.config_from_hf(models.gpt, raw("gpt2") | {"auto_map": {"AutoModel": "x.y"}})
    with pytest.raises(ValueError, match="'activation_function' must be one of gelu_new"):
        convert.config_from_hf(models.gpt, raw("gpt2") | {"activation_function": "swish"})
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        convert.config_from_hf(models.gpt, raw("gpt2") | {"scale_attn_by_inverse_layer_idx": True})
    for bad in (
        {"n_layer": 10**9},
        {"n_embd": -4},
        {"n_head": "3"},
        {"n_embd": 36.0},
        {"layer_norm_epsilon": float("nan")},
        {"n_embd": 37},
    ):
        with pytest.raises(ValueError, match=r"n_layer|d_model|n_head|eps"):
            models.declare(convert.config_from_hf(models.gpt, raw("gpt2") | bad))
    with pytest.raises(ValueError, match="rope_type"):
        models.declare(convert.config_from_hf(models.llama, raw("llama") | {"rope_scaling": {"rope_type": "su", "factor": 2}}))


@pytest.mark.parametrize(
    ("keys", "base", "scaling"),
    [
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 700.0}}, 700.0, None),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}, 7.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}, "rope_theta": 9.0}, 70.0, None),
        (
            {"rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
            10000.0,
            {"type": "linear", "factor": 3.0},
        ),
    ],
)
def test_where_the_rope_base_stands(keys, base, scaling):
    """As transformers 5 reads it: within the parameters before beside them, and of two sets of parameters the older name's alone."""
    given = {k: v for k, v in raw("llama").items() if not k.startswith("rope_")}
    config = convert.config_from_hf(models.llama, given | keys)
    assert (config.rope_base, config.rope_scaling) == (base, scaling)
    with pytest.raises(ValueError, match=r"\[config\] rope_scaling must be a mapping, got 'linear'"):
        models.declare(convert.config_from_hf(models.llama, given | {"rope_parameters": "linear"}))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_where_the_share_of_turned_dimensions_stands(key):
    given = {"hidden_size": 32, "num_attention_heads": 2, key: {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert convert.config_from_hf(models.phi3, given).rotary == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "head_dim must be at least 4 with .*'dynamic', got 2",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 16,
                }
            },
            r"low_freq_factor must be at most high_freq_factor = 1\.0, got 4\.0",
        ),
    ],
)
def test_rope_that_means_nothing(change, message):
    with pytest.raises(ValueError, match=message):
        models.declare(models.preset("llama-7b", n_layer=1, **change))


def test_weights_refused_in_one_error():
    config = convert.config_from_hf(models.gpt, raw("gpt2"))
    model = models.declare(config)
    theirs = {
        n: np.zeros(p.shape[::-1] if n.endswith(tuple(models.gpt.HF_TRANSPOSED)) else p.shape, np.float32)
        for n, p in model.named_parameters().items()
    }
    from fastlm.models.base import names

    tensors = {t: theirs[o] for o, t in names(models.gpt.HF_NAMES, model).items()}
    del tensors["transformer.ln_f.bias"], tensors["transformer.wpe.weight"]
    tensors["transformer.h.9.ln_1.bias"] = np.zeros(36, np.float32)
    tensors["transformer.h.1.ln_1.bias"] = np.zeros(35, np.float32)
    tensors["transformer.h.2.ln_1.bias"] = np.zeros(36, np.int32)
    tensors["transformer.h.0.attn.bias"] = np.zeros((1, 1, 48, 48), np.uint8)  # the causal mask of older files
    with pytest.raises(ValueError) as error:
        convert.load_tensors(model, tensors, models.gpt.HF_NAMES, models.gpt.HF_TRANSPOSED, models.gpt.HF_IGNORED_TENSORS)
    message = str(error.value)
    assert "2 missing: transformer.wpe.weight, transformer.ln_f.bias" in message
    assert "1 misshapen: transformer.h.1.ln_1.bias (expected (36,), got (35,))" in message
    assert "1 extra: transformer.h.9.ln_1.bias" in message
    assert "transformer.h.2.ln_1.bias (int32)" in message
    assert isinstance(model.final_norm.weight.data, Declared)  # nothing was put in
