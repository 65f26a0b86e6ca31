"""Models on the emulated device: the same script as on the CPU, with the same results."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastlm
from fastlm import backend, models
from fastlm.checkpoint import read_safetensors
from fastlm.cli import main
from fastlm.cuda import status
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.data.objectives.base import Batch, SourceBatch
from fastlm.generate import Past, Reading, Settings, generate, steps
from fastlm.generate.ondevice import DeviceDecoder
from fastlm.generate.recorded import why_not
from fastlm.lm import LM
from fastlm.train.ondevice import DeviceStep
from tests.gpu.mirror import Mirror

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
def quick():
    """The emulated device with the CPU's kernels for the heavy ones."""
    if not HAS_TRITON:
        pytest.skip("the Triton layer needs triton")
    before = Emulated.damaged
    with emulated(kind=Mirror, twin="triton") as device:
        yield device
    assert Emulated.damaged == before, "memory outside of an array was written"


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
    wide = models.GPTConfig(**SIZES | {"d_model": 32})
    with pytest.raises(ValueError, match=r"\[quantize\] token_embedding.weight: it is on emulated, .* call lm\.to\('cpu'\) first"):
        LM(models.create(wide, device="cuda")).quantize("Q8_0")


@pytest.mark.skipif(status()[0], reason="there is a GPU")
def test_no_gpu(tmp_path, capsys):
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
    for command in (["generate", str(tmp_path / "model"), "a"], ["train", "none.txt", "--out", str(tmp_path / "run")]):
        assert main([*command, "--device", "cuda"]) == 2
        assert "[cuda] no GPU can be used: " in capsys.readouterr().err
    assert model.device is None


# --- the twins themselves ---

DATA = Path(__file__).parents[1] / "data/models"
GOLDEN = np.load(DATA / "logits.npz")
SMALL = {"vocab_size": 61, "d_model": 16, "n_layer": 1, "n_head": 2, "context": 16}
TINY = {
    "gpt2": models.GPTConfig(**SMALL),
    "llama": models.LlamaConfig(**SMALL | {"n_head": 4}, d_ff=24, n_kv_head=2, head_dim=8),
}


def close(got, want):
    """The bar for float32 against the reference: 1e-5 x max(1, |logit|)."""
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= 1e-5, error.max()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied", "llama-bias"])
def test_checkpoints(name, quick):
    """Files written by transformers, and its logits."""
    lm = fastlm.load(DATA / name, device="cuda")
    close(lm.logits(GOLDEN[f"{name}.ids"]), GOLDEN[f"{name}.logits"])


@needs_triton
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpoints_on_twins(name, on):
    lm = fastlm.load(DATA / name, device="cuda")
    ids, want = GOLDEN[f"{name}.ids"][:, :9], GOLDEN[f"{name}.logits"][:, :9]
    close(lm.logits(ids), want)
    assert {"matmul", "attention", "embedding"} <= on.launched.keys()


@needs_triton
@pytest.mark.parametrize("name", TINY)
def test_float32(name, on):
    """Losses, gradients' norms and greedy ids of the host."""
    expected = losses(models.create(TINY[name], seed=3), steps=3, context=6)
    model = models.create(TINY[name], seed=3, device="cuda")
    np.testing.assert_allclose(losses(model, steps=3, context=6), expected, rtol=1e-5)
    host = models.create(TINY[name], seed=3)
    fresh = models.create(TINY[name], seed=3, device="cuda")
    settings = Settings(max_tokens=5)
    assert [o.ids for o in generate(fresh, [[1, 2, 3], [9]], settings)] == [
        o.ids for o in generate(host, [[1, 2, 3], [9]], settings)
    ]
    assert why_not(fresh) == []
    for op, launched in on.launched.items():
        listed = {variant(*v) for v in importlib.import_module(f"fastlm.kernels.{op}.{op}_triton").variants()}
        assert launched <= listed, f"{launched - listed} would not be compiled ahead of time"


