"""GLaM against an independent model in float64 NumPy: logits, the loss with dropped tokens, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastlm import hub, models
from fastlm.nn import count_parameters
from fastlm.train import AdamW

SMALL = {
    "vocab_size": 43, "context": 32, "d_model": 20, "d_ff": 27, "n_layer": 4, "n_head": 3, "head_dim": 6, "n_expert": 5,
    "n_bucket": 8, "max_distance": 11,
}  # fmt: skip


def small(std=0.15):
    model = models.create(models.preset("glam-0.1b-64e", **SMALL), 7)
    rng = np.random.default_rng(7)
    for p in model.named_parameters().values():
        p.data[...] = rng.standard_normal(p.shape) * std + (p.ndim == 1)
    return model


def bucket(distance, count, most):
    """One distance at a time, after the text of the paper."""
    half = count // 2
    if distance < half:
        return max(distance, 0)
    return min(half + int(math.log(distance / half) / math.log(most / half) * (count - half)), count - 1)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def softmax(x):
    z = np.exp(x - x.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def experts(w, layer, x, c, capacity):
    """x (B, T, C), one token at a time; also the balance loss and the number of dropped choices."""
    B, T, _ = x.shape
    p = softmax(x @ w[f"blocks.{layer}.moe.router.weight"].T)
    y, first, dropped = np.zeros_like(x), np.zeros(c.n_expert), 0
    for b in range(B):
        used = [0] * c.n_expert
        top = [sorted(range(c.n_expert), key=lambda e, t=t: -p[b, t, e])[:2] for t in range(T)]
        for j in range(2):
            for t in range(T):
                e = top[t][j]
                first[e] += j == 0
                used[e] += 1
                if capacity is not None and used[e] > capacity:
                    dropped += 1
                    continue
                part = f"blocks.{layer}.moe.experts.{e}."
                out = gelu(x[b, t] @ w[part + "up.weight"].T) @ w[part + "down.weight"].T
                y[b, t] += p[b, t, e] / (p[b, t, top[t][0]] + p[b, t, top[t][1]]) * out
    return y, c.n_expert * (first / (B * T) * p.mean((0, 1))).sum(), dropped


def reference(w, c, ids, training=False):
    """logits, mean balance loss, dropped choices."""
    x, (B, T) = w["token_embedding.weight"][ids], ids.shape
    balance, dropped, H, D = [], 0, c.n_head, c.head_dim
    capacity = math.ceil(c.capacity_factor * 2 * T / c.n_expert) if training else None
    buckets = np.array([[bucket(t - s, c.n_bucket, c.max_distance) for s in range(T)] for t in range(T)])
    for i in range(c.n_layer):
        at = f"blocks.{i}."
        n = norm(x, w[at + "attention_norm.weight"])
        q, k, v = ((n @ w[f"{at}attention.{m}.weight"].T).reshape(B, T, H, D).transpose(0, 2, 1, 3) for m in "qkv")
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(D) + w[at + "position_bias.weight"][buckets].transpose(2, 0, 1)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        x = x + (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(B, T, H * D) @ w[at + "attention.out.weight"].T
        n = norm(x, w[at + "mlp_norm.weight"])
        if i % 2:
            y, loss, lost = experts(w, i, n, c, capacity)
            balance.append(loss)
            dropped += lost
        else:
            y = (gelu(n @ w[at + "mlp.gate.weight"].T) * (n @ w[at + "mlp.up.weight"].T)) @ w[at + "mlp.down.weight"].T
        x = x + y
    return norm(x, w["final_norm.weight"]) @ w["token_embedding.weight"].T, np.mean(balance), dropped


def loss_of(w, c, ids, targets):
    logits, balance, dropped = reference(w, c, ids, training=True)
    p = softmax(logits)
    return -np.log(np.take_along_axis(p, targets[..., None], -1)).mean() + c.balance_weight * balance, dropped


def wide(model):
    return {name: p.data.astype(np.float64) for name, p in model.named_parameters().items()}


def test_logits_and_cache():
    model, ids = small(), np.random.default_rng(1).integers(0, 43, (2, 19))
    want = reference(wide(model), model.config, ids)[0]
    got = model.logits(ids)
    assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() <= 1e-5
    np.testing.assert_array_equal(got[1:], model.logits(ids[1:]))
    cache = model.new_cache(2, 19)
    model.logits(ids[:1, :4], cache.row(0))
    model.logits(ids[1:, :7], cache.row(1))
    for step in range(3):  # the sequences are of different lengths
        now = model.logits(np.stack([ids[0, 4 + step : 5 + step], ids[1, 7 + step : 8 + step]]), cache)
        for b, t in ((0, 4 + step), (1, 7 + step)):
            assert (np.abs(now[b, 0] - want[b, t]) / np.maximum(1, np.abs(want[b, t]))).max() <= 1e-5


def test_loss_and_gradients():
    """Tokens are dropped here. The derivative along each gradient, by central differences in float64, is its norm."""
    model, ids = small().train(), np.random.default_rng(2).integers(0, 43, (2, 12))
    w, c, targets = wide(model), model.config, np.roll(ids, -1, 1)
    loss = model.loss(ids, targets)
    want, dropped = loss_of(w, c, ids, targets)
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert model.dropped == dropped > 0
    loss.backward()
    rng = np.random.default_rng(3)
    for name, p in model.named_parameters().items():
        if p.grad is None or not p.grad.any():
            assert ".experts." in name, name  # an expert that no token was sent to
            continue
        gradient, h = p.grad.astype(np.float64), 1e-5
        size = np.linalg.norm(gradient)
        for direction in (gradient / size, rng.standard_normal(p.shape) / math.sqrt(p.size)):
            ends = [loss_of(w | {name: w[name] + sign * h * direction}, c, ids, targets)[0] for sign in (1, -1)]
            assert (direction * gradient).sum() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-5 * size + 1e-9), name


def test_save_and_load(tmp_path):
    model, ids = small(), np.arange(12)[None]
    hub.save(model, None, tmp_path / "a")
    again = hub.load_folder_or_gguf(tmp_path / "a")[0]
    assert again.config == model.config
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    hub.save(again, None, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_counts():
    """1,161.8B in all and 96.603B for a token are published; what is beyond the matrices are norms and position biases."""
    model = models.declare("glam-64b-64e")
    small_parts = (2 * 64 + 1) * 8192 + 64 * 32 * 128
    assert round(count_parameters(model) / 1e8) == 11618
    assert round((model.active_parameters() - small_parts) / 1e6) == 96603


def test_experts_balance():
    """From a router that prefers some experts, training evens the load: the fullest takes less than 1.5 of an even share."""
    config = models.preset(
        "glam-0.1b-64e", vocab_size=32, context=32, d_model=32, d_ff=48, n_layer=2, n_head=2, head_dim=16, n_expert=4,
        capacity_factor=4.0, balance_weight=0.05,
    )  # fmt: skip
    model, rng = models.create(config, 1).train(), np.random.default_rng(1)
    model.token_embedding.weight.data[:] += 0.3  # all tokens alike, and so all sent to the same experts
    model.blocks[1].moe.router.weight.data[:] *= 10
    optimizer, loads, losses = AdamW(model, (0.9, 0.99), 1e-8, 0.0), [], []
    for _ in range(200):
        start, step = rng.integers(0, 32, (16, 1)), rng.integers(1, 4, (16, 1))
        ids = (start + step * np.arange(25)) % 32
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.update(3e-3, 1.0)
        loads.append((model.expert_counts.max(1) / model.expert_counts.mean(1)).max())
        losses.append(loss.item())
    assert loads[0] > 1.5
    assert np.mean(loads[-20:]) < 1.5
    assert losses[-1] < losses[0] - 1
