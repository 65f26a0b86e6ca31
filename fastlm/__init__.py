"""fastlm: train, fine-tune, evaluate and run language models, fast, on the CPU you have."""

from fastlm import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]
