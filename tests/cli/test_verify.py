"""`fastlm verify`: right models pass, and a wrong layer is named."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlm.checkpoint import read_safetensors, write_safetensors
from fastlm.cli import main
from fastlm.cli.verify import SCRIPT, errors, observe
from fastlm.hub import load_folder_or_gguf

DATA = Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "decoders" / "golden.npz")
NAMES = ["mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt1"]


def write_reference(name, path, **changes):
    """That of transformers, as tests/data/make_decoders.py kept it."""
    states = GOLDEN[f"{name}.states"]
    arrays = dict(zip(["embedding", *(f"layer.{i}" for i in range(len(states) - 2)), "final"], states, strict=True))
    np.savez(path, **{"ids": GOLDEN[f"{name}.ids"], "logits": GOLDEN[f"{name}.logits"], **arrays, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_passes(name, tmp_path, capsys):
    write_reference(name, tmp_path / "golden.npz")
    assert main(["verify", str(DATA / "decoders" / name), "--reference", str(tmp_path / "golden.npz")]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["embedding", "layer.0", "layer.1", "final", "logits"]
    assert "all within 1e-05" in out


@pytest.mark.parametrize("layer", [0, 1])
def test_names_the_wrong_layer(layer, tmp_path, capsys):
    write_reference("qwen3", tmp_path / "golden.npz")
    shutil.copytree(DATA / "decoders" / "qwen3", tmp_path / "model")
    tensors = {k: np.array(v) for k, v in read_safetensors(tmp_path / "model").items()}
    tensors[f"model.layers.{layer}.self_attn.k_norm.weight"][2] += 0.5
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    assert main(["verify", str(tmp_path / "model"), "--reference", str(tmp_path / "golden.npz")]) == 1
    assert f"the first beyond 1e-05 x max(1, |value|): layer.{layer}" in capsys.readouterr().out


# What `fastlm verify --script` wrote, see tests/data/make_verify.py; for each, a weight of layer 1 (of the decoder, where there are two).
KINDS = {
    "t5": ("t5/v1.0", "decoder.block.1.layer.1.EncDecAttention.v.weight", "decoder.layer.1"),
    "switch": ("switch/tied", "encoder.block.1.layer.1.mlp.router.classifier.weight", "encoder.layer.1"),
    "bert": ("encoders/bert.masked_lm", "bert.encoder.layer.1.attention.output.dense.weight", "layer.1"),
    "albert": ("encoders/albert.masked_lm", None, "layer.0"),
    "electra": ("encoders/electra.replaced_token", "electra.encoder.layer.1.intermediate.dense.weight", "layer.1"),
    "roberta": ("encoders/roberta.bare", "encoder.layer.1.output.LayerNorm.weight", "layer.1"),
    "distilbert": ("encoders/distilbert.masked_lm", "distilbert.transformer.layer.1.ffn.lin2.weight", "layer.1"),
    "xlnet": ("xlnet/bi", "transformer.layer.1.rel_attn.o", "layer.1"),
    "mixtral": ("experts/mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", "layer.1"),
    "gpt2": ("models/gpt2", "transformer.h.1.mlp.c_proj.weight", "layer.1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, capsys):
    reference = DATA / "verify" / f"{kind}.npz"
    assert main(["verify", str(DATA / KINDS[kind][0]), "--reference", str(reference)]) == 0
    out = capsys.readouterr().out
    found = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert set(found) == set(np.load(reference).files) - {"ids", "decoder_ids"}
    assert sum(".layer." in f".{name}" for name in found) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_bug_is_named(kind, tmp_path, capsys):
    """One weight a percent off: the layer that holds it is the first one named. ALBERT's layers share one: the first of them."""
    folder, name, layer = KINDS[kind]
    shutil.copytree(DATA / folder, tmp_path / "model")
    tensors = {k: np.array(v) for k, v in read_safetensors(tmp_path / "model").items()}
    name = name or next(k for k in tensors if k.endswith("ffn_output.weight"))
    tensors[name].flat[np.abs(tensors[name]).argmax()] *= 1.01
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    assert main(["verify", str(tmp_path / "model"), "--reference", str(DATA / "verify" / f"{kind}.npz")]) == 1
    assert f"the first beyond 1e-05 x max(1, |value|): {layer}\n" in capsys.readouterr().out