@needs_triton
@pytest.mark.parametrize("name", TINY)
def test_bfloat16(name, on, monkeypatch):
    """Weights and activations in bfloat16, near the float32 ones; the optimiser's weights are float32 and get what bfloat16 would lose."""
    host = models.create(TINY[name], seed=3)
    ids = TOKENS[:12].reshape(2, 6)
    model = models.create(TINY[name], seed=3, device="cuda", dtype="bfloat16")
    np.testing.assert_allclose(model.logits(ids), host.logits(ids), atol=0.02)
    assert model.logits(ids).dtype == np.float32
    assert model.scores(ids).dtype == np.float32, "logits are not rounded"
    assert all(len(o.ids) == 4 for o in generate(model, [[1, 2, 3], [9]], Settings(max_tokens=4)))
    assert why_not(model) == []

    small = {"lr": 1e-6, "min_lr": 1e-6, "weight_decay": 0.0}
    expected = losses(host, steps=3, context=6, **small)
    model = models.create(TINY[name], seed=3)
    before = {k: p.data.copy() for k, p in model.named_parameters().items()}
    found = []
    for s in fastlm.train(model, TOKENS, steps=3, batch=2, context=6, warmup=0, device="cuda", dtype="bfloat16", **small):
        found.append(s.loss)
        assert {p.dtype for p in model.named_parameters().values()} == {backend.BFLOAT16}
    np.testing.assert_allclose(found, expected[:, 0], rtol=5e-3)
    for k, p in model.named_parameters().items():
        assert p.dtype == np.float32
        moved = np.abs(p.numpy() - before[k])
        assert 0 < moved.max() < 1e-5, k  # three steps of a millionth each: less than bfloat16 can hold beside most weights
    for op, launched in on.launched.items():
        listed = {variant(*v) for v in importlib.import_module(f"fastlm.kernels.{op}.{op}_triton").variants()}
        assert launched <= listed, f"{launched - listed} would not be compiled ahead of time"


# --- decoding ---

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 3]]


def ids_of(model, **settings):
    seeds = [7, 8, 9, 2**63]
    return [(o.ids, o.reason) for o in generate(model, PROMPTS, Settings(**settings), seeds)]


