"""GPT-3, Megatron-Turing NLG and PaLM, for which transformers has no class, against models written here in NumPy and float64:
logits, and directional derivatives of the loss for every parameter. And the published counts, which allocate nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastlm import hub, models
from fastlm.models.gpt3 import GPT3Config
from fastlm.models.megatron import MegatronConfig
from fastlm.models.palm import PaLMConfig
from fastlm.nn import Declared, count_parameters

COUNTS = {
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "megatron-turing-530b": 529_581_506_560,
    "palm-8b": 8_631_877_632,
    "palm-62b": 62_495_129_600,
    "palm-540b": 540_354_281_472,
}
CONFIGS = {
    "gpt3": GPT3Config(vocab_size=53, context=40, d_model=24, n_layer=4, n_head=3, window=5),
    "megatron": MegatronConfig(vocab_size=53, context=40, d_model=20, n_layer=2, n_head=4),
    "palm": PaLMConfig(vocab_size=53, context=40, d_model=20, n_layer=3, n_head=3, head_dim=6),
}


def norm(x, w, b=0.0, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v, window):
    """One loop over sequences, heads and queries: no masks. (B, T, H, D), (B, T, G, D) -> (B, T, H D)."""
    B, T, H, D = q.shape
    out, group = np.zeros((B, T, H, D)), H // k.shape[2]
    for b, h, t in np.ndindex(B, H, T):
        first = 0 if window is None else max(0, t - window + 1)
        scores = k[b, first : t + 1, h // group] @ q[b, t, h] / math.sqrt(D)
        out[b, t, h] = softmax(scores) @ v[b, first : t + 1, h // group]
    return out.reshape(B, T, H * D)


def gpt_reference(p, c, ids):
    B, T = ids.shape
    x = p["token_embedding.weight"][ids] + p["position_embedding.weight"][:T]
    for i in range(c.n_layer):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, w["attention_norm.weight"], w["attention_norm.bias"])
        q, k, v = np.split(h @ w["attention.qkv.weight"].T + w["attention.qkv.bias"], 3, -1)
        heads = [a.reshape(B, T, c.n_head, -1) for a in (q, k, v)]
        banded = c.window if isinstance(c, GPT3Config) and i in (1, 3) else None
        x = x + attention(*heads, banded) @ w["attention.out.weight"].T + w["attention.out.bias"]
        h = norm(x, w["mlp_norm.weight"], w["mlp_norm.bias"])
        u = h @ w["mlp.up.weight"].T + w["mlp.up.bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w["mlp.down.weight"].T + w["mlp.down.bias"]
    return norm(x, p["final_norm.weight"], p["final_norm.bias"]) @ p["token_embedding.weight"].T


def turned(x):
    """Rotary positions by complex numbers: a head's two halves are real and imaginary parts."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def palm_reference(p, c, ids):
    B, T = ids.shape
    x = p["token_embedding.weight"][ids]
    for i in range(c.n_layer):
        w = {k.removeprefix(f"blocks.{i}."): v.T for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, 1, eps=1e-6)
        q, k, v = (
            (h @ w[f"attention.{n}.weight"]).reshape(B, T, heads, c.head_dim) for n, heads in (("q", c.n_head), ("k", 1), ("v", 1))
        )
        gate, up = h @ w["mlp.gate.weight"], h @ w["mlp.up.weight"]
        mlp = (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down.weight"]
        x = x + mlp + attention(turned(q), turned(k), v, None) @ w["attention.out.weight"]
    return norm(x, 1, eps=1e-6) @ p["token_embedding.weight"].T / math.sqrt(c.d_model)


REFERENCES = {"gpt3": gpt_reference, "megatron": gpt_reference, "palm": palm_reference}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """A model with large weights, its parameters in float64, the reference, ids."""
    model = models.create(CONFIGS[request.param], seed=3).train()
    rng = np.random.default_rng(7)
    for p in model.named_parameters().values():
        p.data[...] = rng.standard_normal(p.shape) * 0.2 + (1.0 if p.ndim == 1 else 0.0)
    exact = {name: p.data.astype(np.float64) for name, p in model.named_parameters().items()}
    return model, exact, REFERENCES[request.param], rng.integers(0, 53, (2, 14)).astype(np.int32)


def test_logits(case):
    model, exact, reference, ids = case
    want, got = reference(exact, model.config, ids), model.logits(ids)
    assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() <= 1e-5
    cache = model.new_cache(2, 14)
    parts = [model.logits(ids[:, :8], cache)] + [model.logits(ids[:, t : t + 1], cache) for t in range(8, 14)]
    assert (np.abs(np.concatenate(parts, 1) - want) / np.maximum(1, np.abs(want))).max() <= 1e-5


def test_gradients(case):
    """Along three random directions in every parameter, by central differences of the float64 model."""
    model, exact, reference, ids = case

    def loss(p):
        logits = reference(p, model.config, ids[:, :-1])
        picked = np.take_along_axis(softmax(logits), ids[:, 1:, None].astype(np.int64), -1)
        return -np.log(picked).mean()

    model.zero_grad()
    got = model.loss(ids[:, :-1], ids[:, 1:])
    assert got.item() == pytest.approx(loss(exact), rel=1e-6)
    got.backward()
    rng = np.random.default_rng(1)
    for name, p in model.named_parameters().items():
        for _ in range(3):
            step = rng.standard_normal(p.shape) * 1e-4 / math.sqrt(p.size)
            slope = (loss(exact | {name: exact[name] + step}) - loss(exact | {name: exact[name] - step})) / 2
            scale = np.linalg.norm(p.grad) * np.linalg.norm(step)
            assert abs((p.grad * step).sum() - slope) <= 1e-5 * scale + 1e-14, name


def test_saved_and_loaded(case, tmp_path):
    model, _, _, ids = case
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    hub.save(again, None, tmp_path / "b")
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("preset", COUNTS)
def test_counts(preset):
    model = models.declare(preset)
    assert count_parameters(model) == COUNTS[preset]
    assert all(isinstance(p.data, Declared) for p in model.named_parameters().values())


def test_megatron_init():
    model = models.create(MegatronConfig(vocab_size=97, context=8, d_model=64, n_layer=8, n_head=4), 0)
    assert model.blocks[2].mlp.up.weight.data.std() == pytest.approx(4e-3, rel=0.05)
    assert model.blocks[2].mlp.down.weight.data.std() == pytest.approx(1e-3, rel=0.05)
