"""Measuring a language model on ids: perplexity."""

from fastlm.evaluate.likelihood import negative_log_likelihood, perplexity

__all__ = ["negative_log_likelihood", "perplexity"]
