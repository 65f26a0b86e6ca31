from __future__ import annotations

import json

import numpy as np
import pytest

from fastlm.checkpoint import FormatError, convert_llama2c, read_llama2c, read_safetensors

C, F, L, H, G, V, P = 16, 24, 2, 4, 2, 11, 6
D = C // H


def write(path, header=(C, F, L, H, G, V, P), tied=True, extra=0, seed=0):
    """A checkpoint as export.py's legacy_export writes it; returns its tensors by their names in llama2.c."""
    rng = np.random.default_rng(seed)
    shapes = {
        "tok": (V, C),
        "rms_att": (L, C),
        "wq": (L, C, C),
        "wk": (L, G * D, C),
        "wv": (L, G * D, C),
        "wo": (L, C, C),
        "rms_ffn": (L, C),
        "w1": (L, F, C),
        "w2": (L, C, F),
        "w3": (L, F, C),
        "rms_final": (C,),
        "cos": (P, D // 2),
        "sin": (P, D // 2),
    }
    if not tied:
        shapes["wcls"] = (V, C)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    data = np.array(header, "<i4").tobytes() + b"".join(t.tobytes() for t in tensors.values()) + bytes(extra)
    path.write_bytes(data)
    return tensors


def test_tensors(tmp_path):
    source = write(tmp_path / "m.bin")
    config, tensors = read_llama2c(tmp_path / "m.bin")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (C, H, G)
    assert config["tie_word_embeddings"] is True
    assert len(tensors) == 2 + 9 * L
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], source["tok"])
    np.testing.assert_array_equal(tensors["model.norm.weight"], source["rms_final"])
    names = {
        "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo",
        "mlp.gate_proj": "w1",
        "mlp.down_proj": "w2",
        "mlp.up_proj": "w3",
        "input_layernorm": "rms_att",
        "post_attention_layernorm": "rms_ffn",
    }
    for ours, theirs in names.items():
        for i in range(L):
            np.testing.assert_array_equal(tensors[f"model.layers.{i}.{ours}.weight"], source[theirs][i])


def test_rotation(tmp_path):
    """Half-split RoPE on the permuted rows gives the scores of interleaved RoPE on the original ones."""
    source = write(tmp_path / "m.bin")
    _, tensors = read_llama2c(tmp_path / "m.bin")
    x = np.random.default_rng(1).standard_normal((5, C))
    angle = np.arange(5)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)  # (T, D / 2)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def interleaved(weight):
        y = (x @ weight.T.astype(np.float64)).reshape(5, -1, D)
        a, b = y[..., 0::2], y[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(5, -1, D)

    def split(weight):
        y = (x @ weight.T.astype(np.float64)).reshape(5, -1, D)
        a, b = y[..., : D // 2], y[..., D // 2 :]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    for i in range(L):
        q, k = tensors[f"model.layers.{i}.self_attn.q_proj.weight"], tensors[f"model.layers.{i}.self_attn.k_proj.weight"]
        keys = np.repeat(split(k), H // G, axis=1)
        expected_keys = np.repeat(interleaved(source["wk"][i]), H // G, axis=1)
        got = np.einsum("thd,shd->hts", split(q), keys)
        np.testing.assert_allclose(
            got, np.einsum("thd,shd->hts", interleaved(source["wq"][i]), expected_keys), rtol=1e-12, atol=1e-12
        )
        assert not np.array_equal(q, source["wq"][i])


def test_untied(tmp_path):
    source = write(tmp_path / "m.bin", header=(C, F, L, H, G, -V, P), tied=False)
    config, tensors = read_llama2c(tmp_path / "m.bin")
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == V
    np.testing.assert_array_equal(tensors["lm_head.weight"], source["wcls"])


def test_convert(tmp_path):
    write(tmp_path / "m.bin")
    called = []
    folder = convert_llama2c(tmp_path / "m.bin", tmp_path / "out", tokenizer=called.append)
    assert called == [folder]
    config, tensors = read_llama2c(tmp_path / "m.bin")
    assert json.loads((folder / "config.json").read_text()) == config
    got = read_safetensors(folder)
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        assert got[name].tobytes() == array.tobytes()


def test_refuses(tmp_path):
    path = tmp_path / "m.bin"
    write(path, extra=4)
    with pytest.raises(FormatError, match=r"expected \d+ bytes for the sizes in the header, got \d+"):
        read_llama2c(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="expected"):
        read_llama2c(path)
    write(path, header=(C, F, L, H, G, -V, P))  # says that it is untied, and is not
    with pytest.raises(FormatError, match="expected"):
        read_llama2c(path)
    path.write_bytes(bytes(27))
    with pytest.raises(FormatError, match="header of 28 bytes, got 27"):
        read_llama2c(path)
    for header in (
        (0, F, L, H, G, V, P),
        (C, F, -1, H, G, V, P),
        (C, F, 2**31 - 1, H, G, V, P),
        (C, F, L, 0, G, V, P),
        (C, F, L, H, 0, V, P),
    ):
        write(path, header=header)
        with pytest.raises(FormatError, match="must be from 1 to"):
            read_llama2c(path)
    for header in ((C, F, L, 3, G, V, P), (C, F, L, H, 3, V, P), (C, F, L, C, G, V, P)):
        write(path, header=header)
        with pytest.raises(FormatError, match="must divide"):
            read_llama2c(path)
    write(path, header=(2**24,) * 7)
    with pytest.raises(FormatError):
        read_llama2c(path)
    path.write_bytes(b"24ka" + bytes(300))
    with pytest.raises(FormatError, match="a later one: export with --version 0"):
        read_llama2c(path)
