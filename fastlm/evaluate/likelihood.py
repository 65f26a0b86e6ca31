"""Perplexity: exp of the mean negative log-likelihood of each token after those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.ops import check

if TYPE_CHECKING:
    from fastlm.models.base import CausalLM
    from fastlm.nn import Cache

_LOGITS = 1 << 24  # floats of logits held at once, 64 MiB


def perplexity(model: CausalLM, ids: Sequence[int] | Array, context: int | None = None, stride: int | None = None) -> float:
    """exp of the mean of `negative_log_likelihood` over all tokens that are scored."""
    nll = negative_log_likelihood(model, ids, context, stride)
    mean = float(np.mean(nll, dtype=np.float64))
    return math.exp(mean) if mean < 709 else math.inf if mean == mean else mean


def negative_log_likelihood(
    model: CausalLM, ids: Sequence[int] | Array, context: int | None = None, stride: int | None = None
) -> Array:
    """-log p of every token but those that begin the text or, with stride = context, a window. float32 (n,).

    Sliding windows (Hugging Face, "Perplexity of fixed-length models"): windows of `context` ids, default the model's, begin every
    `stride` ids, default half the context; each token is scored once, in the first window that holds it. A smaller stride gives every
    token more context and takes longer. A window is read in pieces through the cache, so that the logits stay small.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) < 2:
        raise ValueError(f"[perplexity] ids must be at least 2 ids in one list, got shape {array.shape} of {array.dtype}")
    longest = model.config.context
    context = longest if context is None else context
    what = f"an integer from 2 to the model's {longest}"
    context = check.integer("perplexity", "context", context, 2, longest, what, ValueError)
    stride = max(context // 2, 1) if stride is None else stride
    what = f"an integer from 1 to context = {context}"
    stride = check.integer("perplexity", "stride", stride, 1, context, what, ValueError)
    vocab = model.config.vocab_size
    if int(array.min()) < 0 or int(array.max()) >= vocab:
        raise ValueError(f"[perplexity] ids must be from 0 to {vocab - 1}, got {int(array.min())} to {int(array.max())}")
    array = array.astype(np.int32)
    cache = model.new_cache(1, min(context, len(array)))
    parts: list[Array] = []
    scored = 0  # ids before this one are done
    for begin in range(0, len(array), stride):
        end = min(begin + context, len(array))
        parts.append(_window(model, array[begin:end], max(scored - begin, 1), cache))
        scored = end
        if end == len(array):
            break
    return np.concatenate(parts)


def _window(model: CausalLM, ids: Array, first: int, cache: Cache) -> Array:
    """The losses of ids[first:] within one window."""
    cache.lengths[:] = 0
    step = max(16, min(512, _LOGITS // model.config.vocab_size))
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(ids) - 1, step):
        piece = ids[start : min(start + step, len(ids) - 1)]
        stop = start + len(piece)
        if stop < first:  # nothing here is scored
            model.logits(piece[None], cache, last=True)
            continue
        logits = model.logits(piece[None], cache)[0]
        skip = max(first - 1 - start, 0)
        parts.append(ops.cross_entropy(logits[skip:], ids[start + 1 + skip : stop + 1], reduction="none"))
    return np.concatenate(parts)