def test_encoder_with_padding(tmp_path, capsys):
    """States of padding are left out."""
    folder = DATA / "encoders" / "bert.masked_lm"
    model = load_folder_or_gguf(folder)[0]
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    mask = np.ones((2, 12), np.int32)
    mask[1, 7:] = 0
    found = observe(model, ids, mask)
    found["layer.0"][1, 9] = np.nan
    np.savez(tmp_path / "golden.npz", ids=ids, mask=mask, **found)
    assert main(["verify", str(folder), "--reference", str(tmp_path / "golden.npz")]) == 0
    found["layer.0"][1, 3] = np.nan
    np.savez(tmp_path / "golden.npz", ids=ids, mask=mask, **found)
    assert main(["verify", str(folder), "--reference", str(tmp_path / "golden.npz")]) == 1


@pytest.mark.filterwarnings("error")
def test_infinite_values():
    """The same infinity is no error, another or a finite one is."""
    want, got = np.full((1, 2, 3), np.inf), np.full((1, 2, 3), np.inf, np.float32)
    assert errors({"logits": got}, {"logits": want})["logits"][0] == 0
    for value in (-np.inf, 3.0, np.nan):
        got[0, 1, 2] = value
        assert errors({"logits": got}, {"logits": want})["logits"] == (np.inf, (0, 1, 2))


@pytest.mark.parametrize("tolerance", ["nan", "-1", "much"])
def test_refuses_tolerance(tolerance, capsys):
    with pytest.raises(SystemExit):
        main(["verify", "x", f"--tolerance={tolerance}"])
    assert f"argument --tolerance: must be a number of at least 0, got '{tolerance}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer.7": np.zeros((2, 24, 28))}, "the reference has layer.7; this model has embedding, layer.0"),
        ({"logits": np.zeros((2, 24, 60))}, r"logits of the reference must have the shape (2, 24, 61), got (2, 24, 60)"),
        ({"mask": np.ones((2, 24))}, "no mask and no segments for a causal model"),
        ({"decoder_ids": np.ones((2, 24), np.int32)}, "decoder_ids, and no segments, for an encoder-decoder, and for no other"),
    ],
)
def test_refuses(changes, message, tmp_path, capsys):
    write_reference("qwen3", tmp_path / "golden.npz", **changes)
    assert main(["verify", str(DATA / "decoders" / "qwen3"), "--reference", str(tmp_path / "golden.npz")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["empty", "text", "one array", "cut off", "damaged", "objects"])
def test_refuses_what_is_no_npz_file(kind, tmp_path, capsys):
    path = tmp_path / "golden.npz"
    write_reference("qwen3", path, **({"logits": np.array([None])} if kind == "objects" else {}))
    raw = path.read_bytes()
    if kind == "one array":
        with open(path, "wb") as file:
            np.save(file, GOLDEN["qwen3.logits"])
    elif kind != "objects":
        middle = len(raw) // 2
        damaged = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
        path.write_bytes({"empty": b"", "text": b"ids 1 2 3\n", "cut off": raw[:-40], "damaged": damaged}[kind])
    assert main(["verify", str(DATA / "decoders" / "qwen3"), "--reference", str(path)]) == 2
    assert f"[verify] {path} must be an npz file of arrays of numbers" in capsys.readouterr().err


def test_refuses_without_reference(tmp_path, capsys):
    np.savez(tmp_path / "golden.npz", tokens=[1])
    assert main(["verify", "x", "--reference", str(tmp_path / "golden.npz")]) == 2
    assert "must hold ids and any of" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert "give FOLDER and --reference" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", "npy", "cut", "flipped"])
def test_refuses_what_is_no_npz(content, tmp_path, capsys):
    """One line that says what is expected, whatever the file is."""
    path = tmp_path / "golden.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
    else:
        np.savez(path, ids=np.ones((2, 3), int), logits=np.ones((2, 3, 61)))
        whole = bytearray(path.read_bytes())
        whole[600] ^= content == "flipped"
        path.write_bytes(content if isinstance(content, bytes) else whole[: 500 if content == "cut" else None])
    assert main(["verify", str(DATA / "decoders" / "qwen3"), "--reference", str(path)]) == 2
    assert "must be an npz file of arrays of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("logits", [np.ones((2, 24, 61), complex), np.full((2, 24, 61), "a")])
def test_refuses_what_is_no_number(logits, tmp_path, capsys):
    write_reference("qwen3", tmp_path / "golden.npz", logits=logits)
    assert main(["verify", str(DATA / "decoders" / "qwen3"), "--reference", str(tmp_path / "golden.npz")]) == 2
    assert f"must hold real numbers alone, got logits ({logits.dtype})" in capsys.readouterr().err


def test_script(capsys):
    assert main(["verify", "--script"]) == 0
    assert capsys.readouterr().out == SCRIPT
    ast.parse(SCRIPT)
