"""Loading and saving folders and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastlm import hub, models
from fastlm.checkpoint import FormatError, QuantizedArray, read_json, read_safetensors, write_json, write_safetensors
from fastlm.models.gguf import scaling_from_gguf
from fastlm.tokenizers import Tokenizer

MODELS = Path(__file__).parents[1] / "data" / "models"
GOLDEN = np.load(MODELS / "logits.npz")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied", "llama-bias"])
def test_save_gives_back_the_bytes(name, tmp_path):
    model, _ = hub.load_folder_or_gguf(MODELS / name)
    hub.save(model, None, tmp_path / "out")
    before, after = read_safetensors(MODELS / name), read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert before[key].tobytes() == after[key].tobytes()
    again, _ = hub.load_folder_or_gguf(tmp_path / "out")
    assert again.config == model.config
    hub.save(again, None, tmp_path / "out")  # over a model: replaced, and the arrays mapped from it stay whole
    np.testing.assert_array_equal(again.logits(np.ones((1, 4), int)), model.logits(np.ones((1, 4), int)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied", "llama-bias"])
def test_transformers_loads_what_is_saved(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, _ = hub.load_folder_or_gguf(MODELS / name)
    hub.save(model, None, tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = GOLDEN[f"{name}.ids"]
    with torch.no_grad():
        want = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.logits(ids), want, rtol=1e-5, atol=1e-5)


def test_without_biases(tmp_path):
    """nanoGPT's bias=False: transformers wants biases, so zeros are written, and left out again when it is loaded."""
    model = models.create(models.GPTConfig(vocab_size=31, context=8, d_model=16, n_layer=2, n_head=2, bias=False), 3)
    hub.save(model, None, tmp_path / "m")
    assert not read_safetensors(tmp_path / "m")["transformer.h.1.mlp.c_fc.bias"].any()
    again, _ = hub.load_folder_or_gguf(tmp_path / "m")
    assert again.config == model.config
    assert list(again.named_parameters()) == list(model.named_parameters())
    np.testing.assert_array_equal(again.logits(np.arange(8)[None]), model.logits(np.arange(8)[None]))
    tensors = dict(read_safetensors(tmp_path / "m"))
    tensors["transformer.h.1.mlp.c_fc.bias"] = np.ones(64, np.float32)
    write_safetensors(tmp_path / "m", tensors)
    with pytest.raises(FormatError, match=r"1 extra: transformer.h.1.mlp.c_fc.bias"):
        hub.load_folder_or_gguf(tmp_path / "m")


def test_bfloat16(tmp_path):
    shutil.copytree(MODELS / "llama", tmp_path / "m")
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in read_safetensors(MODELS / "llama").items()}
    write_safetensors(tmp_path / "m", half)
    model, _ = hub.load_folder_or_gguf(tmp_path / "m")
    assert model.head.weight.dtype == ml_dtypes.bfloat16
    assert model.final_norm.weight.dtype == np.float32
    wide, _ = hub.load_folder_or_gguf(tmp_path / "m", dtype="float32")
    assert wide.head.weight.dtype == np.float32
    ids = GOLDEN["llama.ids"]
    np.testing.assert_array_equal(model.logits(ids), wide.logits(ids))
    with pytest.raises(TypeError, match=r"token_embedding.weight is bfloat16; training needs float32"):
        model.train()
    hub.save(model, None, tmp_path / "out")
    for key, value in read_safetensors(tmp_path / "out").items():
        assert value.tobytes() == half[key].tobytes()
    again, _ = hub.load_folder_or_gguf(MODELS / "llama", dtype="bfloat16")
    assert again.head.weight.dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="dtype must be None, 'float32' or 'bfloat16', got 'int4'"):
        hub.load_folder_or_gguf(MODELS / "llama", dtype="int4")


def test_pad_of_the_model_stays(tmp_path):
    """Positions of RoBERTa begin after its pad id: a tokenizer with another one must not move them."""
    tokenizer = Tokenizer.train_bpe(["hello there " * 9], 270).with_special({"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]"})
    sizes = {"context": 300, "d_model": 8, "n_layer": 1, "n_head": 2, "d_ff": 8}
    model = models.create(models.roberta.RobertaConfig(tokenizer.vocab_size, **sizes, pad=1, head="masked_lm"), 3)
    assert tokenizer.pad_id not in (None, 1)
    hub.save(model, tokenizer, tmp_path / "m")
    again, _ = hub.load_folder_or_gguf(tmp_path / "m")
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(np.arange(9)[None]), model.logits(np.arange(9)[None]))


