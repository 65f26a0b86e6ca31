"""Models in other storage: quantised in place, bfloat16, 8-bit activations; every kind of model."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest

import fastlm
from fastlm import _C, LM, models
from fastlm.checkpoint import QuantizedArray
from fastlm.checkpoint.quantized import MADE, quantize
from fastlm.cli import main
from fastlm.models import ARCHITECTURES, PRESETS
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.models.plan import reduced
from fastlm.models.quantize import matrices

FIRST = {module.HF_TYPE: next(iter(module.PRESETS)) for module in ARCHITECTURES.values() if module.PRESETS}
EVERY = pytest.mark.parametrize("name", FIRST.values(), ids=FIRST.keys())


def small(name: str) -> LM:
    config = reduced(PRESETS[name], 2, 64)
    if getattr(config, "d_ff", None) is not None:
        config = dataclasses.replace(config, d_ff=128)
    return LM(models.create(config, seed=3))


def outputs(lm: LM) -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, 200, (2, 9), dtype=np.int32)
    if isinstance(lm.model, EncoderDecoder):
        return lm.logits(ids, ids[:, :4])
    return lm.model.states(ids) if isinstance(lm.model, Encoder) else lm.logits(ids)


def kinds(lm: LM) -> dict[str, str]:
    return {name: str(p.dtype) for name, p in lm.model.named_parameters().items()}


@EVERY
def test_every_model(name):
    """Each linear layer and the token embedding in gguf's own bytes; float32 activations give the bits of the dequantised model."""
    lm = small(name)
    before = {n: np.array(p.data) for n, p in lm.model.named_parameters().items()}
    plain = outputs(lm)
    assert lm.quantize("Q8_0") is lm
    found = dict(matrices(lm.model))
    assert found
    for n, p in lm.model.named_parameters().items():
        if n in found and p.shape[-1] % 32 == 0:
            want = gguf.quants.quantize(before[n].reshape(-1, p.shape[-1]), gguf.GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(p.data.blocks, want)
        else:
            assert p.dtype == np.float32, n
            np.testing.assert_array_equal(p.data, before[n])
    assert any(isinstance(p.data, QuantizedArray) for p in found.values())
    quantised = outputs(lm)
    lm.activations = "int8"
    assert lm.activations == "int8"
    rounded = outputs(lm)
    scale = np.abs(plain).max()
    assert 0 < np.abs(rounded - quantised).max() <= 0.1 * scale
    assert np.abs(quantised - plain).max() <= 0.1 * scale
    lm.activations = "float32"
    np.testing.assert_array_equal(outputs(lm), quantised)
    for p in lm.model.named_parameters().values():
        if isinstance(p.data, QuantizedArray):
            p.data = p.data.dequantize()
    np.testing.assert_array_equal(outputs(lm), quantised)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_generation_alone_and_in_a_list(kind, activations, threads):
    if (kind, activations) in (("Q8_ROW", "float32"), ("LOSSLESS", "int8")):
        pytest.skip("it has no such form")
    lm = small("gpt2").quantize(kind, activations)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20], [100, 3, 50, 7]]
    together = lm.generate_ids(prompts, max_tokens=12)
    for n in (1, 3):
        _C.set_num_threads(n)
        assert [lm.generate_ids(p, max_tokens=12) for p in prompts] == together


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_loss(name, dtype, tmp_path):
    """Every bit of the logits, of the weights when they come back, and of the file that is saved."""
    lm, plain = small(name).to(dtype), small(name).to(dtype)
    assert lm.quantize("LOSSLESS") is lm
    packed = {n: p.data for n, p in lm.model.named_parameters().items() if p.dtype == "LOSSLESS"}
    assert packed
    assert set(packed) <= set(dict(matrices(lm.model)))
    for n, p in plain.model.named_parameters().items():
        if n in packed:
            np.testing.assert_array_equal(packed[n].plain().view(np.uint8), np.ascontiguousarray(p.data).view(np.uint8))
        else:
            np.testing.assert_array_equal(lm.model.named_parameters()[n].data, p.data)
    np.testing.assert_array_equal(outputs(lm), outputs(plain))
    lm.save(tmp_path / "packed")
    plain.save(tmp_path / "plain")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(ValueError, match="multiplied with float32 activations alone"):
        lm.activations = "int8"
    lm.to(dtype)
    assert {str(p.dtype) for p in lm.model.named_parameters().values() if p.ndim > 1} == {dtype}
    np.testing.assert_array_equal(outputs(lm), outputs(plain))


def test_what_cannot_be_packed_stays():
    """A matrix whose exponents are too many, beside others that are packed."""
    lm = small("gpt2")
    weight = lm.model.blocks[0].mlp.up.weight
    weight.data = np.ldexp(weight.data, np.random.default_rng(0).integers(-60, 0, weight.shape)).astype(np.float32)
    before = outputs(lm)
    lm.quantize("LOSSLESS")
    assert weight.dtype == np.float32
    assert lm.model.blocks[1].mlp.up.weight.dtype == "LOSSLESS"
    np.testing.assert_array_equal(outputs(lm), before)
    with pytest.raises(ValueError, match="multiplied with float32 activations alone, got 'int8'"):
        lm.quantize("LOSSLESS", activations="int8")


