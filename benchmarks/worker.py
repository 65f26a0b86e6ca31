"""One contestant in a process of its own: two libraries whose threads spin wreck each other's timings in one process.

Run by file name, so that the interpreter of a peer needs no fastlm: `python worker.py WHO`. Each line on standard input is a command in
JSON, each line on standard output its answer.

A benchmark file `bench_<op>.py` is as short as its operation lets it be:

    work(both, **inputs) -> (operations, bytes)   of the forward pass, or of both; what the roof is compared with
    BACKWARD = True                               the backward pass is timed as well; or a function of the case that says whether
    torch(**inputs)                               the same with torch tensors; any other peer by its name
    ours(**inputs), numpy(**inputs)               where `fastlm.ops.<op>` or the oracle is not what should be timed
    dense(**inputs)                               another use of fastlm to compare with
    CASES, GRADIENTS, inputs, forward, backward   where there is no oracle of that name
    CEILING = "int8_scaled_gops"                  the key of `backend.roof()` that operations are compared with, or a function of the case
                                                  that says it; "gflops" by default
    CASES, tokens(case), name(case)               for whole models, each `task` of which is a function in engine_<who>.py, see engine.py, or
                                                  <task>_<who> in the file itself

Memory is the most that a contestant holds at once during the timed calls: a model's above the idle process, an operation's beside its
inputs and outputs too.

What is timed may say itself how long it took, `run.times(seconds) -> list`, and what it is, `run.label`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if (HERE / "../fastlm/__init__.py").exists():  # the source tree; installed, this folder is fastlm/benchmarks
    KERNELS, ROOT = HERE / "../kernels", HERE.parent
else:
    KERNELS, ROOT = HERE / "../kernels", HERE.parent.parent


def by_file(path: Path) -> ModuleType:
    """A module loaded from its file, under its own name."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def bench(op: str) -> ModuleType:
    by_file(HERE / "engine.py")  # which it may import, wherever this runs
    return by_file(HERE / f"bench_{op}.py")


def oracle(op: str) -> ModuleType:
    """The operation's oracle; a benchmark of something else is its own."""
    path = KERNELS / op / f"{op}_ref.py"
    return by_file(path) if path.exists() else bench(op)


def cases(op: str) -> list[dict[str, Any]]:
    """The cases to time: the file's own, else those of the oracle that are marked so."""
    own = getattr(bench(op), "CASES", None)
    return own if own is not None else [c for c in oracle(op).CASES if c.get("bench")]


def passes(op: str, index: int) -> tuple[bool, ...]:
    """False: the forward pass; True: forward and backward, where the benchmark's BACKWARD says so."""
    backward = getattr(bench(op), "BACKWARD", False)
    return (False, True) if (backward(cases(op)[index]) if callable(backward) else backward) else (False,)


def ceiling(op: str, index: int) -> str | None:
    """What the operations of a case are compared with, where it is not the float32 multiply-adds."""
    found = getattr(bench(op), "CEILING", None)
    return found(cases(op)[index]) if callable(found) else found


def inputs(op: str, index: int) -> dict[str, Any]:
    make: Callable[..., dict[str, Any]] = getattr(bench(op), "inputs", None) or oracle(op).inputs
    return make(cases(op)[index], np.random.default_rng(index))


COLD = 128 << 20  # bytes: more than the last cache of any machine that this is likely to run on