def test_float16_becomes_float32(tmp_path):
    shutil.copytree(MODELS / "gpt2", tmp_path / "m")
    half = {k: v.astype(np.float16) for k, v in read_safetensors(MODELS / "gpt2").items()}
    write_safetensors(tmp_path / "m", half)
    model, _ = hub.load_folder_or_gguf(tmp_path / "m")
    np.testing.assert_array_equal(model.token_embedding.weight.data, half["transformer.wte.weight"].astype(np.float32))


def test_bare_model_and_double_head(tmp_path):
    """Files of the model without its head leave out `transformer.`; others hold a tied head twice, and the causal mask."""
    shutil.copytree(MODELS / "gpt2", tmp_path / "m")
    tensors = {k.removeprefix("transformer."): v for k, v in read_safetensors(MODELS / "gpt2").items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    write_safetensors(tmp_path / "m", tensors)
    model, _ = hub.load_folder_or_gguf(tmp_path / "m")
    np.testing.assert_array_equal(model.token_embedding.weight.data, tensors["wte.weight"])
    tensors["lm_head.weight"] = tensors["wte.weight"] * 2
    write_safetensors(tmp_path / "m", tensors)
    with pytest.raises(FormatError, match=r"1 extra: lm_head\.weight"):
        hub.load_folder_or_gguf(tmp_path / "m")


def test_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"\[load\] no such folder or file: .*nothing\.gguf"):
        hub.load_folder_or_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hub.load_folder_or_gguf(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(FormatError, match="expected a folder"):
        hub.load_folder_or_gguf(tmp_path / "model.pt")
    raw = json.loads((MODELS / "gpt2" / "config.json").read_text())
    for change, message in (
        ({"model_type": "nonsense"}, "model_type must be one of .*gpt2, .*llama.*, got 'nonsense'"),
        ({"model_type": ["gpt2"]}, "model_type must be one of"),
        ({"n_layer": 10**4}, "10000 layers, the file only"),
        ({"vocab_size": 10**9}, r"transformer.wte.weight \(expected \(1000000000, 36\), got \(97, 36\)\)"),
        ({"n_layer": "3"}, "n_layer must be an integer"),
        ({"surprise": 1}, "unknown key 'surprise' = 1"),
    ):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(MODELS / "gpt2", folder)
        (folder / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(FormatError, match=message):
            hub.load_folder_or_gguf(folder)
    model, _ = hub.load_folder_or_gguf(MODELS / "gpt2")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something other than a model"):
        hub.save(model, None, tmp_path / "letters")
    assert (tmp_path / "letters" / "mine.txt").exists()


def test_unknown_hub_id(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing-of-this-name' is no local folder or file"):
        hub.load_folder_or_gguf("nobody/nothing-of-this-name")


def write_gguf(path, arch, quantise=None):
    """A GGUF file of a tiny checkpoint, as convert_hf_to_gguf writes it: Q and K rows permuted for interleaved RoPE."""
    gguf = pytest.importorskip("gguf")
    name = "gpt2" if arch == "gpt2" else "llama-wide" if quantise else "llama"
    model = wide_llama() if name == "llama-wide" else hub.load_folder_or_gguf(MODELS / name)[0]
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff or 4 * c.d_model)
    writer.add_head_count(c.n_head)
    if arch == "llama":
        writer.add_vocab_size(c.vocab_size)
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_rope_freq_base(c.rope_base)
        writer.add_layer_norm_rms_eps(c.eps)
    else:
        writer.add_layer_norm_eps(c.eps)
    from fastlm.models.base import names

    for ours, theirs in names(models.ARCHITECTURES[arch].GGUF_NAMES, model).items():
        array = np.array(model.named_parameters()[ours].data)
        if arch == "llama" and (".attn_q." in theirs or ".attn_k." in theirs):
            heads = c.n_head if ".attn_q." in theirs else c.n_kv_head
            array = array.reshape(heads, 2, -1, c.d_model).swapaxes(1, 2).reshape(array.shape)
        if quantise and array.ndim == 2:
            kind = getattr(gguf.GGMLQuantizationType, quantise)
            writer.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def wide_llama():
    """Widths that are whole quantised blocks."""
    sizes = {"d_model": 64, "d_ff": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 16}
    model = models.create(models.LlamaConfig(vocab_size=70, context=32, **sizes), 1)
    for p in model.named_parameters().values():
        p.data *= 4
    return model


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gguf(arch, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", arch)
    again, tokenizer = hub.load_folder_or_gguf(tmp_path / "m.gguf")
    assert tokenizer is None
    ids = GOLDEN[f"{arch}.ids"]
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    hub.save(again, None, tmp_path / "folder")
    folder, _ = hub.load_folder_or_gguf(tmp_path / "folder")
    np.testing.assert_array_equal(folder.logits(ids), model.logits(ids))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_gguf(kind, tmp_path):
    """Weights stay quantised; the Q and K rows are permuted as they are; the logits are those of the dequantised copy."""
    write_gguf(tmp_path / "m.gguf", "llama", kind)
    model, _ = hub.load_folder_or_gguf(tmp_path / "m.gguf")
    assert isinstance(model.blocks[0].attention.q.weight.data, QuantizedArray)
    wide, _ = hub.load_folder_or_gguf(tmp_path / "m.gguf", dtype="float32")
    rows = wide_llama().blocks[0].attention.q.weight.data
    assert np.abs(wide.blocks[0].attention.q.weight.data - rows).max() < 0.2 * np.abs(rows).max()
    ids = np.arange(20)[None]
    np.testing.assert_allclose(model.logits(ids), wide.logits(ids), rtol=1e-4, atol=1e-4)


def test_gguf_rope_factors():
    """rope_freqs.weight of LLaMA 3.1 and 3.2 is recognised; other factors stay factors."""
    from fastlm.nn.rope import Llama3Scaling, plain_frequencies

    frequencies = Llama3Scaling(32.0, 1.0, 4.0, 8192).frequencies(5e5, 64, 1)
    factors = plain_frequencies(5e5, 64) / frequencies
    found = scaling_from_gguf({}, {"rope_freqs.weight": factors}, 5e5)
    assert found["rope_type"] == "llama3"
    assert found["factor"] == 32.0
    model = models.declare(models.LlamaConfig(rope_scaling=scaling_from_gguf({}, {"rope_freqs.weight": factors * 2}, 5e5)))
    np.testing.assert_allclose(model.blocks[0].attention.position.scaling.frequencies(5e5, 64, 1), frequencies / 2, rtol=1e-6)
    assert scaling_from_gguf({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}, 1e4) is None
    assert scaling_from_gguf({"rope.scale_linear": 4.0}, {}, 1e4) == {"rope_type": "linear", "factor": 4.0}


def test_gguf_refuses(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(32)
    writer.add_expert_count(8)
    writer.add_uint32("llama.surprise", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"unknown key llama.surprise = 3; missing key llama.emb"):
        hub.load_folder_or_gguf(tmp_path / "m.gguf")


HUGE, LISTED = 1 << 31, np.array([1, 2], np.int32)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("mixtral", "llama.expert_count", HUGE, "has 2147483648 experts, the file only"),
        ("mixtral", "llama.expert_count", LISTED, r"llama.expert_count must be a number, got array\(\[1, 2\]"),
        ("mixtral", "llama.expert_used_count", 5, "from 1 to 4 experts, all that there are, got 5"),
        ("gemma", "gemma.embedding_length", HUGE, "a d_model of 2147483648, the largest tensor only"),
        ("phi3", "phi3.embedding_length", 3, "embedding_length must be 4 or more, got 3"),
        ("phi3", "phi3.attention.head_count", 0, "head_count must be 1 or more, got 0"),
        ("phi3", "phi3.embedding_length", "wide", "embedding_length must be a number, got 'wide'"),
        ("mistral", "llama.rope.freq_base", [], r"rope.freq_base must be a number, got \[\]"),
        ("mistral", "llama.rope.dimension_count", LISTED, "rope.dimension_count must be a number"),
        ("mistral", "llama.rope.scaling.factor", "x", "rope.scaling.factor must be a number, got 'x'"),
        ("mistral", "llama.rope.scaling.type", LISTED, "rope.scaling.type must be a string"),
        ("mistral", "rope_freqs.weight", np.ones(3, np.float32), "must have a number for each 2 of 16 dimensions, got 3"),
        ("mistral", "blk.0.attn_q.weight", np.zeros((), np.float32), r"misshapen: blk.0.attn_q.weight .*got \(\)"),
    ],
)
def test_gguf_of_values_that_no_model_has(name, key, value, message, monkeypatch):
    """Refused by name, and before memory is taken for what the file does not hold."""
    path = MODELS.parent / "gguf" / f"{name}.gguf"
    metadata, tensors = map(dict, hub.read_gguf(path))
    (tensors if isinstance(value, np.ndarray) and value.dtype == np.float32 else metadata)[key] = value
    monkeypatch.setattr(hub, "read_gguf", lambda _: (metadata, tensors))
    with pytest.raises(FormatError, match=message):
        hub.load_folder_or_gguf(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("experts/mixtral", {"num_local_experts": HUGE}, "has 2147483648 experts"),
        ("experts/mixtral", {"num_experts_per_tok": 7}, "from 1 to 5 experts, all that there are, got 7"),
        ("t5/v1.1", {"num_layers": 9999}, "has 9999 encoder layers, the file only"),
        ("t5/v1.1", {"relative_attention_max_distance": HUGE}, "max_distance must be an integer from 1 to 1048576"),
        ("t5/v1.1", {"relative_attention_num_buckets": 3}, "n_bucket must be at least 4"),
        ("models/llama", {"rms_norm_eps": 10**400}, "eps must be a positive number"),
        ("models/llama", {"rope_parameters": 3}, "rope_scaling must be a mapping, got 3"),
        ("models/llama", {"rope_scaling": {"type": [1]}}, r"rope_type must be one of .*, got \[1\]"),
        ("models/llama", {"rope_scaling": {"rope_type": "linear", "factor": False}}, "factor must be a positive number, got False"),
        (
            "models/llama",
            {"rope_scaling": {"rope_type": "linear", "factor": [2.0]}},
            r"factor must be a positive number, got \[2.0\]",
        ),
        ("decoders/phi3", {"rope_parameters": [1]}, r"rope_scaling must be a mapping, got \[1\]"),
        ("decoders/phi3", {"hidden_size": float("inf")}, "d_model must be an integer"),
        ("decoders/qwen3", {"layer_types": 5}, "layer_types must be a list, got 5"),
        ("xlnet/bi", {"n_head": 0}, "d_model / n_head must be integers"),
        ("xlnet/bi", {"clamp_len": "far"}, "clamp_len must be an integer"),
    ],
)
def test_config_of_values_that_no_model_has(name, change, message, tmp_path):
    shutil.copytree(MODELS.parent / name, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(FormatError, match=message):
        hub.load_folder_or_gguf(tmp_path / "m")


def test_ids_that_a_folder_names_are_kept(tmp_path):
    """What fastlm does not read itself: left out, the reference would take its class's, LLaMA's end at 2."""
    model = models.create(models.LlamaConfig(11, 8, 8, 8, 1, 2, 1, 4), 0)
    hub.save(model, None, tmp_path / "m")
    assert not [k for k in read_json(tmp_path / "m" / "config.json") if k.endswith("_token_id")]
    ids = {"bos_token_id": 7, "eos_token_id": None, "pad_token_id": 9}
    generation = {"eos_token_id": [3, 4], "temperature": 0.6}
    write_json(tmp_path / "m" / "config.json", read_json(tmp_path / "m" / "config.json") | ids)
    write_json(tmp_path / "m" / "generation_config.json", generation)
    kept, _ = hub.load_folder_or_gguf(tmp_path / "m")
    hub.save(kept, None, tmp_path / "m")
    assert read_json(tmp_path / "m" / "config.json").items() >= ids.items()
    assert read_json(tmp_path / "m" / "generation_config.json") == generation
    letters = Tokenizer.characters("abcdefghi")
    hub.save(kept, letters.with_special({"eos": "</s>"}), tmp_path / "m")  # a tokenizer's own come first
    assert read_json(tmp_path / "m" / "config.json").items() >= (ids | {"eos_token_id": 9}).items()
    assert read_json(tmp_path / "m" / "generation_config.json").items() >= {"eos_token_id": [9], "temperature": 0.6}.items()
    hub.save(model, letters, tmp_path / "m")
    assert read_json(tmp_path / "m" / "config.json").items() >= {"bos_token_id": None, "eos_token_id": None}.items()
    kept.token_ids = {"eos_token_id": [3, 9]}
    hub.save(kept, letters.with_special({"eos": "</s>"}), tmp_path / "m")
    assert read_json(tmp_path / "m" / "config.json")["eos_token_id"] == [3, 9]
    (tmp_path / "m" / "generation_config.json").write_text("[]")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="generation_config"):
        hub.load_folder_or_gguf(tmp_path / "m")


def test_where_a_decoder_starts_is_in_both_files(tmp_path):
    """Where there is a generation_config.json the reference looks nowhere else, and T5 could not begin."""
    model = models.create(models.t5.T5Config(12, 8, 16, 1, 1, 2, 4, start=3), 0)
    hub.save(model, Tokenizer.characters("abcdefghi").with_special({"eos": "</s>", "pad": "<pad>"}), tmp_path / "m")
    found = read_json(tmp_path / "m" / "generation_config.json")
    assert found == {"eos_token_id": [9], "pad_token_id": 10, "decoder_start_token_id": 3}
