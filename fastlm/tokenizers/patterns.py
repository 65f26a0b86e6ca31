"""How a GGUF file's `tokenizer.ggml.pre` splits text into words before merging.

The regular expressions are those of the models' own tokenizer.json files; a word is first cut by the first expression, the pieces
by the second, and so on.
"""

from __future__ import annotations

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _TAIL


_FAMILIES: list[tuple[tuple[str, ...], str]] = [
    (
        (GPT2,),
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de mellum modern-bert mpt olmo jais trillion granite-docling exaone4",
    ),
    ((LLAMA3,), "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral lfm2 dbrx smaug-bpe glm4 chatglm-bpe"),
    ((QWEN2,), "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan"),
    ((r"\p{N}", GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    ((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"), "falcon"),
    ((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"), "default"),
    ((_cased("", r"\p{N}"),), "tekken"),
    ((_cased(_SUFFIX + "?", r"\p{N}{1,3}"),), "gpt-4o llama4"),
]

PATTERNS: dict[str, tuple[str, ...]] = {name: patterns for patterns, names in _FAMILIES for name in names.split()}

# A word that is a token as a whole is not merged from its bytes; these files also start a text with bos unless they say otherwise.
IGNORE_MERGES = frozenset(["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"])
