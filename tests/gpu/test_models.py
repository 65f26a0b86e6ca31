"""Models on the emulated device: the same script as on the CPU, with the same results."""

from __future__ import annotations

import importlib.util

import ml_dtypes
import numpy as np
import pytest

import fastlm
from fastlm import backend, models
from fastlm.cuda import status
from fastlm.cuda.emulated import emulated
from fastlm.lm import LM

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the Triton layer needs triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 2, "context": 24}
CONFIGS = {
    "gpt2": models.GPTConfig(**SIZES),
    "llama": models.LlamaConfig(**SIZES | {"n_head": 4}, d_ff=40, n_kv_head=2, head_dim=6),
}


@pytest.fixture
def on():
    with emulated(twin="triton") as device:
        yield device


def file_of(model, folder):
    LM(model).save(folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, dtype, on, tmp_path):
    """A model that was on the device is the model that it was, in memory and in its file."""
    model = models.create(CONFIGS[name], seed=3)
    if dtype == "bfloat16":
        for p in model.named_parameters().values():
            p.data = p.data.astype(ml_dtypes.bfloat16).astype(np.float32)  # what bfloat16 holds
        LM(model).to("bfloat16")
    kept = {k: p.data.tobytes() for k, p in model.named_parameters().items()}
    written = file_of(model, tmp_path / "host")
    assert model.to("cuda") is model
    assert {p.dtype for p in model.named_parameters().values()} == {backend.DTYPES[dtype]}
    assert all(p.data.device is on for p in model.named_parameters().values())
    assert file_of(model, tmp_path / "device") == written
    lm = fastlm.load(tmp_path / "device", device="cuda")
    assert lm.device == "emulated"
    assert lm.model.device is on
    assert file_of(lm.model, tmp_path / "again") == written
    model.to("cpu")
    assert {k: p.data.tobytes() for k, p in model.named_parameters().items()} == kept


def test_dtypes(on):
    lm = LM(models.create(CONFIGS["gpt2"], device="cuda", dtype="bfloat16"))
    assert {p.dtype for p in lm.model.named_parameters().values()} == {backend.BFLOAT16}
    assert {p.dtype for p in lm.to("float32").model.named_parameters().values()} == {np.dtype(np.float32)}
    assert lm.model.device is on
    lm.to("cpu", "bfloat16")
    assert {str(p.dtype) for p in lm.model.named_parameters().values()} == {"bfloat16", "float32"}
    assert lm.device == "cpu"


def test_refusals(on):
    model = models.create(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match=r"\[device\] device must be 'cpu' or 'cuda', got 'gpu'"):
        model.to("gpu")
    with pytest.raises(ValueError, match=r"\[to\] dtype must be None, 'float32' or 'bfloat16', got 'float16'"):
        model.to("cuda", "float16")
    with pytest.raises(ValueError, match=r"\[to\] token_embedding.weight has no value yet"):
        models.declare(CONFIGS["gpt2"]).to("cuda")


@pytest.mark.skipif(status()[0], reason="there is a GPU")
def test_no_gpu(tmp_path):
    """Every way in says why there is none, before anything is done."""
    model = models.create(CONFIGS["gpt2"])
    LM(model).save(tmp_path / "model")
    for ask in (
        lambda: model.to("cuda"),
        lambda: LM(model).to("cuda"),
        lambda: models.create(CONFIGS["gpt2"], device="cuda"),
        lambda: fastlm.load(tmp_path / "model", device="cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"\[cuda\] no GPU can be used: "):
            ask()
    assert model.device is None
