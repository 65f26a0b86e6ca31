"""A small model's recorded training step has the bits of the one from Python, and what it is not right for is computed from Python."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import fastlm
from fastlm import backend, models, ops
from fastlm.data.objectives.base import IGNORED
from fastlm.data.objectives.causal import Causal
from fastlm.models.gpt import GPT
from fastlm.tensor import Tensor
from fastlm.train import recorded
from fastlm.train.optimizer import AdamW
from tests.generate.test_recorded import TINY

TEXT = np.random.default_rng(0).integers(0, 97, 3000)
CAUSAL = [name for name in sorted(TINY) if name not in ("t5", "switch")]


def made(name: str, **changes: Any) -> Any:
    module = importlib.import_module(f"fastlm.models.{name}")
    return models.create(module.Config(**{**TINY[name], **changes}), seed=3)


def trained(model: Any, steps: int = 9, data: Any = TEXT, **more: Any) -> tuple[list[tuple[float, float]], list[bytes]]:
    found = [(s.loss, s.grad_norm) for s in fastlm.train(model, data, steps=steps, batch=3, context=16, warmup=2, **more)]
    return found, [p.data.tobytes() for p in model.named_parameters().values()]


class Seen:
    """The HostSteps that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[recorded.HostStep] = []
        make = recorded.HostStep.__init__

        def noted(this: Any, *given: Any) -> None:
            self.steps.append(this)
            make(this, *given)

        monkeypatch.setattr(recorded.HostStep, "__init__", noted)
        monkeypatch.setattr(recorded, "LONGEST", 1e9)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


# Those that are named inside must be recorded; others compute something by NumPy, which must be found out.
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_model(name: str, accumulate: int, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_RECORD", "1")
    found = trained(made(name), accumulate=accumulate)
    if name in ("gpt", "llama", "mistral", "qwen2", "gpt1"):
        assert seen.steps[0].why_not == ""
        assert seen.steps[0]._recording is not None
    monkeypatch.setenv("FASTLM_RECORD", "0")
    assert trained(made(name), accumulate=accumulate) == found


def test_larger_arrays(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that are made again, sums over many threads' pieces, and a table of positions that is added to a batch."""
    changes = {"d_model": 96, "d_ff": 1024, "context": 128}

    def run() -> Any:
        model = made("gpt", **changes)
        steps = fastlm.train(model, TEXT, steps=6, batch=6, context=128)
        return [(s.loss, s.grad_norm) for s in steps], [p.data.tobytes() for p in model.named_parameters().values()]

    monkeypatch.setenv("FASTLM_RECORD", "1")
    found = run()
    assert seen.steps[0].why_not == ""
    monkeypatch.setenv("FASTLM_RECORD", "0")
    assert run() == found


def test_memory(seen: Seen) -> None:
    """A recording takes what the step from Python takes, and no more than a small part beside it."""
    model = made("gpt", d_model=96, d_ff=1024, context=128)
    step = recorded.HostStep(model, AdamW(model, (0.9, 0.95), 1e-8, 0.1), 1)
    rng = np.random.default_rng(1)
    given = [Causal()(rng.integers(0, 97, (12, 129)), 0, 0, np.arange(12))]
    step(given)
    for p in step.parameters:
        p.grad = None
    before = backend.memory()["live"]
    backend.reset_peak()
    step(given)
    needed = backend.memory()["peak"] - before
    for p in step.parameters:
        p.grad = None
    step(given)
    assert step._recording is not None
    assert step._recording.nbytes < 1.1 * needed


def gradients(step: recorded.HostStep, batches: list[Any]) -> list[Any]:
    for p in step.parameters:
        p.grad = None
    total = step(batches)
    return [total, *(None if p.grad is None else p.grad.tobytes() for p in step.parameters)]


def test_what_it_is_not_right_for(seen: Seen, threads: None) -> None:
    model = made("gpt")
    step, plain = (recorded.HostStep(model, AdamW(model, (0.9, 0.95), 1e-8, 0.1), 1) for _ in range(2))
    plain.why_not = "to compare with"
    rng = np.random.default_rng(1)

    def batch(rows: int = 3) -> Any:
        return Causal()(rng.integers(0, 97, (rows, 17)), 0, 0, np.arange(rows))

    for rows in (3, 3, 2, 3, 3, 3, 3):
        given = [batch(rows)]
        assert gradients(step, given) == gradients(plain, given)
    assert step._recording is not None
    ignored = batch()
    ignored.targets[0, 3:] = IGNORED
    for given in ([ignored], [batch(2)], [batch()]):
        assert gradients(step, given) == gradients(plain, given)
    wrong = batch()
    wrong.ids[0, 0] = 97
    with pytest.raises(ValueError, match=r"\[embedding\] ids must be from 0 to 96"):
        step([wrong])
    backend.set_num_threads(1)
    for _ in range(3):
        given = [batch()]
        assert gradients(step, given) == gradients(plain, given)
    for p in step.parameters:
        p.data *= np.float32(1.5)  # in place
    given = [batch()]
    assert gradients(step, given) == gradients(plain, given)
    assert step.why_not == ""
    step.parameters[0].data = step.parameters[0].data * np.float32(1.5)
    for _ in range(2):
        given = [batch()]
        assert gradients(step, given) == gradients(plain, given)
    assert "another one" in step.why_not


class Planted(GPT):
    """A GPT that multiplies its states by a number that NumPy takes from the ids."""

    def hidden(self, ids: Any, context: Any) -> Any:
        return ops.scale(super().hidden(ids, context), 1.0 + float(ids[0, 0]) / 97)


def test_arithmetic_outside_kernels_is_found(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        model = made("gpt")
        model.__class__ = Planted
        return trained(model)

    monkeypatch.setenv("FASTLM_RECORD", "1")
    found = run()
    assert "computes outside kernels" in seen.steps[0].why_not
    monkeypatch.setenv("FASTLM_RECORD", "0")
    assert run() == found


def test_long_steps_are_not_recorded(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "LONGEST", 0.0)
    trained(made("gpt"), steps=5)
    assert seen.steps[0].why_not == "the step is long"
    assert seen.steps[0]._recording is None


def test_repeats() -> None:
    """A table added to every sequence, and its gradient: NumPy's bits."""
    rng = np.random.default_rng(2)
    for shape in ((5, 16, 64), (1, 2, 1024), (70, 32, 32), (3, 8, 8)):
        x, y = rng.standard_normal(shape, np.float32), rng.standard_normal(shape[1:], np.float32)
        dy = rng.standard_normal(shape, np.float32)
        xt, yt = Tensor(x, requires_grad=True), Tensor(y, requires_grad=True)
        out = ops.add(xt, yt)
        np.testing.assert_array_equal(out.data, x + y)
        out.backward(dy)
        np.testing.assert_array_equal(yt.grad, dy.sum(0))
        np.testing.assert_array_equal(xt.grad, dy)
