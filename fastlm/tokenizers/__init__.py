"""Text to ids and back: Hugging Face folders, GGUF metadata, llama2.c files, and vocabularies trained here.

Every tokenizer is a `tokenizers` object of the Hugging Face library (its Rust does the work) plus what that library leaves out:
which ids begin and end a text, the chat template, and a stream decoder whose pieces add up to `decode`.
"""

from fastlm.tokenizers.errors import TokenizerError
from fastlm.tokenizers.stream import DecodeStream
from fastlm.tokenizers.tokenizer import Tokenizer

__all__ = ["DecodeStream", "Tokenizer", "TokenizerError"]
