"""Files of weights and configurations: GGUF, safetensors, llama2.c, JSON. Strict readers, atomic writers, memory-mapped arrays."""

from fastlm.checkpoint.atomic import atomic_write, sync_folder
from fastlm.checkpoint.errors import FormatError
from fastlm.checkpoint.gguf import GGUF, read_gguf
from fastlm.checkpoint.jsonfile import read_json, write_json
from fastlm.checkpoint.llama2c import convert_llama2c, read_llama2c
from fastlm.checkpoint.quantized import QuantizedArray, quantize
from fastlm.checkpoint.safetensors import read_safetensors, write_safetensors

__all__ = [
    "GGUF",
    "FormatError",
    "QuantizedArray",
    "atomic_write",
    "convert_llama2c",
    "quantize",
    "read_gguf",
    "read_json",
    "read_llama2c",
    "read_safetensors",
    "sync_folder",
    "write_json",
    "write_safetensors",
]
