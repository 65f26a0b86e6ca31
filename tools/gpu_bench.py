"""Measurements on the GPU, one line of JSON each: `python tools/gpu_bench.py kernels|models|emulator`. tools/gpu_check.py runs it.

A time is the best of several rounds; a round queues the call often enough to last 50 ms and waits for the device once. Peers (torch,
Liger-Kernel, flashinfer) take turns with ours in the same process where they can be imported; else their place is null. FASTLM_DRY_RUN=1:
tiny sizes on the emulated device, no peers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DRY = os.environ.get("FASTLM_DRY_RUN") == "1"

from fastlm import backend, models, ops  # noqa: E402
from fastlm.cuda import device  # noqa: E402
from fastlm.cuda.emulated import emulated  # noqa: E402
from fastlm.tensor import Tensor  # noqa: E402

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Call = Callable[[], Any]


@dataclass
class Case:
    """One measurement: ours and peers, what they move and compute."""

    name: str
    ours: Call
    peers: dict[str, Call] = field(default_factory=dict)
    bytes: float = 0.0
    operations: float = 0.0


def small(n: int, tiny: int) -> int:
    return tiny if DRY else n


def rand(*shape: int, dtype: Any = BFLOAT16, scale: float = 1.0) -> Any:
    """Random numbers on the device; a block of 2^20 is repeated, so that the host is quick."""
    n = int(np.prod(shape))
    block = (np.random.default_rng(0).standard_normal(min(n, 1 << 20), np.float32) * np.float32(scale)).astype(dtype)
    return device().put(np.resize(block, n).reshape(shape))


def library(name: str) -> Any:
    """A peer, or None."""
    if DRY:
        return None
    with contextlib.suppress(Exception):
        return importlib.import_module(name)
    return None


def of_torch(a: Any) -> Any:
    """The same memory as torch sees it."""
    return library("torch").from_dlpack(a)


# --- the cases: functions that make one when it is its turn, so that memory is free in between ---


def copy() -> Case:
    n = small(1 << 29, 1 << 10)
    x, y = rand(n), device().empty((n,), BFLOAT16)
    case = Case("copy, 1 GiB bfloat16", lambda: backend.assign(y, x), bytes=4.0 * n)
    if library("torch"):
        a, b = of_torch(x), of_torch(y)
        case.peers["torch copy_"] = lambda: b.copy_(a)
    return case


def linear(M: int, N: int, K: int) -> Case:
    M, N, K = (small(n, 32) for n in (M, N, K))
    x, w = rand(M, K), rand(N, K, scale=0.02)
    case = Case(
        f"linear bfloat16 {M}x{N}x{K}", lambda: ops.linear(x, w), bytes=2.0 * (M * K + N * K + M * N), operations=2.0 * M * N * K
    )
    if torch := library("torch"):
        a, b = of_torch(x), of_torch(w)
        case.peers["torch (cuBLAS)"] = lambda: torch.nn.functional.linear(a, b)
    return case


def attention(D: int, backward: bool = False) -> Case:
    B, T, H = small(2, 1), small(8192, 16), small(16, 1)
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    dy = rand(B, T, H, D)
    forward = 2.0 * B * H * T * T * D

    def ours() -> Any:
        if not backward:
            return ops.attention(q, k, v, causal=True)
        y = ops.attention(*(Tensor(a, requires_grad=True) for a in (q, k, v)), causal=True)
        return y.backward(dy)

    way = "forward and backward" if backward else "forward"
    case = Case(f"attention {way} bfloat16 causal D={D} T={T}", ours, operations=forward * (3.5 if backward else 1))
    if torch := library("torch"):
        t = [of_torch(a).transpose(1, 2) for a in (q, k, v, dy)]
        kinds = torch.nn.attention.SDPBackend
        for kind in (kinds.FLASH_ATTENTION, kinds.CUDNN_ATTENTION):

            def peer(kind: Any = kind) -> Any:
                with torch.nn.attention.sdpa_kernel(kind):
                    if not backward:
                        return torch.nn.functional.scaled_dot_product_attention(*t[:3], is_causal=True)
                    leaves = [a.detach().requires_grad_() for a in t[:3]]
                    return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True).backward(t[3])

            case.peers[f"torch {kind.name.lower()}"] = peer
    return case


def decode() -> Case:
    B, S, H, G, D = small(32, 2), small(4096, 32), small(32, 2), small(8, 1), small(128, 16)
    q, k, v = rand(B, 1, H, D), rand(B, S, G, D), rand(B, S, G, D)
    case = Case(f"attention decode bfloat16 B={B} S={S}", lambda: ops.attention(q, k, v, causal=True), bytes=4.0 * B * S * G * D)
    if torch := library("torch"):
        t = [of_torch(a).transpose(1, 2) for a in (q, k, v)]
        case.peers["torch"] = lambda: torch.nn.functional.scaled_dot_product_attention(*t, enable_gqa=True)
    return case


def norm(kind: str, backward: bool) -> Case:
    R, C = small(4096, 3), small(16384, 64)
    x, w, dy = rand(R, C), rand(C), rand(R, C)
    f = getattr(ops, kind)
    more = (rand(C),) if kind == "layer_norm" else ()

    def ours() -> Any:
        if not backward:
            return f(x, w, *more)
        return f(Tensor(x, requires_grad=True), Tensor(w, requires_grad=True), *more).backward(dy)

    way = "forward and backward" if backward else "forward"
    case = Case(f"{kind} {way} bfloat16 {R}x{C}", ours, bytes=2.0 * R * C * (5 if backward else 2))
    if torch := library("torch"):
        a, b, d = (of_torch(v) for v in (x, w, dy))
        plus = tuple(of_torch(v) for v in more)
        g = getattr(torch.nn.functional, kind)

        def peer() -> Any:
            if not backward:
                return g(a, (C,), b, *plus)
            return g(a.detach().requires_grad_(), (C,), b.detach().requires_grad_(), *plus).backward(d)

        case.peers["torch"] = peer
        if kind == "rms_norm" and (liger := library("liger_kernel.ops.rms_norm")):
            apply = liger.LigerRMSNormFunction.apply
            case.peers["Liger"] = lambda: (
                apply(a.detach().requires_grad_(), b.detach().requires_grad_(), 1e-6).backward(d) if backward else apply(a, b, 1e-6)
            )
    return case


def cross_entropy(V: int) -> Case:
    R, V = small(8192, 3), small(V, 100)
    x, targets = rand(R, V), device().put((np.arange(R) % V).astype(np.int32))
    loss, stats, scale = device().empty((R,)), device().empty((R, 2)), device().put(np.ones(1, np.float32))
    table = device().table
    case = Case(
        f"cross_entropy with gradient in place, bfloat16 {R}x{V}",
        lambda: table.cross_entropy_forward(loss, stats, x, x, targets, -100, scale),
        bytes=4.0 * R * V,
    )
    if (torch := library("torch")) and (liger := library("liger_kernel.ops.cross_entropy")):
        a, t = of_torch(rand(R, V)).requires_grad_(), of_torch(targets).long()
        case.peers["Liger"] = lambda: liger.LigerCrossEntropyFunction.apply(a, t, None, -100, 0.0, 0.0, "mean")
        assert torch
    return case


def sampling(B: int) -> Case:
    B, V = small(B, 1), small(128256, 300)
    x = rand(B, V, dtype=np.float32, scale=2.0)
    seeds, steps = device().put(np.arange(B).astype(np.uint64)), device().put(np.zeros(B, np.int64))
    out = device().empty((B,), np.int32)
    call = lambda: ops.sample(x, temperature=0.8, top_k=50, top_p=0.9, seed=seeds, step=steps, out=out)  # noqa: E731
    case = Case(f"sample top-k 50, top-p 0.9, {B}x{V}", call, bytes=4.0 * B * V)
    if (torch := library("torch")) and (flashinfer := library("flashinfer")):
        a = of_torch(x)
        case.peers["flashinfer"] = lambda: flashinfer.sampling.top_k_top_p_sampling_from_probs(torch.softmax(a / 0.8, -1), 50, 0.9)
    return case


def adamw() -> Case:
    n = small(124_439_808, 1000)
    p, g, m, v = (rand(n, dtype=np.float32, scale=s) for s in (1.0, 0.1, 0.0, 0.0))
    numbers = {"step": device().put(np.ones(1, np.int32)), "lr": device().put(np.full(1, 1e-4, np.float32))}
    case = Case("adamw, 124M parameters", lambda: ops.adamw_step([p], [g], [m], [v], **numbers), bytes=28.0 * n)
    if torch := library("torch"):
        leaf = torch.nn.Parameter(of_torch(p))
        leaf.grad = of_torch(g)
        optimizer = torch.optim.AdamW([leaf], lr=1e-4, fused=True)
        case.peers["torch fused"] = optimizer.step
    return case


def gated() -> Case:
    R, F = small(8192, 3), small(14336, 64)
    gate, up = rand(R, F), rand(R, F)
    case = Case(f"gated silu bfloat16 {R}x{F}", lambda: ops.gated(gate, up, "silu"), bytes=6.0 * R * F)
    if library("torch") and (liger := library("liger_kernel.ops.swiglu")):
        a, b = of_torch(gate), of_torch(up)
        case.peers["Liger"] = lambda: liger.LigerSiLUMulFunction.apply(a, b)
    return case


def rope() -> Case:
    B, T, H, D = small(4, 1), small(4096, 8), small(32, 2), small(128, 16)
    x, cos, sin = rand(B, T, H, D), rand(T, D // 2, dtype=np.float32), rand(T, D // 2, dtype=np.float32)
    return Case(f"rope bfloat16 {B}x{T}x{H}x{D}", lambda: ops.rope(x, cos, sin), bytes=4.0 * B * T * H * D)


def linear_cross_entropy() -> Case:
    R, C, V = small(8192, 6), small(768, 16), small(50257, 50)
    x, w, targets = rand(R, C), rand(V, C, scale=0.02), device().put((np.arange(R) % V).astype(np.int32))
    call = lambda: ops.linear_cross_entropy(Tensor(x, requires_grad=True), Tensor(w, requires_grad=True), targets).backward()  # noqa: E731
    case = Case(f"linear_cross_entropy and gradients, bfloat16 {R}x{C}x{V}", call, operations=6.0 * R * C * V)
    if library("torch") and (liger := library("liger_kernel.ops.fused_linear_cross_entropy")):
        a, b, t = of_torch(x), of_torch(w), of_torch(targets).long()
        apply = liger.LigerFusedLinearCrossEntropyFunction.apply
        case.peers["Liger"] = lambda: apply(a.detach().requires_grad_(), b.detach().requires_grad_(), t)
    return case


CASES: list[tuple[Callable[..., Case], tuple[Any, ...]]] = [
    (copy, ()),
    *((linear, s) for s in ((8192, 8192, 8192), (4096, 4096, 4096), (1, 14336, 4096), (32, 14336, 4096))),
    *((attention, s) for s in ((128,), (64,), (128, True), (64, True))),
    (decode, ()),
    *((norm, (kind, backward)) for kind in ("rms_norm", "layer_norm") for backward in (False, True)),
    *((cross_entropy, (v,)) for v in (131072, 50257)),
    *((sampling, (b,)) for b in (1, 32)),
    (linear_cross_entropy, ()),
    (adamw, ()),
    (gated, ()),
    (rope, ()),
]


# --- how they are timed ---


def waiter() -> Call:
    return device().synchronize


def round_of(call: Call, calls: int, wait: Call) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def timed(calls: dict[str, Call], rounds: int = 5) -> dict[str, float | None]:
    """Seconds of each, taking turns."""
    torch = library("torch")
    waits = {who: waiter() if who == "ours" else torch.cuda.synchronize for who in calls}
    if DRY:
        return {who: round_of(call, 1, waits[who]) for who, call in calls.items()}
    best: dict[str, float | None] = {}
    often: dict[str, int] = {}
    for who, call in calls.items():
        try:
            call()
            first = min(round_of(call, 1, waits[who]) for _ in range(3))
            often[who] = max(1, min(1000, int(0.05 / max(first, 1e-7))))
            best[who] = first
        except Exception as e:
            print(f"{who}: {e}", file=sys.stderr)
            best[who] = None
    for _ in range(rounds):
        for who, call in calls.items():
            if (so_far := best[who]) is not None:
                best[who] = min(so_far, round_of(call, often[who], waits[who]))
    return best


def kernels() -> Iterator[dict[str, Any]]:
    """Every case: milliseconds of ours and the peers, TFLOP/s, TB/s."""
    for make, arguments in CASES:
        try:
            case = make(*arguments)
            seconds = timed({"ours": case.ours} | case.peers)
        except Exception as e:
            yield {"kind": "kernel", "name": f"{make.__name__}{arguments}", "error": f"{type(e).__name__}: {e}"[:300]}
            continue
        row: dict[str, Any] = {"kind": "kernel", "name": case.name}
        row |= {f"{who} ms": None if s is None else 1e3 * s for who, s in seconds.items()}
        ours = seconds["ours"]
        if ours is None:
            row["error"] = "see stderr"
        elif case.operations:
            row["TFLOP/s"] = case.operations / ours / 1e12
        if ours and case.bytes:
            row["TB/s"] = case.bytes / ours / 1e12
        yield row
        del case


def train() -> dict[str, Any]:
    """GPT-2 124M, bfloat16, on random tokens."""
    from fastlm.train import train as run

    tiny = {"n_layer": 1, "n_head": 1, "d_model": 16, "vocab_size": 61, "context": 16} if DRY else {}
    config = models.preset("gpt2", **tiny)
    batch, context, steps = small(32, 1), small(1024, 8), small(20, 3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 2 * batch * context * steps).astype(np.int32)
    where: Any = device() if DRY else "cuda"
    times = [time.perf_counter()]
    model = models.create(config, device=where)
    for _ in run(model, tokens, steps=steps, batch=batch, context=context, device=where, dtype="float32" if DRY else "bfloat16"):
        times.append(time.perf_counter())
    later = times[-1] - times[len(times) // 2]
    rate = batch * context * (len(times) - 1 - len(times) // 2) / max(later, 1e-9)
    return {"kind": "model", "name": f"train GPT-2, batch {batch}x{context}", "tokens/s": rate}


def generate(batch: int) -> dict[str, Any]:
    """SmolLM2-135M's shape, greedy, prompts of 128 ids."""
    from fastlm.generate import Settings, steps

    shape = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "d_model": 576, "d_ff": 1536, "vocab_size": 49152, "context": 8192}
    tiny = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 24, "vocab_size": 61, "context": 32}
    config = models.LlamaConfig(**(tiny if DRY else shape))
    where: Any = device() if DRY else "cuda"
    model = models.create(config, device=where, dtype="float32" if DRY else "bfloat16")
    new, prompt = small(512, 4), small(128, 3)
    prompts = [[(7 * i + b) % config.vocab_size for i in range(prompt)] for b in range(batch)]
    times = [time.perf_counter() for _ in steps(model, prompts, Settings(max_tokens=new))]
    middle = len(times) // 4
    rate = (len(times) - 1 - middle) / max(times[-1] - times[middle], 1e-9)
    return {"kind": "model", "name": f"decode SmolLM2-135M's shape, bfloat16, batch {batch}", "tokens/s": rate}


