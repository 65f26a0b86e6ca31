"""Files of weights and configurations: GGUF, safetensors, llama2.c, JSON. Strict readers, atomic writers, memory-mapped arrays."""

from fastlm.checkpoint.errors import FormatError
from fastlm.checkpoint.gguf import GGUF, read_gguf
from fastlm.checkpoint.quantized import QuantizedArray

__all__ = ["GGUF", "FormatError", "QuantizedArray", "read_gguf"]