@pytest.mark.parametrize(("name", "how"), [("gpt2", "greedy"), ("llama", "greedy"), ("gpt2", "sampled"), ("llama", "processed")])
def test_decoding(name, how, quick, monkeypatch):
    """The ids of the host, from a recorded step; of the same batch where sequences end early, and launched kernel by kernel."""
    settings = {"greedy": {}, "sampled": {"temperature": 0.9, "top_k": 20, "top_p": 0.9}, "processed": {"no_repeat_ngram": 2}}[how]
    host, most = models.create(CONFIGS[name], seed=3), 6 if how == "sampled" else 15  # its kernels are Triton's
    free = ids_of(host, max_tokens=most, **settings)
    settings |= {"max_tokens": most, "eos": (free[1][0][3], free[0][0][most // 2])}
    expected = ids_of(host, **settings)
    assert len({len(ids) for ids, _ in expected}) > 1
    runs = []
    run = DeviceDecoder._one

    def counted(self):
        logits = run(self)
        runs.append(self.recording is not None)
        return logits

    monkeypatch.setattr(DeviceDecoder, "_one", counted)
    model = models.create(CONFIGS[name], seed=3, device="cuda")
    assert ids_of(model, **settings) == expected
    assert why_not(model) == []
    assert all(runs)
    assert len(runs) >= most - 1
    monkeypatch.setenv("FASTLM_RECORD", "0")
    runs.clear()
    assert ids_of(model, **settings) == expected
    assert not any(runs)
    if how == "processed":
        with pytest.raises(ValueError, match="no id is possible after 0 new ones of prompt 0"):
            ids_of(model, min_tokens=1, eos=tuple(range(61)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_talk(name, quick):
    """A Past on the device: what was said is there, the cache grows, and what was made ahead of an end is not taken for it."""
    host, model, past = models.create(CONFIGS[name], seed=3), models.create(CONFIGS[name], seed=3, device="cuda"), Past()
    prompt = [1, 2, 3]
    for more, count in (([], 4), ([5, 6], 6), ([7], 3), ([2, 2, 2], 2)):
        prompt = prompt + more
        expected = generate(host, [prompt], Settings(max_tokens=count))[0].ids
        for at, (_, id) in enumerate(steps(model, [prompt], Settings(max_tokens=20), past=past)):
            assert id == expected[at]
            if at == count - 1:
                break
        prompt = prompt + expected
        assert len(past) in (len(prompt) - 1, len(prompt))  # whether the last id was read ahead
    assert why_not(model) == []


def test_quantised(quick):
    """Quantised weights lie on the device as they are: the host's ids, recorded and not, and its bytes when they come back."""
    config = models.LlamaConfig(**SIZES | {"d_model": 32, "n_layer": 1}, d_ff=64, n_kv_head=1, head_dim=16)
    make = lambda: LM(models.create(config, seed=3)).quantize("Q4_1")  # noqa: E731
    expected, lm = ids_of(make().model, max_tokens=4), make().to("cuda")
    kept = {k: p.data.blocks for k, p in make().model.named_parameters().items() if p.dtype == "Q4_1"}
    assert len(kept) == 7 + 2  # q, k, v, out, gate, up, down; the table and the head
    assert all(lm.model.named_parameters()[k].data.device is quick for k in kept)
    assert lm.model.device is quick
    assert ids_of(lm.model, max_tokens=4) == expected
    assert why_not(lm.model) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_RECORD", "0")
        assert ids_of(lm.model, max_tokens=4) == expected
    ids = np.arange(12).reshape(2, 6)
    want = make().model.logits(ids)
    np.testing.assert_allclose(lm.model.logits(ids), want, rtol=1e-5, atol=1e-6)
    lm.to("cpu")
    for k, blocks in kept.items():
        np.testing.assert_array_equal(lm.model.named_parameters()[k].data.blocks, blocks)
    assert ids_of(lm.model, max_tokens=4) == expected


def test_quantised_in_bfloat16(on, tmp_path):
    """Activations and vectors in bfloat16 beside quantised weights; logits are float32, a step is recorded, and a file can be written."""
    config = models.LlamaConfig(**SMALL | {"d_model": 32}, d_ff=64, n_kv_head=1, head_dim=16)
    host, lm = (LM(models.create(config, seed=3)).quantize("Q8_0") for _ in range(2))
    lm.to("cuda", "bfloat16")
    assert {str(p.dtype) for p in lm.model.named_parameters().values()} == {"Q8_0", "bfloat16"}
    ids = np.arange(8).reshape(2, 4)
    want = host.model.logits(ids)
    got = lm.model.logits(ids)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=0.03 * float(np.abs(want).max()))
    assert [len(o[0]) for o in ids_of(lm.model, max_tokens=3)] == [3] * len(PROMPTS)
    assert why_not(lm.model) == []
    host.save(tmp_path / "host")
    lm.save(tmp_path / "device")
    want, got = (read_safetensors(tmp_path / where) for where in ("host", "device"))
    assert want.keys() == got.keys()
    for name, tensor in want.items():  # vectors are bfloat16 in the one
        np.testing.assert_allclose(np.float32(got[name]), np.float32(tensor), rtol=2**-8, err_msg=name)
    module = importlib.import_module("fastlm.kernels.quantized_matmul.quantized_matmul_triton")
    assert on.launched["quantized_matmul"] <= {variant(*v) for v in module.variants()}
    assert lm.to("cpu").to("cuda").model.named_parameters()["final_norm.weight"].dtype == np.float32


def test_a_frozen_step_is_found_out(quick, caplog):
    """A model whose step depends on Python is stepped kernel by kernel, with the right ids."""

    class Counting(models.GPT):
        calls = 0

        def hidden(self, ids, context):
            self.calls += 1
            return fastlm.ops.scale(super().hidden(ids, context), 1.0 + 0.5 * (self.calls % 3))

    def make():
        made = Counting(CONFIGS["gpt2"])
        fastlm.nn.initialise(made, 3)
        return made

    model = make().to("cuda")
    ids_of(model, max_tokens=6)
    assert why_not(model) == ["run again, the recorded step gives other logits"]
    assert "steps on the device are launched kernel by kernel" in caplog.text

    class Reading(models.GPT):
        def hidden(self, ids, context):
            x = super().hidden(ids, context)
            x.numpy()
            return x

    model = Reading(CONFIGS["gpt2"])
    fastlm.nn.initialise(model, 3)
    assert ids_of(model.to("cuda"), max_tokens=6) == ids_of(models.create(CONFIGS["gpt2"], seed=3), max_tokens=6)
    assert why_not(model) == ["the step reads what is on the device"]


def test_cache(quick):
    """Rows of a device's cache are taken and put in another order; beam search gives the host's ids."""
    host, model = models.create(CONFIGS["llama"], seed=3), models.create(CONFIGS["llama"], seed=3, device="cuda")
    caches = [m.new_cache(3, 9) for m in (host, model)]
    ids = np.arange(12).reshape(3, 4)
    for m, cache in zip((host, model), caches, strict=True):
        m.logits(ids, cache)
        cache.select([2, 0])
        np.testing.assert_array_equal(cache.lengths, [4, 4])
    a, b = (m.logits(ids[:2, :1], c) for m, c in zip((host, model), caches, strict=True))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"\[cache\] capacity must be at least 10 for 5 more positions after 5, got 9"):
        model.logits(ids[:2].repeat(2, 1)[:, :5], caches[1])
    beams = {"max_tokens": 6, "beams": 3}
    assert LM(model).generate_ids([1, 2, 3], **beams) == LM(host).generate_ids([1, 2, 3], **beams)


def test_encoder_decoder(quick):
    """T5 reads its sources, which have different lengths, and writes the host's ids by recorded steps; with beams too."""
    config = family("t5-small")
    sources = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]
    found = []
    for device in ("cpu", "cuda"):
        model = models.create(config, seed=2, device=device)
        reading = Reading(model, sources)
        ids = [o.ids for o in generate(reading, reading.prompts, Settings(max_tokens=6))]
        found.append((ids, LM(model).generate_ids(sources[0], max_tokens=5, beams=3)))
        assert why_not(model) == []
    assert found[0] == found[1]


def test_embeddings(quick):
    """Texts of different lengths one behind the other."""
    rows, found = [[5, 6, 7], [8], [9, 10, 11, 12]], []
    for device in ("cpu", "cuda"):
        found.append(LM(models.create(family("bert-base-uncased"), seed=2, device=device)).embed(rows))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_caches(dtype, quick):
    """Keys and values in fewer bits, and a text's perplexity."""
    found = []
    for device in ("cpu", "cuda"):
        lm = LM(models.create(CONFIGS["llama"], seed=3, device=device))
        lm.cache = dtype
        found.append((lm.generate_ids(PROMPTS, max_tokens=8), lm.perplexity(list(range(40)), context=12)))
        assert why_not(lm.model) == []
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)


# --- training ---

TOKENS = np.random.default_rng(5).integers(0, 61, 2000).astype(np.int32)


def losses(model, steps=4, **options):
    options = {"batch": 2, "context": 8, "lr": 1e-2, "warmup": 0} | options
    return np.array([(s.loss, s.grad_norm) for s in fastlm.train(model, TOKENS, steps=steps, **options)])


@pytest.mark.parametrize(
    ("name", "options"), [("gpt2", {}), ("llama", {}), ("gpt2", {"accumulate": 2, "clip": None}), ("llama", {"recompute": True})]
)
def test_training(name, options, quick, monkeypatch, tmp_path):
    """The host's losses and weights; a recorded step gives the bits of the same launches one by one."""
    found = []
    for device in ("cpu", "cuda"):
        model = models.create(CONFIGS[name], seed=3)
        found.append((losses(model, device=device, **options), model))
    (expected, host), (got, there) = found
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert there.device is quick
    for k, p in there.named_parameters().items():
        a, b = p.numpy(), host.named_parameters()[k].data
        if k.endswith("qkv.bias"):  # that of the keys has no gradient but rounding errors, which AdamW makes as large as any
            a, b = np.delete(a, np.s_[24:48]), np.delete(b, np.s_[24:48])
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=k)
        assert p.grad is None
    recorded = []
    run = DeviceStep._run

    def spied(self, batches):
        result = run(self, batches)
        recorded.append(self._recording is not None)
        return result

    monkeypatch.setattr(DeviceStep, "_run", spied)
    again = models.create(CONFIGS[name], seed=3, device="cuda")
    np.testing.assert_array_equal(losses(again, **options), got)
    assert recorded == [False, True, True, True]
    if options:
        return
    monkeypatch.setenv("FASTLM_RECORD", "0")
    plain = models.create(CONFIGS[name], seed=3, device="cuda")
    np.testing.assert_array_equal(losses(plain, **options), got)
    assert not any(recorded[4:])
    assert file_of(plain, tmp_path / "plain") == file_of(there, tmp_path / "there")


