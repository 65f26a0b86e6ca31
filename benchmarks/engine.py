"""What the engines of bench_model.py share: weights in the form that each reads, made once in a temporary folder; the inputs; the choice of
an engine's best set-up.

`engine_<who>.py` has a function for each task that the engine knows, `decode(case)`, `prompt(case)`, `encode(case)`, `translate(case)`. It
returns what is timed, or None where the engine cannot; `named` adds precision and threads to it.
"""

from __future__ import annotations

import gzip
import json
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW = 32, 32  # ids read and written in a decode row; a translation writes TRANSLATED
SOURCE, TRANSLATED = 64, 128
TEXT = next(
    p for p in (Path(__file__).parent / where / "tinyshakespeare.txt.gz" for where in ("../fastlm/cli", "../cli")) if p.exists()
)


def threads() -> int:
    return int(os.environ.get("FASTLM_NUM_THREADS") or len(os.sched_getaffinity(0)))


# --- set-ups ---

_made: list[Any] = []


def made_from(source: Any, make: Callable[[Any], Any]) -> Any:
    """make(source), kept until it is asked for another source: what a library derives from a weight is not timed."""
    if not _made or _made[0] is not source:
        _made[:] = source, make(source)
    return _made[1]


def named(run: Callable[[], Any], label: str, keeps: Any = None) -> Callable[[], Any]:
    """The callable with its label: precision and threads. `keeps`: what must live as long."""
    run.label, run.keeps = label, keeps  # type: ignore[attr-defined]
    return run


