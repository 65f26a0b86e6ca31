"""LM: a model and its tokenizer, text in and text out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np

from fastlm import backend, evaluate, generate, hub
from fastlm.backend import Array
from fastlm.models import quantize as storage
from fastlm.models.base import CausalLM, LanguageModel
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.models.xlnet import XLNet
from fastlm.nn import cache_dtype
from fastlm.ops import check

if TYPE_CHECKING:
    from fastlm.generate import Output
    from fastlm.tokenizers import Tokenizer


class Options(TypedDict, total=False):
    """How text is generated. What is not given is as here: greedy, with nothing else on."""

    temperature: float  # 0.0: greedy, the most likely token each time
    top_k: int  # 0: off; else of the k most likely
    top_p: float  # 1.0: off; else of the most likely that together have this probability
    min_p: float  # 0.0: off; else of those at least this times as likely as the most likely
    repetition_penalty: float  # 1.0: off; above 1 what was said is less likely
    no_repeat_ngram: int  # 0: off; else no n tokens occur twice
    min_tokens: int  # 0; eos is not chosen before
    beams: int  # 1: no beam search; else deterministic, the best of so many beams
    length_penalty: float  # 1.0; of beams: scores are divided by length^length_penalty
    early_stopping: bool | str  # False; of beams: False, True or "never"
    stop: str | Sequence[str] | None  # strings that end the text and are cut from it
    eos: int | Sequence[int] | None  # ids that end the text; the tokenizer's if not given
    seed: int | Sequence[int]  # 0; of the random choice; a list has one for each prompt
    past: generate.Past | None  # None; what was read of one sequence before: a prompt that begins as it did is read from there on


_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_BEAMS = {"length_penalty", "early_stopping"}

ENOUGH = 256  # tokens for a thread that works on texts of its own


def load(
    path_or_id: str | os.PathLike[str],
    dtype: str | None = None,
    activations: str = "float32",
    cache: str = "float32",
    device: Any = "cpu",
) -> LM:
    """The language model of a Hugging Face folder, a GGUF file, or a Hugging Face id ("org/name").

    dtype None keeps the weights as they are stored (quantised ones too); "float32" or "bfloat16" converts them. activations: what
    quantised weights are multiplied with, see LM.activations. cache: how keys and values are kept, see LM.cache. device: "cpu", or "cuda"
    for the GPU, see LM.to. Raises FileNotFoundError where nothing is found, a ValueError that lists what is wrong with a file, and a
    RuntimeError that says why no GPU can be used.
    """
    where = backend.device(device)
    lm = LM(*hub.load_folder_or_gguf(path_or_id, dtype))
    lm.activations = activations
    lm.cache = cache
    return lm if where is None else lm.to(where)


class LM:
    """A language model: `model`, over ids, and `tokenizer`, or None where the folder has none; then only ids go in."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        if not isinstance(model, LanguageModel):
            raise TypeError(f"[lm] model must be one of fastlm.models, got {model!r:.60}. fastlm.load reads a folder or file.")
        if isinstance(tokenizer, (str, os.PathLike)):
            raise TypeError(f"[lm] tokenizer must be a fastlm.Tokenizer, got {tokenizer!r:.60}. Tokenizer.from_folder reads one.")
        self.model = model
        self.tokenizer = tokenizer

    def _reading(self, prompts: list[Any]) -> tuple[generate.Continues, list[Any]]:
        """What continues the prompts, and the prompts that it continues: a causal model itself, or a decoder of these sources."""
        if isinstance(self.model, EncoderDecoder):
            reading = generate.Reading(self.model, prompts)
            return reading, reading.prompts
        return self.causal, prompts

    @property
    def causal(self) -> CausalLM:
        """The model, which must be a causal one: ValueError for others."""
        if not isinstance(self.model, CausalLM):
            raise ValueError(f"[lm] {type(self.model).__name__} is not a causal model: it does not continue text")
        return self.model

    # Storage

    def quantize(self, kind: str, activations: str | None = None) -> LM:
        """Puts the matrices into ggml's blocks, in place: "Q8_0", "Q4_0", "Q4_1", "Q5_0" or "Q5_1"; or "Q8_ROW", "LOSSLESS". Returns self.

        LOSSLESS keeps every bit of float32 and bfloat16 matrices in 28 and 12 bits a weight: the same results, and decoding one sequence,
        which reads them all for each id, is faster, from bfloat16 by about a third.

        Q8_ROW is the fastest for prompts, batches and encoders: 8 bits with one scale a row, multiplied with rows of x that are rounded
        the same way (`activations` is "int8" then). Encoders with heads of 64 or more attend in 8 bits, too. The
        head and the token embedding become Q8_0.

        These are the weights of the linear layers, the token embedding and the head; those whose rows are no multiple of 32 long, and
        routers of experts, stay as they are. The bytes are those of ggml's reference quantisers. activations: None keeps what is set.
        The model can then not be trained; `save` writes the quantised weights as float32, which no file of the hub's kind can hold
        otherwise, LOSSLESS ones as they were. `to("float32")` and `to("bfloat16")` undo it.
        """
        storage.quantize(self.model, kind, activations)
        return self

    def to(self, device: Any, dtype: str | None = None) -> LM:
        """Puts the model on a device, "cuda" or "cpu", and stores its weights as `dtype`, in place: to("cuda"), to("bfloat16"),
        to("cuda", "bfloat16"). Returns self.

        "float32" or "bfloat16" is that of the matrices on the CPU, where vectors stay float32, and of all weights and activations on
        the GPU. None keeps it. Every weight is copied once. Quantised matrices go to the GPU as they are, with `dtype` for the rest
        and for activations. Raises RuntimeError that says why where there is no GPU.
        """
        if device in ("float32", "bfloat16") and dtype is None:
            device, dtype = self.model.device, device
        where = backend.device(device)
        if where is None and self.model.device is None and dtype is not None:
            storage.convert(self.model, dtype)
        else:
            self.model.to(where, dtype)
        return self

    @property
    def device(self) -> str:
        """Where the model is: "cpu", or the GPU's name."""
        there = self.model.device
        return "cpu" if there is None else str(there.name)

    @property
    def activations(self) -> str:
        """What quantised weights are multiplied with: "float32", the default, or "int8".

        With float32 a quantised model gives every bit of its dequantised copy. With int8 the input of each product is rounded to 8 bits
        in groups of 32 and the products are sums of integers, as llama.cpp does it: several times faster on prompts and batches, at
        an error like that of Q8_0 weights. What the head reads, where rounding costs most, is rounded to 16 bits. Either way
        the result does not depend on the batch or the threads. Setting "int8" raises ValueError where no weight is quantised.
        """
        return storage.activations_of(self.model)

    @activations.setter
    def activations(self, activations: str) -> None:
        storage.set_activations(self.model, activations)

    @property
    def cache(self) -> str:
        """How keys and values are kept while a text is read or written: "float32", the default, "bfloat16" or "int8".

        bfloat16 takes half the memory, int8, with a scale for each head's vector, a little more than a quarter; attention to long
        texts is faster by nearly as much. They are read as they are, and a text has the same bits alone and in a batch. Setting
        another than "float32" raises ValueError for a model that keeps none.
        """
        return self.model.cache_dtype

    @cache.setter
    def cache(self, cache: str) -> None:
        cache_dtype(cache)
        if cache != "float32" and (isinstance(self.model, XLNet) or not isinstance(self.model, (CausalLM, EncoderDecoder))):
            raise ValueError(
                f"[cache] {type(self.model).__name__} keeps no keys and values: cache must be 'float32', got {cache!r}."
            )
        self.model.cache_dtype = cache

    # Text

    @overload
    def generate(self, prompt: str, max_tokens: int = ..., **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_tokens: int = ..., **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | list[str], max_tokens: int = 32, **options: Unpack[Options]) -> str | list[str]:
        """The text that follows the prompt; a list of prompts gives a list of texts. The prompt itself is not repeated.

        Options (see Options): temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram=0, min_tokens=0,
        beams=1, length_penalty=1.0, early_stopping=False, stop=None, eos (default the tokenizer's), seed=0, past=None (a
        fastlm.Past, for talks and prompts with a common beginning). A prompt gives the same text alone and in a list; give a list of
        seeds to draw several samples of one prompt. Stop strings may begin and end inside tokens.

        The text ends at max_tokens, at eos, at a stop string, or at the end of the model's context: prompt and text together are
        at most `model.config.context` tokens. A prompt that fills the context alone is refused.
        """
        prompts = [prompt] if isinstance(prompt, str) else _several("generate", "prompt", "a str, or a list of them", prompt)
        texts = self._complete([self._encode(p) for p in prompts], max_tokens, options)
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, max_tokens: int = 32, **options: Unpack[Options]) -> Iterator[str]:
        """The text of `generate` in pieces, as they become certain; takes its options, but for beams."""
        yield from self._stream(self._encode(prompt), max_tokens, options)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], max_tokens: int = 256, **options: Unpack[Options]) -> str:
        """The model's answer to a chat: `[{"role": "user", "content": "..."}]`, or a str, which is one message of the user.

        With past=fastlm.Past(), given to every call of a talk, only what is new is read; the answers are the same.
        """
        return self._complete([self._chat_ids(messages)], max_tokens, options)[0]

    def chat_stream(
        self, messages: str | Sequence[Mapping[str, Any]], max_tokens: int = 256, **options: Unpack[Options]
    ) -> Iterator[str]:
        """`chat` in pieces."""
        yield from self._stream(self._chat_ids(messages), max_tokens, options)

    def perplexity(self, text: str | Sequence[int], context: int | None = None, stride: int | None = None) -> float:
        """exp of the mean negative log-likelihood of the text's tokens (or of ids). Windows of `context` tokens, default the model's,
        begin every `stride`, default half of it; see fastlm.evaluate."""
        if isinstance(self.model, XLNet):
            raise ValueError(
                "[perplexity] XLNet predicts in any order, a place at a time: it gives no likelihood from left to right"
            )
        return evaluate.perplexity(self.causal, self._ids(text), context, stride)

    # Encoders

    def embed(self, texts: str | Sequence[str] | Sequence[Sequence[int]], batch_tokens: int = 1280) -> Array:
        """One vector for each text, or each list of ids: (N, C) float32; (C,) for one text.

        The mean over the tokens or the first token's state, of length 1 or not, as the checkpoint's sentence-transformers files say
        (`model.pooling`); the plain mean where there are none. Longer texts are cut to the longest that these files or the model
        allow. Texts lie one behind the other without padding, up to `batch_tokens` tokens at a time, each thread its own; a text has the
        same vector alone and in company.
        """
        if not isinstance(self.model, Encoder):
            raise ValueError(f"[embed] the model must be an encoder, got {type(self.model).__name__}")
        if isinstance(texts, str):
            one: Array = self.embed([texts], batch_tokens)[0]
            return one
        given = _several("embed", "texts", "a str, or a list of them or of lists of ids", texts)
        batch_tokens = check.integer("embed", "batch_tokens", batch_tokens, 1, wrong=ValueError)
        if given and all(isinstance(text, str) for text in given):
            ids = self._need_tokenizer().encode_batch(given)
        else:
            ids = [_row(i, text) for i, text in enumerate(given)]
        bad = next((i for i, row in enumerate(ids) if not row), None)
        if bad is not None:
            raise ValueError(f"[embed] every text must have a token, got none in number {bad}")
        pooling, longest = self.model.pooling, self.model.max_tokens
        longest = min(longest, pooling.max_tokens or longest)
        ids = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in ids]  # keeps [SEP]
        model = self.model

        def vectors(part: slice) -> Array:
            rows = ids[part]
            return pooling(model.packed_states(rows), np.array([len(row) for row in rows]))

        parts = list(_parts([len(row) for row in ids], batch_tokens, backend.num_threads()))
        pooled = backend.each(vectors, parts) if model.device is None else [vectors(part) for part in parts]
        return np.concatenate(pooled) if pooled else np.empty((0, self.model.config.d_model), np.float32)

    # Ids

    @overload
    def generate_ids(self, ids: Sequence[int], max_tokens: int = ..., **options: Unpack[Options]) -> list[int]: ...
    @overload
    def generate_ids(self, ids: Sequence[Sequence[int]], max_tokens: int = ..., **options: Unpack[Options]) -> list[list[int]]: ...
    def generate_ids(self, ids: Any, max_tokens: int = 32, **options: Unpack[Options]) -> Any:
        """The new ids after a prompt of ids, with the one of `eos` that ended them; a list of prompts gives a list.

        Options as of `generate`, without `stop`; eos is one id or several, and None, the default, is none: ids are taken as they are.
        """
        ids = (
            ids if isinstance(ids, np.ndarray) and ids.ndim else _several("generate", "ids", "a list of ids, or of such lists", ids)
        )
        batch = len(ids) > 0 and hasattr(ids[0], "__len__")
        outputs = self._run(list(ids) if batch else [ids], max_tokens, dict(options))
        found = [output.ids for output in outputs]
        return found if batch else found[0]

    def logits(self, ids: Any, decoder_ids: Any = None, *, mask: Any = None, segments: Any = None, **given: Any) -> Array:
        """float32 logits. ids: (T,), (B, T), or a text.

        A causal model: (T, V) or (B, T, V). An encoder: those of its head, with mask (1 a token, 0 padding) and segments in the shape
        of ids. An encoder-decoder model: ids is the source, decoder_ids (T,) or (B, T) the decoder's inputs as given, nothing shifted;
        mask is of the source. XLNet: also perm_mask (T, T) or (B, T, T), target_mapping (N, T) or (B, N, T) and mems, what
        `lm.model.logits_and_mems` returned; see fastlm.models.xlnet.
        """
        batch, one = _batch("ids", self._ids(ids))
        mask, segments = _like(one, mask), _like(one, segments)
        model = self.model
        if unknown := [k for k in given if not isinstance(model, XLNet) or k not in ("perm_mask", "target_mapping", "mems")]:
            raise TypeError(f"[logits] {type(model).__name__} takes no {', '.join(unknown)}")
        if isinstance(model, EncoderDecoder):
            if decoder_ids is None or segments is not None:
                raise ValueError("[logits] an encoder-decoder model takes ids, decoder_ids and mask")
            out = model.logits(batch, _like(one, decoder_ids), mask)
        elif decoder_ids is not None:
            raise ValueError(f"[logits] decoder_ids must be None: {type(model).__name__} has no decoder beside an encoder")
        elif isinstance(model, Encoder):
            out = model.logits(batch, mask, segments)
        elif isinstance(model, XLNet):
            given = {k: v if k == "mems" else _like(one, v) for k, v in given.items()}
            out = model.logits(batch, mask=mask, segments=segments, **given)
        elif mask is None and segments is None:
            out = self.causal.logits(batch)
        else:
            raise ValueError(
                f"[logits] mask and segments must be None: {type(model).__name__} is causal, padding on the right needs none"
            )
        return out[0] if one else out

    def hidden(self, ids: Any, *, mask: Any = None, segments: Any = None) -> Array:
        """An encoder's states after the last layer: float32 (T, C) for ids (T,) or a text, (B, T, C) for ids (B, T)."""
        if not isinstance(self.model, Encoder):
            raise ValueError(f"[hidden] the model must be an encoder, got {type(self.model).__name__}")
        batch, one = _batch("ids", self._ids(ids))
        out = self.model.states(batch, _like(one, mask), _like(one, segments))
        return out[0] if one else out

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face folder, which `load` and transformers read: config.json, model.safetensors, the tokenizer's files."""
        hub.save(self.model, self.tokenizer, folder)

    def __repr__(self) -> str:
        parameters = self.model.named_parameters().values()
        kinds = sorted({str(getattr(p.data, "kind", p.data.dtype)) for p in parameters})
        count = sum(int(np.prod(p.shape)) for p in parameters)
        return (
            f"LM({type(self.model).__name__}, {count / 1e6:.1f}M parameters, {'+'.join(kinds)}, "
            f"context {self.model.config.context}, {self.tokenizer or 'no tokenizer'})"
        )

    # Within

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("[lm] this model has no tokenizer: give ids to generate_ids and logits, or set lm.tokenizer")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        """A prompt's ids; an empty one is bos alone."""
        tokenizer = self._need_tokenizer()
        ids = tokenizer.encode(text)
        return ids or ([] if tokenizer.bos_id is None else [tokenizer.bos_id])

    def _ids(self, text: Any) -> Any:
        return self._need_tokenizer().encode(text) if isinstance(text, str) else text

    def _chat_ids(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._need_tokenizer()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return tokenizer.encode(tokenizer.chat(messages), special_tokens=False)

    def _run(
        self, prompts: list[Any], max_tokens: int, options: dict[str, Any], stop: Any = None, beam_stop: Any = None
    ) -> list[Output]:
        beams, seed, rest = _split(options)
        if beams == 1:
            past = rest.pop("past", None)
            choice = generate.Settings(max_tokens=max_tokens, **rest)
            if not prompts and isinstance(self.model, EncoderDecoder):
                return []  # there is no source to read
            model, starts = self._reading(prompts)
            return generate.generate(model, starts, choice, seed, stop, past)
        settings = generate.BeamSettings(beams=beams, max_tokens=max_tokens, **rest)
        outputs = []
        for prompt in prompts:
            model, starts = self._reading([prompt])
            outputs.append(generate.beam_search(model, starts[0], settings, beam_stop(prompt) if beam_stop else None))
        return outputs

    def _complete(self, prompts: list[list[int]], max_tokens: int, options: Options) -> list[str]:
        tokenizer, given, stops = self._prepare(options)
        texts = [Text(tokenizer, self._before(prompt), stops, given["eos"]) for prompt in prompts]
        if given.get("beams", 1) != 1:

            def hits(prompt: list[int]) -> Any:
                return lambda ids: Text(tokenizer, self._before(prompt), stops, given["eos"]).all(ids)[1]

            outputs = self._run(prompts, max_tokens, given, None, hits if stops else None)
            return [text.all(output.ids)[0] for text, output in zip(texts, outputs, strict=True)]
        pieces: list[list[str]] = [[] for _ in prompts]

        def put(index: int, id: int) -> bool:
            pieces[index].append(texts[index].put(id))
            return texts[index].stopped

        self._run(prompts, max_tokens, given, put)
        return ["".join(piece) + text.finish() for piece, text in zip(pieces, texts, strict=True)]

    def _stream(self, prompt: list[int], max_tokens: int, options: Options, ids: list[int] | None = None) -> Iterator[str]:
        """The text in pieces; `ids` is given each id before the piece that it makes."""
        tokenizer, given, stops = self._prepare(options)
        beams, seed, rest = _split(given)
        if beams != 1:
            raise ValueError("[stream] beams must be 1: the best of several beams is known only at the end; use generate")
        text = Text(tokenizer, self._before(prompt), stops, given["eos"])
        model, starts = self._reading([prompt])
        past = rest.pop("past", None)
        for _, id in generate.steps(model, starts, generate.Settings(max_tokens=max_tokens, **rest), seed, past=past):
            if ids is not None:
                ids.append(id)
            piece = text.put(id)
            if piece:
                yield piece
            if text.stopped:
                return
        piece = text.finish()
        if piece:
            yield piece

    def _before(self, prompt: list[int]) -> list[int]:
        """The ids that the new text follows: the prompt, but nothing of a source."""
        return [] if isinstance(self.model, EncoderDecoder) else prompt

    def _prepare(self, options: Options) -> tuple[Tokenizer, dict[str, Any], tuple[str, ...]]:
        """The tokenizer, the options without stop and with eos, and the stop strings."""
        tokenizer, given = self._need_tokenizer(), dict(options)
        given["eos"] = generate.ids_of("eos", given.get("eos", tokenizer.end_ids))
        stops: Any = given.pop("stop", None)
        return tokenizer, given, stop_strings(stops)


def _several(op: str, name: str, what: str, x: Any) -> list[Any]:
    """x as a list, or a TypeError that says what is wanted."""
    if isinstance(x, (str, bytes, Mapping)) or not hasattr(x, "__iter__") or getattr(x, "ndim", 1) == 0:
        raise TypeError(f"[{op}] {name} must be {what}, got {x!r:.60}")
    return list(x)


def _row(number: int, ids: Any) -> list[int]:
    """The ids of one text of several."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"[embed] texts must all be str or all lists of ids, got {ids!r:.60} as number {number}")
    return [int(i) for i in array]


def _batch(name: str, ids: Any) -> tuple[Array, bool]:
    """ids as (B, T), and whether they were one sequence, (T,)."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise ValueError(
            f"[logits] {name} must be (T,) or (B, T), got sequences of different lengths: give one at a time"
        ) from None
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"[logits] {name} must be (T,) or (B, T) with T at least 1, got {array.shape}")
    return (array[None], True) if array.ndim == 1 else (array, False)