def test_not_finite(quick):
    """A step that is not finite changes nothing, recorded or not, and is not counted."""
    found = []
    for device in ("cpu", "cuda"):
        model = models.create(CONFIGS["gpt2"], seed=3)
        steps = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for s in fastlm.train(model, TOKENS, steps=6, batch=2, context=8, lr=1e-2, warmup=0, device=device):
                p = model.named_parameters()["final_norm.bias"]
                if s.step == 3:
                    kept = backend.host(p.data).copy()
                    backend.assign(p.data, backend.put(np.full(24, np.nan, np.float32), model.device))
                if s.step == 4:
                    backend.assign(p.data, backend.put(kept, model.device))
                steps.append((s.loss, s.skipped))
        assert any("step 4 skipped" in str(w.message) for w in warned)
        assert [skipped for _, skipped in steps] == [False, False, False, True, False, False]
        found.append([loss for loss, _ in steps])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_resume(quick, tmp_path):
    """A run on the device that is stopped and goes on is the uninterrupted one, bit for bit, and can go on on the host."""
    options = {"batch": 2, "context": 8, "lr": 1e-2, "warmup": 0}
    whole = models.create(CONFIGS["gpt2"], seed=3, device="cuda")
    expected = [s.loss for s in fastlm.train(whole, TOKENS, steps=6, **options)]
    model, seen = models.create(CONFIGS["gpt2"], seed=3, device="cuda"), []
    for s in fastlm.train(model, TOKENS, steps=6, out=tmp_path, **options):
        seen.append(s.loss)
        if s.step == 3:
            break
    steps = fastlm.train(models.create(CONFIGS["gpt2"], device="cuda"), TOKENS, steps=6, out=tmp_path, resume=True, **options)
    seen += [s.loss for s in steps]
    assert seen == expected
    read = fastlm.load(tmp_path / "step-000006").model
    assert {k: p.data.tobytes() for k, p in read.named_parameters().items()} == {
        k: p.numpy().tobytes() for k, p in whole.named_parameters().items()
    }


