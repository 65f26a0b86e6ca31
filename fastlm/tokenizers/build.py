"""Building `tokenizers` objects from parts: byte-level BPE, scored pieces (sentencepiece BPE) and WordPiece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from fastlm.tokenizers.errors import TokenizerError, typed
from fastlm.tokenizers.patterns import GPT2

_LONGEST = 1024  # characters of a scored piece: cutting it in every way takes the square
SPACE = "\u2581"  # what sentencepiece writes for a space


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    patterns: Sequence[str] = (GPT2,),
    ignore_merges: bool = False,
    add_prefix_space: bool = False,
) -> Backend:
    """Byte-level BPE (Radford et al. 2019): text is split by the patterns, its bytes are written as 256 printable characters and
    merged by rank."""
    with typed("[tokenizer] byte-level BPE"):
        backend = Backend(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=ignore_merges))
        if tuple(patterns) == (GPT2,):
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
        else:
            splits: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [*splits, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)]
            )
        backend.decoder = decoders.ByteLevel()
    return backend


def scored_pieces(vocab: Mapping[str, int], scores: Mapping[str, float], unk: str | None, space_prefix: bool = True) -> Backend:
    """Sentencepiece's BPE: of all neighbouring pieces whose union is a piece, the union of the best score is made first.

    `scores` holds the pieces that may be merged. The merges are found by cutting each piece in two in every way, ranked by score,
    as Hugging Face's conversion does; a character that is no piece becomes its bytes `<0x..>`.
    """
    bad = next((p for p, s in scores.items() if not math.isfinite(s)), None)
    if bad is not None:
        raise TokenizerError(f"[tokenizer] scores must be finite, got {scores[bad]} for the piece {bad!r}")
    long = next((p for p in scores if len(p) > _LONGEST), None)
    if long is not None:
        raise TokenizerError(
            f"[tokenizer] a piece may have {_LONGEST} characters at most, got one of {len(long)}: {long[:40]!r}..."
        )
    merges: list[tuple[float, int, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[piece], vocab[left], vocab[right], left, right))
    merges.sort()
    with typed("[tokenizer] scored pieces"):
        model = models.BPE(
            vocab=dict(vocab),
            merges=[(m[4], m[5]) for m in merges],
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=all(f"<0x{b:02X}>" in vocab for b in range(256)),
        )
        backend = Backend(model)
        spaces = normalizers.Replace(" ", SPACE)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if space_prefix else spaces
        parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if space_prefix:
            parts.append(decoders.Strip(content=" ", left=1, right=0))
        backend.decoder = decoders.Sequence(parts)
    return backend


def word_piece(
    vocab: Mapping[str, int], unk: str = "[UNK]", lowercase: bool = True, chinese: bool = True, accents: bool | None = None
) -> Backend:
    """BERT's WordPiece: longest match first, continuations marked `##`, a word over 100 characters is unknown."""
    with typed("[tokenizer] WordPiece"):
        backend = Backend(models.WordPiece(vocab=dict(vocab), unk_token=unk, max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lowercase
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        if "[CLS]" in vocab and "[SEP]" in vocab:
            backend.post_processor = processors.TemplateProcessing(
                single="[CLS]:0 $A:0 [SEP]:0",
                pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
                special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
            )
    return backend


def add_tokens(backend: Backend, special: Iterable[str] = (), plain: Iterable[str] = ()) -> None:
    """Tokens that are found in the text before anything else: control tokens, and words of their own."""
    with typed("[tokenizer] added tokens"):
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special if t])
        backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain if t])


def surround(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Makes `encode` begin with bos and end with eos, where they are given; replaces what was there."""
    named = [t for t in dict.fromkeys((bos, eos)) if t is not None]
    if not named:
        return
    with typed("[tokenizer] bos and eos"):
        before, after = ([bos] if bos else []), ([eos] if eos else [])
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(t, backend.token_to_id(t)) for t in named],
        )