def whole() -> Iterator[dict[str, Any]]:
    for f, arguments in ((train, ()), (generate, (1,)), (generate, (small(32, 2),))):
        try:
            yield f(*arguments)
        except Exception as e:
            yield {"kind": "model", "name": f"{f.__name__}{arguments}", "error": f"{type(e).__name__}: {e}"[:300]}


def emulator() -> Iterator[dict[str, Any]]:
    """The first cases of operations, CUDA C++: largest difference between this device and the emulated one, relative to the output."""
    from fastlm.cuda import runtime
    from fastlm.testing import cases, oracle, put_all, rng, taken
    from tests.gpu.build import gpu_build

    folder, real = ROOT / "build/emulated", device()
    for op in ["adamw"] if DRY else gpu_build().cuda_ops():
        if not (ROOT / f"kernels/{op}/{op}_ref.py").exists():
            continue
        try:
            module = importlib.import_module(f"tests.kernels.test_{op}")
            call = getattr(module, "call", None) or getattr(ops, op)
            case = next(c for c in cases(op) if not c.get("large"))
            inputs = oracle(op).inputs(case, rng(case))
            found = []
            gpu_build().emulate(op, folder)
            gpu_build().emulate("add", folder)
            with emulated(twin="cuda", libraries=folder, seed=1) as on:
                y = call(**put_all(inputs, on.put))
                found.append([taken(a) for a in (y if isinstance(y, tuple) else (y,))])
            runtime.use(real)
            y = call(**put_all(inputs, real.put))
            found.append([taken(a) for a in (y if isinstance(y, tuple) else (y,))])
            worst = max(
                float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0) / max(float(np.max(np.abs(a), initial=0.0)), 1e-30))
                for a, b in zip(*found, strict=True)
            )
            yield {"kind": "emulator", "name": f"{op}, CUDA C++", "largest difference": worst}
        except Exception as e:
            yield {"kind": "emulator", "name": f"{op}, CUDA C++", "error": f"{type(e).__name__}: {e}"[:300]}


def main() -> int:
    what = {"kernels": kernels, "models": whole, "emulator": emulator}[sys.argv[1]]
    with contextlib.ExitStack() as stack:
        if DRY:
            import fastlm.cuda.interpreter  # noqa: F401  before triton

            stack.enter_context(emulated(twin="triton", libraries=ROOT / "build/emulated"))
        for row in what():
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
