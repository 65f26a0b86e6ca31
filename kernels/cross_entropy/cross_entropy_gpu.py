"""Softmax cross-entropy on the GPU, the host's side: the functions of csrc/bind/cross_entropy.cpp, launching either twin.

Nothing is read back: the number of targets that count, and what the loss is divided by, stay on the device.
"""

from __future__ import annotations

from typing import Any

HELD = 2 << 10  # bytes of shared memory that the CUDA C++ twin uses beside what it keeps of a row


def cross_entropy_narrow(gpu: Any, narrow: Any, targets: Any) -> None:
    """narrow (int32) = targets (int64); what int32 does not hold becomes its lowest number, which is no target."""
    named = {"narrow": narrow, "targets": targets, "n": targets.size}
    grid = (-(-targets.size // 1024),)
    if gpu.twin == "cuda":
        gpu.cuda("cross_entropy_narrow", grid, 256, list(named.values()))
        return
    gpu.triton("cross_entropy_narrow", grid, named, plain=("n",), BLOCK=1024)


def cross_entropy_scale(gpu: Any, scale: Any, targets: Any, ignore_index: int, mean: bool) -> None:
    """scale (1,) = 1 / max(targets that are not ignored, 1) where `mean`, else 1."""
    arguments = {"scale": scale, "targets": targets, "R": targets.size, "ignore_index": ignore_index, "mean": int(mean)}
    if gpu.twin == "cuda":
        gpu.cuda("cross_entropy_scale", (1,), 256, list(arguments.values()))
        return
    gpu.triton("cross_entropy_scale", (1,), arguments, plain=("R", "ignore_index", "mean"), BLOCK=1024)


def cross_entropy_forward(
    gpu: Any, loss: Any, stats: Any, dlogits: Any, logits: Any, targets: Any, ignore_index: int, scale: Any
) -> None:
    """scale: (1,) on the device. A target that is neither ignored nor in the vocabulary gives nan."""
    V, R = logits.shape[-1], loss.size
    if R == 0:
        return
    if gpu.twin == "cuda":
        kept = _kept(gpu, logits, V)
        arguments = [loss, stats, dlogits, logits, targets, scale, V, ignore_index, kept]
        gpu.cuda(f"cross_entropy_forward_{_suffix(logits)}", (R,), _threads(V), arguments, shared=kept)
        return
    named = {"loss": loss, "stats": stats, "dlogits": dlogits, "logits": logits, "targets": targets, "scale": scale}
    plain = ("ignore_index",) if dlogits is not None else ("ignore_index", "V")
    gpu.triton("cross_entropy_forward", (R,), named | {"V": V, "ignore_index": ignore_index}, plain=plain, warps=8, BLOCK=4096)


def cross_entropy_backward(gpu: Any, dlogits: Any, dy: Any, logits: Any, stats: Any, targets: Any, ignore_index: int) -> None:
    V, R = logits.shape[-1], dy.size
    named = {"dlogits": dlogits, "dy": dy, "logits": logits, "stats": stats, "targets": targets, "V": V}
    named["ignore_index"] = ignore_index
    grid = (R, -(-V // 4096))
    if gpu.twin == "cuda":
        gpu.cuda(f"cross_entropy_backward_{_suffix(logits)}", grid, 256, list(named.values()))
        return
    gpu.triton("cross_entropy_backward", grid, named, plain=("V", "ignore_index"), warps=8, BLOCK=4096)


def cross_entropy_total(gpu: Any, total: Any, loss: Any, scale: Any) -> None:
    """total () = the sum of the losses * scale, in float64."""
    named = {"total": total, "loss": loss, "scale": scale, "R": loss.size}
    if gpu.twin == "cuda":
        gpu.cuda("cross_entropy_total", (1,), 256, list(named.values()))
        return
    gpu.triton("cross_entropy_total", (1,), named, plain=("R",), BLOCK=1024)


def log_softmax(gpu: Any, y: Any, logits: Any) -> None:
    V = logits.shape[-1]
    R = logits.size // V if V else 0
    if R == 0:
        return
    if gpu.twin == "cuda":
        kept = _kept(gpu, logits, V)
        gpu.cuda(f"log_softmax_{_suffix(logits)}", (R,), _threads(V), [y, logits, V, kept], shared=kept)
        return
    gpu.triton("log_softmax", (R,), {"y": y, "logits": logits, "V": V}, plain=("V",), warps=8, BLOCK=4096)


def log_softmax_backward(gpu: Any, dx: Any, dy: Any, y: Any) -> None:
    """dx = dy - exp(y) * sum(dy), by rows."""
    V = y.shape[-1]
    R = y.size // V if V else 0
    if gpu.twin == "cuda":
        gpu.cuda(f"log_softmax_backward_{_suffix(y)}", (R,), 256, [dx, dy, y, V])
        return
    gpu.triton("log_softmax_backward", (R,), {"dx": dx, "dy": dy, "y": y, "V": V}, plain=("V",), warps=8, BLOCK=4096)


def scale_by(gpu: Any, y: Any, x: Any, a: Any, add: bool) -> None:
    """y = a x, or y += a x; a: () float32 on the device. Nothing is read or written where that leaves y as it is."""
    named = {"y": y, "x": x, "a": a, "n": x.size, "add": int(add), "same": int(y.pointer == x.pointer)}
    grid = (-(-x.size // 1024),)
    if gpu.twin == "cuda":
        gpu.cuda(f"scale_by_{_suffix(y)}", grid, 256, list(named.values()))
        return
    gpu.triton("scale_by", grid, named, plain=("n", "add", "same"), BLOCK=1024)


def _threads(V: int) -> int:
    return 256 if V <= 8192 else 512


def _kept(gpu: Any, logits: Any, V: int) -> int:
    """Bytes of a row that a block keeps."""
    room: int = gpu.device.shared_memory - HELD
    return min(-(-V * logits.dtype.itemsize // 16) * 16, room // 16 * 16)


def _suffix(x: Any) -> str:
    return "bf16" if x.dtype.itemsize == 2 else "fp32"