def in_turn(op: str, index: int, values: dict[str, Any], copy: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """The inputs of one call after the other. A case with `"cold": name` takes a copy of that input each time, of so many that none is in
    a cache when its turn comes: as a model's weights are."""
    name = cases(op)[index].get("cold")
    if name is None:
        return itertools.repeat(values)
    count = max(2, -(-COLD // values[name].nbytes))
    return itertools.cycle([values, *({**values, name: copy(values[name])} for _ in range(count - 1))])


def gradient(y: Any, index: int) -> Any:
    """A random output gradient, the same in every process; a tuple where there are several outputs."""
    rng = np.random.default_rng(1000 + index)
    if isinstance(y, tuple):
        return tuple(rng.standard_normal(np.shape(v), np.float32) for v in y)
    return rng.standard_normal(np.shape(y), np.float32)


# --- what is timed: a function without arguments that returns the outputs, or the gradients by name ---


def ours(op: str, index: int, backward: bool, name: str = "ours") -> Callable[[], Any]:
    from fastlm import ops
    from fastlm.tensor import Tensor, record

    values = inputs(op, index)
    call = getattr(bench(op), name, None) or getattr(ops, op)
    if not backward:
        turns = in_turn(op, index, values, np.array)
        return lambda: call(**next(turns))
    tensors = {k: Tensor(v, requires_grad=True) if k in oracle(op).GRADIENTS and v is not None else v for k, v in values.items()}
    leaves = {k: t for k, t in tensors.items() if isinstance(t, Tensor)}
    y = call(**tensors)
    dy = gradient(tuple(t.data for t in y) if isinstance(y, tuple) else y.data, index)

    def step() -> dict[str, Any]:
        for leaf in leaves.values():
            leaf.grad = None  # as torch.autograd.grad, which adds to nothing
        y = call(**tensors)
        if isinstance(y, tuple):
            record(np.zeros(1, np.float32), y, lambda _: dy).backward()
        else:
            y.backward(dy)
        return {k: leaf.grad for k, leaf in leaves.items()}

    return step


def plain(op: str, index: int, backward: bool, wide: bool = False) -> Callable[[], Any]:
    """NumPy: the oracle in float32, or in float64 as the exact answer."""
    values = inputs(op, index)
    if wide:
        values = {k: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind in "fV" else v for k, v in values.items()}
    call = (not wide and getattr(bench(op), "numpy", None)) or oracle(op).forward
    if not backward:
        return lambda: call(**values)
    dy = gradient(call(**values), index)
    if wide:
        dy = tuple(d.astype(np.float64) for d in dy) if isinstance(dy, tuple) else dy.astype(np.float64)

    def step() -> Any:
        call(**values)
        return oracle(op).backward(dy, **values)

    return step


def torch_peer(op: str, index: int, backward: bool, who: str) -> Callable[[], Any] | None:
    """torch and the libraries on top of it: their function gets torch tensors."""
    call = getattr(bench(op), who, None)
    if call is None:
        return None
    import torch

    def tensor(v: Any) -> Any:
        if not isinstance(v, np.ndarray):
            return v
        if v.dtype.name == "bfloat16":
            return torch.from_numpy(v.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(v))

    values = {k: tensor(v) for k, v in inputs(op, index).items()}
    if not backward:
        turns = in_turn(op, index, values, torch.clone)

        def forward() -> Any:
            with torch.inference_mode():
                return call(**next(turns))

        return forward
    leaves = [k for k in oracle(op).GRADIENTS if values.get(k) is not None]
    for k in leaves:
        values[k].requires_grad_(True)
    y = call(**values)
    ys = y if isinstance(y, tuple) else (y,)
    dy = gradient(tuple(v.detach().numpy() for v in ys) if isinstance(y, tuple) else y.detach().numpy(), index)
    dys = [torch.from_numpy(np.asarray(d)) for d in (dy if isinstance(y, tuple) else (dy,))]

    def step() -> Any:
        y = call(**values)
        grads = torch.autograd.grad(y if isinstance(y, tuple) else (y,), [values[k] for k in leaves], dys)
        return dict(zip(leaves, grads, strict=True))

    return step


def is_model(op: str) -> bool:
    """Whole models, whose answers only the engines themselves can give."""
    return hasattr(bench(op), "name")


def task(op: str, index: int, who: str) -> Callable[..., Any] | None:
    """What sets a contestant up for a case of a whole model; None where it does not take part."""
    case = cases(op)[index]
    own: Callable[..., Any] | None = getattr(bench(op), f"{case['task']}_{who}", None)
    if own is not None or not (path := HERE / f"engine_{who}.py").exists():
        return own
    found: Callable[..., Any] | None = getattr(by_file(path), case["task"], None)
    return found


def takes_part(who: str, op: str, index: int) -> bool:
    if is_model(op):
        return task(op, index, who) is not None
    return who in ("ours", "numpy") or hasattr(bench(op), who)


def contestant(who: str, op: str, index: int, backward: bool) -> Callable[[], Any] | None:
    """None where this benchmark has no such contestant."""
    module = bench(op)
    if is_model(op):
        prepare = task(op, index, who)
        ready: Callable[[], Any] | None = prepare and prepare(cases(op)[index])
        return ready
    if who in ("ours", "dense"):
        return ours(op, index, backward, who)
    if who == "numpy":
        return plain(op, index, backward)
    if who in ("torch", "torch_compile", "transformers"):
        return torch_peer(op, index, backward, who)
    call = getattr(module, who, None)
    if call is None or backward:
        return None
    values = inputs(op, index)
    prepared: Callable[[], Any] = call(**values)  # other peers prepare once and return what is timed
    return prepared


# --- the process ---


def arrays(y: Any) -> dict[str, Any]:
    """The result as named arrays."""
    if y is None:
        return {}
    if not isinstance(y, dict):
        y = {str(i): v for i, v in enumerate(y if isinstance(y, tuple) else (y,))}
    return {k: np.asarray(v.detach().numpy() if hasattr(v, "detach") else getattr(v, "data", v)) for k, v in y.items()}


def size_of(values: dict[str, Any]) -> int:
    """Bytes of the arrays among these."""
    each = (v for value in values.values() for v in (value if isinstance(value, (list, tuple)) else (value,)))
    return sum(int(getattr(v, "nbytes", 0)) for v in each)


def measure(run: Callable[[], Any], seconds: float, warm: float, least: int = 2) -> list[float]:
    """Seconds of a call, at least so many times; very short calls are timed in groups. Without `warm` the first call counts."""
    group = 1
    if warm:
        start = time.perf_counter()
        calls = 0
        while calls == 0 or time.perf_counter() - start < warm:
            run()
            calls += 1
        group = max(1, int(2e-4 / max((time.perf_counter() - start) / calls, 1e-9)))
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(group):
            run()
        times.append((time.perf_counter() - start) / group)
    return times


def roof() -> dict[str, float]:
    """The ceilings, and the bandwidth of reading 2^k bytes again and again, which is the caches' where they fit."""
    from fastlm import _C, backend

    found = backend.measure_roof()
    for size in (1 << k for k in range(16, 28, 2)):
        x = np.ones(size // 4, np.float32)
        sums = np.empty(-(-x.size // _C.roof_piece), np.float32)
        found[str(size)] = size / min(measure(lambda: _C.roof_read(sums, x), 0.02, 0.01)) / 1e9  # noqa: B023
    found[str(1 << 28)] = found["read_gbs"]
    return found


def resident(key: str) -> float:
    """MB of this process, "VmRSS", or the most since `forget_peak`, "VmHWM"; nan where the system does not say."""
    path = Path("/proc/self/status")
    found = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(key)] if path.exists() else []
    return int(found[0]) / 1024 if found else float("nan")


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    who = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    sys.path.insert(0, str(ROOT))
    threads = int(os.environ["FASTLM_NUM_THREADS"])
    if who in ("torch", "torch_compile", "transformers"):
        import torch

        torch.set_num_threads(threads)
    run: Callable[[], Any] | None = None
    before = held = 0.0  # MB: of the process before a case, of its inputs and outputs
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if command["do"] == "prepare":
                run = None  # its memory goes before the next one's comes
                gc.collect()
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)
                if who in ("ours", "dense"):
                    from fastlm import backend

                    backend.release()
                before, held = resident("VmRSS"), 0.0
                run = contestant(who, command["op"], command["index"], command["backward"])
                answer["present"] = run is not None
                if run is not None:
                    start = time.perf_counter()
                    found = arrays(run())
                    answer["seconds"] = time.perf_counter() - start
                    np.savez(command["result"], **found)
                    if not is_model(command["op"]):  # what any library must hold
                        given = inputs(command["op"], command["index"])
                        held = (size_of(given) + size_of(found)) / 2**20
                        del given
                    del found
                    answer["label"] = getattr(run, "label", None)
                    if who == "ours" and hasattr(bench(command["op"]), "work"):
                        module = bench(command["op"])
                        case = cases(command["op"])[command["index"]]
                        values = {"case": case} if is_model(command["op"]) else inputs(command["op"], command["index"])
                        answer["work"] = [float(v) for v in module.work(command["backward"], **values)]
                        del values  # else these inputs would count as memory of what is timed
                        answer["tokens"] = module.tokens(case) if hasattr(module, "tokens") else None
            elif command["do"] == "exact":
                np.savez(command["result"], **arrays(plain(command["op"], command["index"], command["backward"], wide=True)()))
            elif command["do"] == "ready":
                pass
            elif command["do"] == "roof":
                answer["roof"] = roof()
            elif command["do"] == "time":
                assert run is not None
                own = getattr(run, "times", None)
                forget_peak()  # after the preparation: compiling and loading do not count
                seconds, warm, least = command["seconds"], command["warm"], command["least"]
                answer["times"] = own(seconds) if own else measure(run, seconds, warm, least)
                answer["memory"] = max(resident("VmHWM") - before - held, 0.0)
        except Exception as error:  # a peer that fails is reported in its column and the run goes on
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
