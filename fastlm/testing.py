"""How an operation is checked against its float64 oracle, in one place: forward, gradients, tolerances.

Every `kernels/<op>/<op>_ref.py` exports CASES (dicts; `"bench": True` marks those for timing only, `"large": True` those that the
slow emulated device leaves out: a smaller case takes it through the same branches), GRADIENTS (argument names),
`inputs(case, rng)` (keyword arguments of both the oracle and `fastlm.ops.<op>`), `forward(**inputs)` and
`backward(dy, **inputs) -> {name: gradient}`, written in NumPy for any float dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from fastlm.backend import Array
from fastlm.tensor import Tensor


def oracle(op: str) -> ModuleType:
    """The module `fastlm.kernels.<op>.<op>_ref`, loaded by name."""
    return importlib.import_module(f"fastlm.kernels.{op}.{op}_ref")


def cases(op: str, bench: bool = False) -> list[dict[str, Any]]:
    """The cases of an operation: those for tests, or those for timing."""
    return [c for c in oracle(op).CASES if bool(c.get("bench")) == bench]


def case_id(case: Mapping[str, Any]) -> str:
    """A short name for a case, for test and benchmark reports."""
    parts = [
        "x".join(map(str, v)) if isinstance(v, (tuple, list)) else f"{k}={v}"
        for k, v in case.items()
        if k not in ("bench", "large")
    ]
    return ",".join(parts)


def rng(case: Mapping[str, Any]) -> np.random.Generator:
    """A generator seeded by the case itself, so that a case means the same data everywhere."""
    return np.random.default_rng([ord(c) for c in case_id(case)])


def widen(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point arrays as float64."""
    return {k: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind in "fV" else v for k, v in inputs.items()}


def assert_close(got: Array, exact: Array, naive: Array, what: str) -> None:
    """The error against the float64 oracle is at most twice that of naive NumPy in float32, plus one ulp of the output."""
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    bad = ~np.isfinite(exact)
    np.testing.assert_array_equal(got[bad], exact[bad].astype(np.float32), err_msg=what)
    if not np.any(~bad):
        return
    got64, want = got[~bad].astype(np.float64), exact[~bad]
    error = np.abs(got64 - want)
    allowed = 2 * np.max(np.abs(naive[~bad].astype(np.float64) - want)) + np.spacing(np.abs(want).astype(np.float32))
    worst = int(np.argmax(error - allowed))
    assert np.all(error <= allowed), (
        f"{what}: error {error[worst]:.3e} > {allowed[worst]:.3e} at {worst}, expected {want[worst]:.7g}"
    )


Put = Callable[[Array], Any]


def put_all(inputs: Mapping[str, Any], put: Put | None) -> dict[str, Any]:
    """The inputs with their arrays where `put` brings them: on a device. Without it, as they are."""
    return {k: put(v) if put is not None and isinstance(v, np.ndarray) else v for k, v in inputs.items()}


def taken(y: Any) -> Array:
    """A result as a NumPy array on the host."""
    array: Array = y if isinstance(y, np.ndarray) else y.numpy()
    return array


def check_forward(op: str, call: Callable[..., Any], case: Mapping[str, Any], put: Put | None = None) -> None:
    """The operation against the oracle, on NumPy arrays or on a device's (`put` brings an array there)."""
    ref = oracle(op)
    inputs = ref.inputs(case, rng(case))
    got = call(**put_all(inputs, put))
    exact, naive = ref.forward(**widen(inputs)), ref.forward(**inputs)
    if not isinstance(exact, tuple):
        got, exact, naive = (got,), (exact,), (naive,)
    for i, (g, e, n) in enumerate(zip(map(taken, got), exact, naive, strict=True)):
        assert g.dtype == np.float32
        assert_close(g, np.asarray(e), np.asarray(n), f"{op} {case_id(case)} output {i}")


def check_backward(op: str, call: Callable[..., Any], case: Mapping[str, Any], put: Put | None = None) -> None:
    """The gradients that the tape gives against the oracle's. The output's gradient is random; several outputs get one each."""
    ref = oracle(op)
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    tensors = {
        k: Tensor(v, requires_grad=True) if k in ref.GRADIENTS and v is not None else v for k, v in put_all(inputs, put).items()
    }
    got = call(**tensors)
    outputs = got if isinstance(got, tuple) else (got,)
    dys = [generator.standard_normal(y.shape).astype(np.float32) for y in outputs]
    dy: Any = tuple(dys) if isinstance(got, tuple) else dys[0]
    wide: Any = tuple(d.astype(np.float64) for d in dys) if isinstance(got, tuple) else dys[0].astype(np.float64)
    exact, naive = ref.backward(wide, **widen(inputs)), ref.backward(dy, **inputs)
    _backward(outputs, dys if put is None else [put(d) for d in dys])
    for name in naive:  # of a frozen weight there is none
        gradient = tensors[name].grad
        assert gradient is not None, f"{op}: no gradient for {name}"
        assert_close(taken(gradient), np.asarray(exact[name]), np.asarray(naive[name]), f"{op} {case_id(case)} gradient of {name}")


def _backward(outputs: tuple[Tensor, ...], dys: list[Array]) -> None:
    from fastlm.tensor import record

    if len(outputs) == 1:
        outputs[0].backward(dys[0])
    else:
        total = np.zeros(1, np.float32)
        record(total, outputs, lambda _: dys).backward()


def check_oracle(op: str, case: Mapping[str, Any], samples: int = 24) -> None:
    """The oracle's backward against central differences of its forward, in float64, on randomly chosen elements."""
    ref = oracle(op)
    generator = rng(case)
    inputs = widen(ref.inputs(case, generator))
    y = ref.forward(**inputs)
    ys = y if isinstance(y, tuple) else (y,)
    dys = tuple(generator.standard_normal(np.shape(v)) for v in ys)
    exact = ref.backward(dys if isinstance(y, tuple) else dys[0], **inputs)

    def objective() -> float:
        out = ref.forward(**inputs)
        return sum(float((d * v).sum()) for d, v in zip(dys, out if isinstance(out, tuple) else (out,), strict=True))

    for name, gradient in exact.items():
        x = inputs[name]
        scale = max(1.0, float(np.max(np.abs(gradient), initial=0.0)))
        for index in generator.permutation(x.size)[:samples]:
            at = np.unravel_index(index, x.shape)
            old, h = x[at], 1e-6 * max(1.0, abs(float(x[at])))
            x[at] = old + h
            high = objective()
            x[at] = old - h
            low = objective()
            x[at] = old
            difference = (high - low) / (2 * h)
            assert abs(difference - gradient[at]) <= 1e-6 * scale * max(1.0, y_scale(ys)), (
                f"{op} {case_id(case)}: oracle gradient of {name}{at} is {gradient[at]:.9g}, central difference {difference:.9g}"
            )


def y_scale(ys: tuple[Array, ...]) -> float:
    """Largest finite magnitude of the outputs: what bounds the rounding of a central difference."""
    return max((float(np.max(np.abs(v[np.isfinite(v)]), initial=0.0)) for v in map(np.asarray, ys)), default=0.0)