def best(options: Iterator[Callable[[], Any]] | Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The fastest of several set-ups, each tried twice, and for a third of a second."""
    options = list(options)
    if len(options) == 1:
        return options[0]
    fastest, least = options[0], float("inf")
    for run in options:
        until, times = time.perf_counter() + 0.3, []
        while len(times) < 2 or time.perf_counter() < until:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        if min(times) < least:
            fastest, least = run, min(times)
    return fastest


# --- inputs ---


def prompt_ids(count: int, sequence: int = 0) -> list[int]:
    return [(7 * i * i + (3 + 2 * sequence) * i + 11 * sequence) % 400 + 40 for i in range(count)]


def prompts(case: dict[str, Any]) -> list[list[int]]:
    """The prompts of a decode row, the sources of a translation."""
    count = SOURCE if case["task"] == "translate" else PROMPT
    return [prompt_ids(count, b) for b in range(case.get("batch", 1))]


def sentences(count: int = 256) -> list[str]:
    """Runs of 3 to 59 words of the bundled text."""
    words = gzip.decompress(TEXT.read_bytes()).decode().split()
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, len(words) - 100, count), rng.integers(3, 60, count)
    return [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def encode_ids(case: dict[str, Any]) -> list[list[int]]:
    """The sequences of an encode row: `tokens` ids each, or of the sentences' mixed lengths."""
    if "tokens" in case:
        return [prompt_ids(case["tokens"], b) for b in range(case["batch"])]
    return [prompt_ids(int(1.35 * len(s.split())) + 2, b) for b, s in enumerate(sentences(case["batch"]))]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """ids and mask, (B, T) int64."""
    mask = np.arange(max(map(len, rows))) < np.array([len(r) for r in rows])[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int64)


def encode_run(
    case: dict[str, Any], states: Callable[[Any, Any], Any] | list[Callable[[Any, Any], Any]], size: int
) -> Callable[[], Any]:
    """What a user of a library writes to embed many texts: sorted by length, batches of `size`, the mean over the tokens. `states` maps
    ids and mask (B, T) to (B, T, C); of several, each runs in a thread of its own and takes the next batch. Rows of equal length: the
    states themselves, an equal share for each."""
    each = states if isinstance(states, list) else [states]
    free: queue.SimpleQueue[Callable[[Any, Any], Any]] = queue.SimpleQueue()
    for one in each:
        free.put(one)
    pool = ThreadPoolExecutor(len(each)) if len(each) > 1 else None
    tokenize = tokenizer(case)
    texts = sentences(case["batch"]) if tokenize else None
    given = None if tokenize else encode_ids(case)
    unit = '"2_Normalize"' in read_if(folder(case) / "modules.json")  # vectors of length 1

    def dealt(parts: list[Any], call: Callable[[Callable[[Any, Any], Any], Any], Any]) -> list[Any]:
        def work(part: Any) -> Any:
            one = free.get()
            try:
                return call(one, part)
            finally:
                free.put(one)

        return list(pool.map(work, parts)) if pool else [call(each[0], part) for part in parts]

    def run() -> Any:
        ids = given if tokenize is None else tokenize(texts)
        if "tokens" in case:
            cut = -(-len(ids) // len(each))
            parts = [ids[i : i + cut] for i in range(0, len(ids), cut)]
            found = dealt(parts, lambda one, part: one(*padded(part)))
            return found[0] if len(found) == 1 else np.concatenate(found)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = [None] * len(ids)

        def embed(one: Callable[[Any, Any], Any], part: list[int]) -> None:
            batch, mask = padded([ids[i] for i in part])
            x = one(batch, mask)
            for i, v in zip(part, (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True), strict=True):
                out[i] = v

        dealt([order[i : i + size] for i in range(0, len(order), size)], embed)
        vectors = np.stack(out)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit else vectors

    return run


def read_if(path: Path) -> str:
    """The text of a file, "" where there is none."""
    return path.read_text() if path.exists() else ""


def setups() -> list[tuple[int, int]]:
    """(workers, threads of each) of which an encoder's library may take the best."""
    n = threads()
    return [(1, 1)] if n == 1 else [(1, n), (n, 1)]


def tokenizer(case: dict[str, Any]) -> Callable[[list[str]], list[list[int]]] | None:
    """The tokenizers library on the checkpoint's file, where the row begins with text."""
    if case.get("input") != "text":
        return None
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(folder(case) / "tokenizer.json"))
    tok.no_padding()
    tok.no_truncation()
    return lambda texts: [e.ids for e in tok.encode_batch(texts)]


# --- weights ---


def shared(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"fastlm-bench-{os.getuid()}" / name


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """A new place that becomes `path` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield new
        if not path.exists():
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)


def folder(case: dict[str, Any]) -> Path:
    """The model's Hugging Face folder. all-MiniLM-L6-v2 is the real one where FASTLM_MINILM names it; else the random weights that ours,
    which is prepared first, has left there."""
    if case["model"] == "all-minilm-l6-v2" and os.environ.get("FASTLM_MINILM"):
        return Path(os.environ["FASTLM_MINILM"])
    return shared(case["model"])


def smollm2() -> Path | None:
    """FASTLM_SMOLLM2, or where `fastlm demo` puts it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    where = Path(os.environ.get("FASTLM_CACHE") or Path(cache) / "fastlm")
    path = Path(os.environ.get("FASTLM_SMOLLM2") or where / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return path if path.exists() else None


NAMES = {  # a part's name in a Hugging Face file -> in a GGUF file
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "lm_head": "output",
}  # fmt: skip


def gguf_file(case: dict[str, Any]) -> Path | None:
    """The model as a GGUF file of the case's kind (int8: q8_0): SmolLM2 as published, others written here from their folder. Matrices are
    quantised; positions and what is not a matrix stay float32. None without the package gguf."""
    if case["model"] == "smollm2":
        return smollm2()
    stored = {"int8": "q8_0"}.get(case["kind"], case["kind"])
    path = shared(f"{case['model']}-{stored}.gguf")
    if path.exists():
        return path
    try:
        import gguf
        from safetensors.numpy import load_file
    except ImportError:
        return None
    kind = gguf.GGMLQuantizationType[stored.upper()]
    config = json.loads((folder(case) / "config.json").read_text())
    llama = config["model_type"] == "llama"

    def key(theirs: str, gpt2: str) -> Any:
        return config[theirs if llama else gpt2]

    with making(path) as new:
        out = gguf.GGUFWriter(str(new), config["model_type"])
        out.add_context_length(key("max_position_embeddings", "n_positions"))
        out.add_embedding_length(key("hidden_size", "n_embd"))
        out.add_block_count(key("num_hidden_layers", "n_layer"))
        out.add_feed_forward_length(config["intermediate_size"] if llama else 4 * config["n_embd"])
        out.add_head_count(key("num_attention_heads", "n_head"))
        if llama:
            out.add_head_count_kv(config["num_key_value_heads"])
            out.add_layer_norm_rms_eps(config["rms_norm_eps"])
        else:
            out.add_layer_norm_eps(config["layer_norm_epsilon"])
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("gpt-2")
        out.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
        out.add_token_merges(["t 0"])
        for name, x in load_file(folder(case) / "model.safetensors").items():
            parts = name.removeprefix("transformer.").removeprefix("model.").split(".")
            block = f"blk.{parts[1]}." if parts[0] in ("h", "layers") else ""
            inner = ".".join(parts[2:-1] if block else parts[:-1])
            if inner not in NAMES:
                raise ValueError(f"{path.name}: no name in GGUF is known for {name}")
            matrix = x.ndim == 2 and inner != "wpe"
            if block and matrix and not llama:
                x = x.T  # stored (in, out)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs side by side
                heads = config["num_attention_heads" if "q_" in inner else "num_key_value_heads"]
                x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            x = np.ascontiguousarray(x, np.float32)
            name = f"{block}{NAMES[inner]}.{parts[-1]}"
            if matrix and case["kind"] != "f32":
                out.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
            else:
                out.add_tensor(name, x)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return path