def test_train_refusals(quick):
    with pytest.raises(ValueError, match=r"\[train\] dtype must be 'float32' on the CPU, got 'bfloat16'"):
        fastlm.train(models.create(CONFIGS["gpt2"]), TOKENS, steps=1, context=8, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"\[train\] dtype must be 'float32' or 'bfloat16', got 'float16'"):
        fastlm.train(models.create(CONFIGS["gpt2"]), TOKENS, steps=1, context=8, device="cuda", dtype="float16")
    good = np.arange(16, dtype=np.int32).reshape(2, 8)
    for bad in (Batch(good + 50, good), Batch(good, good + 50)):
        with pytest.raises(ValueError, match=r"\[train\] ids must be from 0 to 60 .* got 6[16] at"):
            list(fastlm.train(models.create(CONFIGS["gpt2"], device="cuda"), lambda n, bad=bad: bad, steps=1, context=8))


# --- the other families ---

SIZED = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 2, "context": 32, "d_ff": 40, "n_kv_head": 1, "head_dim": 12}
SIZED |= {"d_embedding": 24, "n_encoder_layer": 2, "n_expert": 4, "head": "masked_lm", "n_sparse": 1, "n_encoder_sparse": 1}
SIZED |= {"balance_loss": True, "router_losses": True}
FAMILIES = """gpt1 gpt2 gpt3-small llama-7b mistral-7b gemma-2b phi-3-mini qwen2.5-0.5b qwen3-0.6b palm-8b megatron-turing-530b t5-small
    t5-v1.1-small bert-base-uncased roberta-base distilbert-base-uncased albert-base-v2 electra-small mixtral-8x7b glam-0.1b-64e
    switch-base-8 xlnet-base-cased""".split()


