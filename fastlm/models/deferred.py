"""A whole forward pass in one go: see `backend.deferred`. Its Python runs first, warm, and the kernels follow without it.

The first pass of each kind is also made in the ordinary way, with the same bits, else all later ones are: `why_not(model)` says why, and
the logger "fastlm.models" says it once. FASTLM_RECORD=0 turns it off.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from fastlm import backend
from fastlm.backend import Array

log = logging.getLogger("fastlm.models")

# model -> kind of pass -> "" where it was found to have the same bits, else why it is not deferred
_verdicts: weakref.WeakKeyDictionary[Any, dict[Hashable, str]] = weakref.WeakKeyDictionary()


def why_not(model: Any) -> list[str]:
    """Why passes of this model are not deferred: an empty list where every one so far was, or none was tried."""
    return sorted({verdict for verdict in _verdicts.get(model, {}).values() if verdict})


def in_one_go(model: Any, kind: Hashable, forward: Callable[[], Array]) -> Array:
    """forward(), an array of the host in memory of its own. kind: tells apart passes that do not take the same way through Python."""
    verdicts = _verdicts.setdefault(model, {})
    verdict = verdicts.get(kind)
    if verdict or os.environ.get("FASTLM_RECORD", "1") == "0" or backend.recording():
        return forward()
    if verdict == "":
        return _copy(backend.deferred(forward))
    try:
        found = _copy(backend.deferred(forward, spoil=True))
        reason = ""
    except Exception as e:  # where the pass itself is wrong, the ordinary one raises the same
        found, reason = None, str(e) or type(e).__name__
    expected = forward()
    if found is not None and found.tobytes() != expected.tobytes():
        reason = "put off, it gives other numbers: it computes outside kernels"
    if reason and reason not in why_not(model):
        log.warning("%s: kernels run one by one, slower: %s", type(model).__name__, reason)
    verdicts[kind] = reason
    return expected


def _copy(x: Array) -> Array:
    """x, which holds the memory of the whole pass, in memory of its own."""
    kept = backend.empty(x.shape, x.dtype)
    kept[...] = x
    return kept