def _parts(lengths: Sequence[int], batch_tokens: int, threads: int) -> Iterator[slice]:
    """Texts in their order, in runs of at most batch_tokens tokens, or one text: about equal, and as many for each thread."""
    total, room = sum(lengths), max(batch_tokens - max(lengths, default=0), (batch_tokens + 1) // 2)
    count = max(1 if total <= batch_tokens else -(-total // room), min(threads, total // ENOUGH))
    count = -(-count // threads) * threads if count > 1 else 1
    first = size = before = part = 0
    for i, length in enumerate(lengths):
        here = (2 * before + length) * count // (2 * total)  # where its middle lies
        if size and (here > part or size + length > batch_tokens):
            yield slice(first, i)
            first, size = i, 0
        part = here
        size += length
        before += length
    if size:
        yield slice(first, len(lengths))


def _like(one: bool, x: Any) -> Any:
    return np.asarray(x)[None] if one and x is not None else x


def _split(options: Mapping[str, Any]) -> tuple[int, Any, dict[str, Any]]:
    """beams, seed, and the fields of generate.Settings or, with beams, of generate.BeamSettings."""
    unknown = sorted(set(options) - set(Options.__annotations__) | ({"stop"} & set(options)))
    if unknown:
        raise TypeError(f"[generate] unknown option {', '.join(unknown)}; there are {', '.join(sorted(Options.__annotations__))}")
    rest = dict(options)
    beams, seed = rest.pop("beams", 1), rest.pop("seed", 0)
    rest["eos"] = generate.ids_of("eos", rest.get("eos"))
    if beams == 1:
        return beams, seed, {k: v for k, v in rest.items() if k not in _BEAMS}
    if rest.pop("past", None) is not None:
        raise ValueError("[generate] past must be None with beams: a search reads its prompt anew")
    for name, off in _SAMPLING.items():
        if rest.pop(name, off) != off:
            raise ValueError(f"[generate] {name} must be {off} with beams, got {options[name]}: beam search draws nothing")
    return beams, seed, rest


class Text:
    """The text of new ids as they come: what is certain, up to a stop string, which is cut off."""

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int], stops: Sequence[str], ends: Iterable[int]) -> None:
        self._decoder = tokenizer.decode_stream(prompt)
        self._stops = tuple(stops)
        self._ends = frozenset(ends)
        self._held = ""  # might be the beginning of a stop string
        self.stopped = False

    def put(self, id: int) -> str:
        """The text that this id makes certain; `stopped` says whether a stop string was met."""
        if self.stopped or id in self._ends:
            return ""
        return self._take(self._decoder.put(id))

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def all(self, ids: Iterable[int]) -> tuple[str, bool]:
        """The whole text of new ids, and whether it met a stop string."""
        text = "".join(self.put(id) for id in ids) + self.finish()
        return text, self.stopped

    def _take(self, more: str) -> str:
        text = self._held + more
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """None, one string or several as a tuple."""
    one = isinstance(stop, str) or not hasattr(stop, "__iter__")
    stops: tuple[Any, ...] = () if stop is None else (stop,) if one else tuple(stop)
    for s in stops:
        if not isinstance(s, str) or not s:
            raise ValueError(f"[generate] stop must be strings that are not empty, got {s!r}")
    return stops
