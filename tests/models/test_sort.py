"""gpt-nano-sort, trained to sort six symbols out of three: every intermediate activation that was published with it, and its skill."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from fastlm import hub, ops
from fastlm.nn import Context
from fastlm.tensor import data, no_grad

FOLDER = Path(__file__).parents[1] / "data" / "gpt-nano-sort"


@pytest.fixture(scope="module")
def model():
    return hub.load_folder_or_gguf(FOLDER)[0]


def test_every_activation(model):
    want = np.load(FOLDER / "partials.npz")
    ids = want["idx"].astype(np.int32)
    B, T = ids.shape
    H, D = model.config.n_head, model.config.head_dim
    got = {"tok_emb": model.token_embedding(ids), "pos_emb": model.position_embedding(np.arange(T, dtype=np.int32)[None])}
    with no_grad():
        got["x"] = x = ops.add(model.token_embedding(ids), model.position_embedding(np.arange(T, dtype=np.int32)))
        block = model.blocks[0]
        got["ln1"] = block.attention_norm(x)
        got["qkv"] = block.attention.qkv(got["ln1"])
        q, k, v = (data(part).reshape(B, T, H, D) for part in block.attention.project(got["ln1"]))
        got |= {"q": q.swapaxes(1, 2), "k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
        scores = ops.matmul(np.ascontiguousarray(got["q"]), np.ascontiguousarray(k.transpose(0, 2, 3, 1))) * np.float32(D**-0.5)
        got["att"] = np.where(np.tril(np.ones((T, T), bool)), scores, np.float32(-np.inf))
        unit = np.broadcast_to(np.eye(T, D, dtype=np.float32)[None, :, None], (B, T, H, D))  # values that show the weights
        got["attSm"] = ops.attention(q, k, np.ascontiguousarray(unit), causal=True)[..., :T].swapaxes(1, 2)
        got["y"] = ops.attention(q, k, v, causal=True).reshape(B, T, H * D)
        got["yProj"] = block.attention.out(got["y"])
        got["attnResid"] = block.attention(got["ln1"], Context(B, T), 0, residual=x)
        got["ln2"] = block.mlp_norm(got["attnResid"])
        got["fc"] = block.mlp.up(got["ln2"])
        got["gelu"] = block.mlp.up(got["ln2"], activation="gelu_tanh")
        got["mlp"] = block.mlp(got["ln2"])
        got["mlpResid"] = block.mlp(got["ln2"], residual=got["attnResid"])
        for layer, block in enumerate(model.blocks):
            got[f"block{layer}"] = x = block(x, Context(B, T), layer)
        got["ln_f"] = model.hidden(ids, Context(B, T))
        got["lm_head"] = model(ids)
        got["probs"] = np.exp(ops.log_softmax(got["lm_head"].data))
    assert got.keys() == set(want.files) - {"idx"}
    for name in got:
        np.testing.assert_allclose(data(got[name]), want[name], rtol=0, atol=1e-5, err_msg=name)


def test_sorts_all_inputs(model):
    inputs = np.array(list(itertools.product(range(3), repeat=6)))
    cache = model.new_cache(len(inputs), 11)
    new = [model.logits(inputs, cache, last=True).argmax(-1)]
    while len(new) < 6:
        new.append(model.logits(new[-1][:, None], cache, last=True).argmax(-1))
    np.testing.assert_array_equal(np.stack(new, axis=1), np.sort(inputs, axis=1))
