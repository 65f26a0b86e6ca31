"""Attention's parts against NumPy: padding, masks, shared and own position biases, cross-attention, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import nn, ops
from fastlm.nn import EVERYTHING, Attention, Context, CrossAttention, Memory, Padding, Sees
from fastlm.tensor import Tensor

rng = np.random.default_rng(3)


def made(part):
    nn.initialise(part, 5)
    for p in part.named_parameters().values():
        p.data *= np.float32(10)
    return part


def run(part, *args):
    return part(*args).data


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def expected(part, x, source, hidden, scale):
    """float64: hidden (B, H, T, S) is added to the scores."""
    w = {k: p.data.astype(np.float64) for k, p in part.named_parameters().items()}
    B, T, _ = x.shape
    S, H, D = source.shape[1], part.n_head, part.head_dim
    q = (x @ w["q.weight"].T).reshape(B, T, H, D)
    k = (source @ w["k.weight"].T).reshape(B, S, part.n_kv_head, D).repeat(H // part.n_kv_head, 2)
    v = (source @ w["v.weight"].T).reshape(B, S, part.n_kv_head, D).repeat(H // part.n_kv_head, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale + hidden
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)
    return y.reshape(B, T, H * D) @ w["out.weight"].T


def test_padding_as_lengths_and_as_bias():
    part = made(Attention(12, 4, 2, 5, sees=EVERYTHING, scale=0.7))
    x = normal(3, 6, 12)
    right = np.array([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    context = Context(3, 6, mask=right)
    assert context.lengths.tolist() == [6, 3, 1]
    assert context.bias is None
    hidden = np.where(right, 0, -np.inf)[:, None, None]
    np.testing.assert_allclose(run(part, x, context, 0), expected(part, x, x, hidden, 0.7), rtol=1e-5, atol=1e-5)
    left = right[:, ::-1]
    context = Context(3, 6, mask=left)
    assert context.lengths is None
    np.testing.assert_allclose(run(part, x, context, 0), expected(part, x, x, hidden[..., ::-1], 0.7), rtol=1e-5, atol=1e-5)
    each = np.tril(np.ones((6, 6), bool))[None].repeat(3, 0)
    got = run(part, x, Context(3, 6, mask=each), 0)
    np.testing.assert_allclose(got, expected(part, x, x, np.where(each, 0, -np.inf)[:, None], 0.7), rtol=1e-5, atol=1e-5)
    whole = Context(3, 6, mask=np.ones((3, 6)))
    assert whole.lengths is None
    assert whole.bias is None


def test_window():
    part = made(Attention(12, 3, sees=Sees(causal=True, window=2)))
    x = normal(2, 5, 12)
    seen = np.tril(np.ones((5, 5), bool)) & ~np.tril(np.ones((5, 5), bool), -2)
    want = expected(part, x, x, np.where(seen, 0, -np.inf), 0.5)
    np.testing.assert_allclose(run(part, x, Context(2, 5), 0), want, rtol=1e-5, atol=1e-5)


def test_position_biases_add_up_and_have_gradients():
    part = made(Attention(12, 3, sees=EVERYTHING))
    x = normal(2, 5, 12)
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    shared, own = Tensor(normal(1, 3, 5, 5), requires_grad=True), Tensor(normal(1, 3, 5, 5), requires_grad=True)
    context = Context(2, 5, mask=mask)
    context.add_bias(shared)
    y = part(Tensor(x), context, 0, bias=own)
    hidden = np.where(mask, 0, -np.inf)[:, None, None] + shared.data.astype(np.float64) + own.data
    np.testing.assert_allclose(y.data, expected(part, x, x, hidden, 0.5), rtol=1e-5, atol=1e-5)
    dy = normal(2, 5, 12)
    y.backward(dy)
    for at in ((0, 0, 1, 3), (0, 2, 4, 0)):
        step = np.zeros((1, 3, 5, 5))
        step[at] = 1e-5
        up, down = (expected(part, x, x, hidden + sign * step, 0.5) for sign in (1, -1))
        want = ((up - down) * dy).sum() / 2e-5
        assert shared.grad[at] == pytest.approx(want, rel=1e-4, abs=1e-5)
        assert own.grad[at] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_cross_attention_computes_the_memory_once():
    part = made(CrossAttention(12, 4, 2, 5))
    x, source = normal(2, 3, 12), normal(2, 7, 12)
    mask = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    memory = Memory(source, Padding(mask, (2, 7)))
    want = expected(part, x, source, np.where(mask, 0, -np.inf)[:, None, None], 5**-0.5)
    np.testing.assert_allclose(run(part, x, Context(2, 3, memory=memory), 0), want, rtol=1e-5, atol=1e-5)
    memory.states = np.full_like(source, np.nan)  # not read again
    np.testing.assert_allclose(run(part, x, Context(2, 3, memory=memory), 0), want, rtol=1e-5, atol=1e-5)
    swapped = run(part, x[::-1].copy(), Context(2, 3, memory=memory.select([1, 0])), 0)
    np.testing.assert_array_equal(swapped[::-1], run(part, x, Context(2, 3, memory=memory), 0))


def test_norms_of_queries_and_keys():
    part = Attention(12, 3, q_norm=nn.RMSNorm(4), k_norm=nn.RMSNorm(4))
    assert {"q_norm.weight", "k_norm.weight"} <= part.named_parameters().keys()
    made(part)
    x = normal(1, 5, 12)
    k = ops.rms_norm(part.k(x).data.reshape(1, 5, 3, 4), part.k_norm.weight, 1e-5).data
    q = ops.rms_norm(part.q(x).data.reshape(1, 5, 3, 4), part.q_norm.weight, 1e-5).data
    want = ops.attention(q, k, part.v(x).data.reshape(1, 5, 3, 4), True).reshape(1, 5, 12) @ part.out.weight.data.T
    np.testing.assert_allclose(part(x, Context(1, 5), 0).data, want, rtol=1e-5, atol=1e-5)


def test_refuses_masks():
    with pytest.raises(ValueError, match=r"mask must hold 0 and 1"):
        Padding(np.array([[1, 2]]))
    with pytest.raises(ValueError, match=r"mask must be \(B, S\) or \(B, T, S\) with \(B, S\) = \(1, 3\), got \(1, 2\)"):
        Padding(np.array([[1, 1]]), (1, 3))
