"""Text to packed tokens to batches. Knows nothing of tokenizers: `prepare` takes a function from text to ids."""

from fastlm.data.corpus import Corpus, open_corpus, prepare
from fastlm.data.loader import Batch, Loader, windows

__all__ = ["Batch", "Corpus", "Loader", "open_corpus", "prepare", "windows"]
