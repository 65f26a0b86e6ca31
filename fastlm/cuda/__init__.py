"""The GPU: device, arrays on it, and how kernels are found and launched there. Nothing here needs torch or triton at run time."""

from fastlm.cuda.array import DeviceArray, from_dlpack
from fastlm.cuda.runtime import Device, device, status

__all__ = ["Device", "DeviceArray", "device", "from_dlpack", "status"]
