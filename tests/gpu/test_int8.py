"""Activations of 8 bits on the emulated device: odd numbers, bfloat16, what follows the sums, models."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import backend, models, ops
from fastlm.generate import Settings, generate
from fastlm.generate.recorded import why_not
from fastlm.kernels.int8_matmul import int8_matmul_ref as groups
from fastlm.kernels.int8_rows import int8_rows_ref as rows
from fastlm.lm import LM
from fastlm.models.place import placed_blocks
from fastlm.tensor import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BFLOAT16 = ml_dtypes.bfloat16


def weight_of(kind, N, K, generator):
    """A weight for rounded activations, and what defines its product."""
    if kind == "Q8_ROW":
        return rows.random_weight((N, K), generator), rows.forward
    return groups.random_weight(kind, (N, K), generator).with_activations("int8"), groups.forward


def odd(K, generator):
    x = generator.standard_normal((10, K), np.float32)
    x[1, 40], x[2, K - 1], x[3, 0] = np.nan, np.inf, -np.inf
    x[4] = 0
    x[5] = 1e-31
    x[6, ::2] = -0.0
    x[7] = np.resize(np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5], np.float32), K)
    x[8, 7], x[9, 3:9] = 1e34, 2.5
    return x


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K", "Q8_ROW"])
def test_odd_rows(kind, on):
    """A row with what is not finite is nan and alone in that; ties go to even, of equal numbers the first stay exact."""
    generator = np.random.default_rng(6)
    weight, forward = weight_of(kind, 33, 256 if "K" in kind else 96, generator)
    x = odd(weight.shape[1], generator)
    want = forward(x, weight)
    there = placed_blocks(weight, on)
    np.testing.assert_array_equal(ops.linear(on.put(x), there).numpy(), want)
    few = np.concatenate([ops.linear(on.put(x[:4]), there).numpy(), ops.linear(on.put(x[4:]), there).numpy()])
    assert np.isnan(few[1:4]).all()
    assert np.isfinite(few[[0, *range(4, 10)]]).all()
    np.testing.assert_allclose(few, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_ROW"])
def test_largest_sums(kind, on):
    """Codes at their ends, also where a row of x has two that are larger."""
    weight, forward = weight_of(kind, 3, 4096, np.random.default_rng(5))
    weight.blocks[:, 4:] = 127 if kind == "Q8_ROW" else 0xFF
    if kind != "Q8_ROW":
        weight.blocks.reshape(3, -1, 20)[:, :, :4] = np.full(2, 0.5, np.float16).view(np.uint8)
    x = np.ones((17, 4096), np.float32)
    x[1] = -1
    x[:, [5, 4095]] *= 2
    np.testing.assert_array_equal(ops.linear(on.put(x), placed_blocks(weight, on)).numpy(), forward(x, weight))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_ROW"])
@pytest.mark.parametrize("M", [2, 17])
def test_bfloat16_and_what_follows(kind, M, on):
    """x, bias and residual in bfloat16: one rounding, at the end. The gradient of x is that of the weights."""
    generator = np.random.default_rng(M)
    weight, forward = weight_of(kind, 37, 256, generator)
    x, bias, residual, dy = (generator.standard_normal(s).astype(BFLOAT16) for s in ((M, 256), (37,), (M, 37), (M, 37)))
    z = forward(x.astype(np.float32), weight) + bias.astype(np.float32)
    want = ops.activation(z, "gelu") + residual.astype(np.float32)
    tensor, there = Tensor(on.put(x), requires_grad=True), placed_blocks(weight, on)
    y = ops.linear(tensor, there, on.put(bias), "gelu", on.put(residual))
    np.testing.assert_allclose(y.data.numpy().astype(np.float32), want, rtol=2**-8, atol=1e-3)
    ops.linear(tensor, there).backward(on.put(dy))
    exact = dy.astype(np.float32) @ weight.dequantize()
    np.testing.assert_allclose(tensor.grad.numpy().astype(np.float32), exact, rtol=2**-7, atol=0.02 * np.abs(exact).max())


CONFIG = models.LlamaConfig(vocab_size=61, d_model=32, n_layer=1, n_head=2, n_kv_head=1, head_dim=16, d_ff=64, context=24)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q8_ROW"])
def test_models(kind, on):
    """The host's logits and ids, from a recorded step, and back with the same blocks."""
    ids, prompts = np.arange(12).reshape(2, 6), [[1, 2, 3], [9, 4]]
    host, lm = (LM(models.create(CONFIG, seed=4)).quantize(kind, "int8") for _ in range(2))
    kept = {k: p.data.blocks.copy() for k, p in lm.model.named_parameters().items() if hasattr(p.data, "blocks")}
    lm.to("cuda")
    assert lm.activations == "int8"
    np.testing.assert_allclose(lm.model.logits(ids), host.model.logits(ids), rtol=1e-5, atol=1e-5)
    assert {"Q8_ROW": "int8_rows"}.get(kind, "int8_matmul") in on.launched
    settings = Settings(max_tokens=4)
    assert [o.ids for o in generate(lm.model, prompts, settings)] == [o.ids for o in generate(host.model, prompts, settings)]
    assert why_not(lm.model) == []
    lm.to("cpu")
    for k, blocks in kept.items():
        np.testing.assert_array_equal(lm.model.named_parameters()[k].data.blocks, blocks)
    np.testing.assert_array_equal(lm.model.logits(ids), host.model.logits(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_without_loss_are_put_there_as_they_were(dtype, on):
    ids = np.arange(12).reshape(2, 6)
    lm = LM(models.create(CONFIG, seed=3)).to(dtype)
    before = {k: np.array(p.data) for k, p in lm.model.named_parameters().items()}
    lm.quantize("LOSSLESS").to("cuda")
    for k, p in lm.model.named_parameters().items():
        assert str(p.dtype) == dtype
        np.testing.assert_array_equal(backend.host(p.data).astype(np.float32), before[k].astype(np.float32))
    assert np.isfinite(backend.host(lm.model.logits(ids)).astype(np.float32)).all()


def test_an_encoder_in_bfloat16(on):
    """BERT in Q8_ROW, near float32's states."""
    config = models.preset("bert-base-uncased", vocab_size=61, d_model=32, n_layer=1, n_head=2, d_ff=40, context=16, head=None)
    ids, host = np.arange(20).reshape(2, 10), models.create(config, seed=2)
    want = host.states(ids)
    lm = LM(models.create(config, seed=2)).quantize("Q8_ROW").to("cuda", "bfloat16")
    got = backend.host(lm.model.states(ids)).astype(np.float32)
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.02


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_the_loss_of_a_quantised_head(dtype, on):
    """The CPU's loss and gradient of x; the weight has none."""
    generator = np.random.default_rng(3)
    weight = groups.random_weight("Q8_0", (37, 32), generator)
    x, targets = generator.standard_normal((5, 32)).astype(dtype).astype(np.float32), np.array([1, 36, -100, 0, 4])
    found = []
    for tensor, w in ((Tensor(x, requires_grad=True), weight), (Tensor(on.put(x.astype(dtype)), requires_grad=True), None)):
        loss = ops.linear_cross_entropy(tensor, placed_blocks(weight, on) if w is None else w, targets)
        loss.backward()
        found.append((loss.item(), backend.host(tensor.grad).astype(np.float32)))
    (want, dx), (got, there) = found
    error = 1e-5 if dtype == np.float32 else 2.0**-6
    assert got == pytest.approx(want, rel=error)
    np.testing.assert_allclose(there, dx, rtol=error, atol=error * np.abs(dx).max())


def test_refusals(on):
    weight = placed_blocks(rows.random_weight((5, 32), np.random.default_rng(1)), on)
    with pytest.raises(NotImplementedError, match=r"\[embedding\] a weight with one scale a row is on emulated"):
        ops.embedding(np.array([1, 2]), weight)
    with pytest.raises(TypeError, match=r"\[int8_rows\] bias must be bfloat16, as x is, got float32"):
        ops.linear(on.put(np.ones((2, 32), BFLOAT16)), weight, on.put(np.ones(5, np.float32)))