def family(name):
    fields = {f.name for f in dataclasses.fields(models.PRESETS[name])}
    changes = {k: v for k, v in SIZED.items() if k in fields}
    changes |= {"head": h} if (h := {"electra-small": "replaced_token", "xlnet-base-cased": "language_model"}.get(name)) else {}
    return models.preset(name, **changes)


def test_every_family_is_here():
    assert {type(models.PRESETS[name]) for name in FAMILIES} == {type(c) for c in models.PRESETS.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, quick):
    """The host's logits and gradients. Nothing is computed on the host by the way: a NumPy array among a kernel's arguments
    is refused, and a device's array is never copied by itself."""
    config = family(name)
    host = models.create(config, seed=1)
    model = models.create(config, seed=1, device="cuda")
    ids = np.random.default_rng(0).integers(2, 61, (2, 7)).astype(np.int32)
    targets = np.roll(ids, 1, 1)
    targets[1, 5:] = -100
    padding = {"mask": np.array([[1] * 7, [1] * 5 + [0] * 2])}
    given, more = (ids,), {}
    if hasattr(host, "encode"):
        given, more = (ids, ids[:, :7]), padding
    elif isinstance(host, models.Encoder):
        more = padding
        targets = (ids % 2).astype(np.int32) if name == "electra-small" else targets
    np.testing.assert_allclose(model.logits(*given, **more), host.logits(*given, **more), rtol=1e-5, atol=1e-6)
    found = []
    for m in (host, model):
        m.train()
        loss = m.loss(*given, targets, **more)
        loss.backward()
        found.append((loss.item(), {k: p.grad for k, p in m.named_parameters().items()}))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    for k, g in found[0][1].items():
        there = found[1][1][k]
        assert (g is None) == (there is None), k
        if g is not None:
            np.testing.assert_allclose(there.numpy(), g, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(g).max())), err_msg=k)


@pytest.mark.parametrize(("name", "choices"), [("mixtral-8x7b", 2 * 2 * 16), ("glam-0.1b-64e", 2 * 16), ("switch-base-8", 16 + 8)])
def test_experts_train(name, choices, quick):
    """Routers learn by their auxiliary losses, here of a weight that shows: the host's losses, and what its experts were given; a causal
    model's steps are recorded, and the counts are those of the last run."""
    weights = {"balance_weight": 0.5} | ({"z_weight": 0.5} if name == "switch-base-8" else {})
    config = dataclasses.replace(family(name), **weights)
    rows = np.random.default_rng(7).integers(2, 61, (2, 13)).astype(np.int32)
    batch = Batch(rows[:, :8], rows[:, 1:9]) if name != "switch-base-8" else SourceBatch(rows[:, :8], rows[:, 8:12], rows[:, 9:])
    found = []
    for device in ("cpu", "cuda"):
        model = models.create(config, seed=3)
        steps = fastlm.train(model, lambda n: batch, steps=4, context=8, lr=1e-2, warmup=0, device=device)
        found.append(([s.loss for s in steps], model))
    (expected, host), (got, there) = found
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_array_equal(there.expert_counts, host.expert_counts)
    assert there.dropped == host.dropped
    assert there.expert_counts.sum() + there.dropped == choices
    without = models.create(dataclasses.replace(config, balance_weight=1e-9), seed=3, device="cuda")
    assert got[0] - without.loss(**batch._asdict()).item() > 0.1  # the loss is in what was compared
