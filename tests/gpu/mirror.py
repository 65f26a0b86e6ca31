"""The emulated device with the CPU's kernels in place of the slow ones: models and recordings are tested in seconds.

The kernels are launched, recorded and given their memory as on a GPU; what differs is that the heavy ones are `fastlm._C`'s, which read
the device's memory where it lies (the emulated device is the host). float32 alone. The twins themselves are tested by test_twins.py, one
operation at a time, and by the models of test_models.py that run on them.
"""

from __future__ import annotations

import ctypes

import numpy as np

from fastlm import _C
from fastlm.cuda.array import DeviceArray
from fastlm.cuda.emulated import Emulated
from fastlm.cuda.recording import recorder
from fastlm.cuda.table import Table, functions

# Kernels with the arguments that they have on the CPU.
SAME = {
    *("matmul", "linear_backward", "linear_activation", "attention_forward", "attention_backward"),
    *("attention_packed_forward", "attention_packed_backward", "layer_norm_forward", "layer_norm_backward", "rms_norm_forward"),
    *("rms_norm_backward", "rope_forward", "embedding_forward", "embedding_backward", "activation_forward", "activation_backward"),
    *("gated_forward", "gated_backward", "cache_append", "scale_add"),
}


# Where the CPU's kernels want memory that the GPU's have themselves: sums of 32 rows each, of one or two parameters.
PARTIAL = {"layer_norm_backward": 3, "rms_norm_backward": 2}


def room(x):
    return np.empty((-(-x.size // max(x.shape[-1], 1) // 32) + 1, 2, x.shape[-1]), np.float32)


def view(a):
    """A device's array as NumPy sees it."""
    if not isinstance(a, DeviceArray):
        return a
    if not a.size:
        return np.empty(a.shape, a.dtype)
    extent = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)) + a.itemsize
    memory = (ctypes.c_uint8 * extent).from_address(a.pointer)
    return np.ndarray(a.shape, a.dtype, buffer=memory, strides=a.strides)


class MirrorTable(Table):
    def __getattr__(self, name):
        if name not in SAME:
            return super().__getattr__(name)
        if name not in functions():
            raise NotImplementedError(f"[cuda] there is no kernel {name} for the GPU yet.")  # so that what is missing shows
        function, device = getattr(_C, name), self._device

        def bound(*arguments):
            assert not any(isinstance(a, np.ndarray) for a in arguments), f"{name}: an array of the host"
            views = [view(a) for a in arguments]  # addresses and numbers, fixed here as a launch fixes them
            if (at := PARTIAL.get(name)) is not None:
                views[at] = room(views[at + 1])
            if (by := recorder()) is not None:
                by.keep(arguments)
            device.launch(lambda grid, given: function(*given), (1, 1, 1), views, name)

        setattr(self, name, bound)
        return bound


class Mirror(Emulated):
    name = "mirror"

    @property
    def table(self):
        found = self.__dict__.get("_mirror")
        if found is None:
            found = self.__dict__["_mirror"] = MirrorTable(self)
        return found