def test_tied_head_is_one_matrix():
    lm = small("gpt2")
    assert lm.model.head is None
    lm.quantize("Q4_1")
    assert lm.model.token_embedding.weight.data.kind == "Q4_1"
    assert lm.model.position_embedding.weight.dtype == np.float32
    assert "Q4_1+float32" in repr(lm)


def test_other_storage():
    lm = small("gpt2")
    names = [n for n, p in lm.model.named_parameters().items() if p.ndim > 1]
    lm.to("bfloat16")
    assert {kinds(lm)[n] for n in names} == {"bfloat16"}
    lm.quantize("Q8_0", activations="int8").quantize("Q4_0")
    assert lm.activations == "int8"
    assert set(kinds(lm).values()) == {"Q4_0", "bfloat16", "float32"}
    lm.to("float32")
    assert set(kinds(lm).values()) == {"float32"}
    assert lm.activations == "float32"
    lm.model.train()


def test_saved_as_float32(tmp_path):
    lm = small("gpt2").quantize("Q8_0")
    lm.save(tmp_path / "model")
    again = fastlm.load(tmp_path / "model")
    assert set(kinds(again).values()) == {"float32"}
    np.testing.assert_array_equal(outputs(again), outputs(lm))


def test_refuses(tmp_path):
    lm = small("gpt2")
    with pytest.raises(ValueError, match=r"int8 activations need quantised weights: call lm.quantize"):
        lm.activations = "int8"
    with pytest.raises(ValueError, match="must be 'float32' or 'int8', got 'int4'"):
        lm.activations = "int4"
    with pytest.raises(ValueError, match="kind must be one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_ROW, LOSSLESS, got 'q8'"):
        lm.quantize("q8")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'Q8_0'"):
        lm.to("Q8_0")
    lm.model.blocks[0].mlp.up.weight.data[5, 3] = np.nan
    before = {name: p.data for name, p in lm.model.named_parameters().items()}
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up.weight: every number must be finite.* row 5"):
        lm.quantize("Q8_0")
    assert all(p.data is before[name] for name, p in lm.model.named_parameters().items())  # none is lost
    lm.model.blocks[0].mlp.up.weight.data[5, 3] = 1.0
    lm.model.blocks[-1].mlp.down.weight.data[2, 7] = 1e8  # over 127 it is more than float16 holds
    before = {name: (p.data, p.data.copy(), p.requires_grad) for name, p in lm.model.named_parameters().items()}
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        with pytest.raises(
            ValueError, match=r"blocks.\d.mlp.down.weight: .* scale at most 65504, row 2 has others\. Nothing was quantised"
        ):
            lm.quantize(kind)
        for name, p in lm.model.named_parameters().items():
            data, numbers, wants = before[name]
            assert p.data is data
            assert p.requires_grad == wants
            np.testing.assert_array_equal(p.data, numbers)
    assert lm.quantize("LOSSLESS").model.blocks[-1].mlp.down.weight.data.dtype == "LOSSLESS"
    before = {name: p.data for name, p in lm.model.named_parameters().items()}
    with pytest.raises(ValueError, match=r"mlp.down.weight: .* row 2 has others"):  # of quantised ones it is found out later
        lm.quantize("Q8_0")
    assert all(p.data is before[name] for name, p in lm.model.named_parameters().items())
    lm = LM(models.create(models.preset("gpt2", n_layer=1, d_model=48, n_head=3, vocab_size=100, d_ff=80), seed=0))
    with pytest.raises(ValueError, match="no matrix whose rows are a multiple of 32"):
        lm.quantize("Q8_0")
    lm = small("gpt2")
    lm.save(tmp_path / "model")
    with pytest.raises(ValueError, match="need quantised weights"):
        fastlm.load(tmp_path / "model", activations="int8")
    with pytest.raises(TypeError, match="training needs float32"):
        lm.quantize("Q8_0").model.train()


def test_command_line(capsys):
    folder = __file__
    assert main(["generate", folder, "a", "--quantize", "Q8_0"]) != 0
    assert "other files are not loaded" in capsys.readouterr().err


def test_what_reads_one_input_shares_its_columns():
    """Of Q8_ROW weights those of queries, keys and values have the values' columns, a gate has those of what it gates; others their own."""
    lm = small(FIRST["llama"])
    model = lm.model
    own = {name: quantize(p.data, "Q8_ROW").columns for name, p in model.named_parameters().items() if p.ndim == 2}
    lm.quantize("Q8_ROW")
    block = model.blocks[0]
    for part, of in (("q", "v"), ("k", "v"), ("v", "v"), ("out", "out")):
        np.testing.assert_array_equal(getattr(block.attention, part).weight.data.columns, own[f"blocks.0.attention.{of}.weight"])
    for part, of in (("gate", "up"), ("up", "up"), ("down", "down")):
        np.testing.assert_array_equal(getattr(block.mlp, part).weight.data.columns, own[f"blocks.0.mlp.{of}.weight"])
