"""Mutated GGUF, safetensors, llama2.c and JSON files against the readers: each must load or raise FormatError or TokenizerError.

    python tools/fuzz_checkpoint.py --format gguf --count 2000

Cases are numbered and depend on their number alone; a failure names it, and `--first N --count 1 --keep FILE` makes it again. They run
in child processes that may take 256 MB beyond what importing took (RLIMIT_AS) and 1 s of CPU for each case (a timer that kills), so a
crash, a hang or a hunger for memory is caught and reported, and the rest goes on. What loads is also dequantised and read through.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 256 << 20
SANITIZED = "FASTLM_SANITIZED" in os.environ  # by tools/sanitize.sh, whose runtime reserves terabytes of addresses
SECONDS = float(os.environ.get("FASTLM_FUZZ_SECONDS", "1"))  # of CPU; a sanitizer needs more
# ggml's id, weights in a block, bytes of a block
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "I8": (24, 1, 1), "I16": (25, 1, 2),
    "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8), "BF16": (30, 1, 2),
}  # fmt: skip
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # GGUF's value types
EXTREMES = [0, 1, 2, 3, 7, 31, 33, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 56, (1 << 60) + 1,
            (1 << 61) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 8, (1 << 64) - 1]  # fmt: skip


def text(s: str | bytes) -> bytes:
    """A GGUF string."""
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    """A GGUF array; `count` lies about its length."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


@dataclass
class GGUFFile:
    """Builds a GGUF file, truthful unless told otherwise, and remembers where its counts, lengths and offsets stand."""

    version: int = 3
    alignment: int = 32
    values: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    records: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)
    data: bytes = b""
    fields: list[tuple[int, int]] = field(default_factory=list)  # (byte, width)

    def value(self, key: str | bytes, kind: int, payload: bytes) -> GGUFFile:
        self.values.append((text(key), kind, payload))
        return self

    def tensor(
        self, name: str | bytes, dims: list[int], kind: str | int = "F32", raw: bytes | None = None, offset: int | None = None
    ) -> GGUFFile:
        """dims in ggml's order, the contiguous axis first."""
        number, values, size = TYPES[kind] if isinstance(kind, str) else (kind, 1, 1)
        if raw is None:
            count = 1
            for n in dims:
                count *= n
            raw = random.Random(len(self.records)).randbytes(count // values * size)
        self.records.append((text(name), dims, number, len(self.data) if offset is None else offset))
        self.data += raw + bytes(-len(raw) % self.alignment)
        return self

    def build(self, tensors: int | None = None, values: int | None = None) -> bytes:
        out = bytearray(b"GGUF")

        def put(form: str, *numbers: int) -> None:
            for n, letter in zip(numbers, form, strict=True):
                self.fields.append((len(out), struct.calcsize(letter)))
                out.extend(struct.pack("<" + letter, n))

        put("IQQ", self.version, len(self.records) if tensors is None else tensors, len(self.values) if values is None else values)
        for key, kind, payload in self.values:
            self.fields.append((len(out), 8))
            out.extend(key)
            put("I", kind)
            if kind in (STRING, ARRAY, U32):
                self.fields += [(len(out), 4), (len(out) + 4, 8), (len(out) + 12, 8)]
            out.extend(payload)
        for name, dims, kind, offset in self.records:
            self.fields.append((len(out), 8))
            out.extend(name)
            put("I" + "Q" * len(dims), len(dims), *dims)
            put("IQ", kind, offset)
        out.extend(bytes(-len(out) % self.alignment))
        return bytes(out) + self.data


def gguf_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    """Small valid files with every type of value and tensor, and the places of their counts."""
    everything = GGUFFile()
    for i, (form, n) in enumerate(zip("BbHhIif?", (200, -3, 60000, -7, 4_000_000_000, -9, 1.5, True), strict=True)):
        everything.value(f"k.{i}", i, struct.pack("<" + form, n))
    everything.value("k.u64", U64, struct.pack("<Q", 1 << 63)).value("k.i64", I64, struct.pack("<q", -1))
    everything.value("k.f64", F64, struct.pack("<d", 0.1)).value("tokenizer.chat_template", STRING, text("{{ messages }} ü" * 9))
    everything.value("tokens", ARRAY, array(STRING, [text(f"token{i}") for i in range(60)]))
    everything.value("scores", ARRAY, array(F32, [struct.pack("<f", i) for i in range(60)]))
    everything.value("flags", ARRAY, array(BOOL, [b"\0", b"\1"])).value("none", ARRAY, array(I32, []))
    everything.value("nested", ARRAY, array(ARRAY, [array(STRING, [text("a")]), array(ARRAY, [array(U8, [b"x"])])]))
    for kind, (_, values, _) in TYPES.items():
        everything.tensor(f"t.{kind}", [max(values, 4), 3], kind)
    everything.tensor("scalar", [], "F32").tensor("cube", [32, 2, 3, 2], "Q8_0")
    small = GGUFFile(version=2, alignment=64).value("general.alignment", U32, struct.pack("<I", 64))
    small.value("general.architecture", STRING, text("llama")).tensor("a", [256, 2], "Q6_K").tensor("b", [5], "F16")
    bare = GGUFFile().tensor("w", [2, 2])
    return [(f.build(), f.fields) for f in (everything, small, bare)]


def safetensors_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for kind in sorted(sizes, key=lambda k: -sizes[k]):
        header[f"layer.{kind}.weight"] = {"dtype": kind, "shape": [3, 4], "data_offsets": [at, at + 12 * sizes[kind]]}
        at += 12 * sizes[kind]
    seeds = []
    for h, size in ((header, at), ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8), ({}, 0)):
        raw = json.dumps(h, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        seeds.append((struct.pack("<Q", len(raw)) + raw + random.Random(size).randbytes(size), [(0, 8)]))
    return seeds


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "tie_word_embeddings": True,
}  # fmt: skip


def json_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    generation = {"bos_token_id": 1, "eos_token_id": [1, 2], "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    tokens = {str(i): {"content": f"<|{i}|>", "special": True, "lstrip": False} for i in range(4)}
    tokenizer = {
        "added_tokens_decoder": tokens,
        "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}\u00fc\U0001f600",
    }
    return [(json.dumps(v, indent=2).encode(), []) for v in (LLAMA, generation, tokenizer)]


def index_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    index = {
        "metadata": {"total_size": 16},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    return [(json.dumps(index).encode(), [])]


def llama2c_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    C, F, L, H, G, V, P = 8, 12, 2, 2, 1, 5, 4
    D = C // H
    count = V * C + L * (2 * C * C + 2 * G * D * C + 2 * C + 3 * F * C) + C + P * D
    raw = struct.pack("<7i", C, F, L, H, G, V, P) + random.Random(1).randbytes(4 * count)
    return [(raw, [(4 * i, 4) for i in range(7)])]


MODELS = Path(__file__).parent.parent / "tests" / "data" / "models"
FOLDERS = ("llama", "llama-tied", "gpt2")  # tiny checkpoints there


def folder_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    """The config.json of each folder, which stands beside its weights."""
    return [((MODELS / name / "config.json").read_bytes(), []) for name in FOLDERS]


def model_seeds() -> list[tuple[bytes, list[tuple[int, int]]]]:
    """A llama model of one layer with its tokenizer, as llama.cpp names things."""
    C, F, V, G = 32, 64, 40, 2
    file = GGUFFile().value("general.architecture", STRING, text("llama"))
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": C, "feed_forward_length": F, "attention.head_count": 4,
             "attention.head_count_kv": G, "rope.dimension_count": 8, "vocab_size": V}  # fmt: skip
    for key, n in sizes.items():
        file.value("llama." + key, U32, struct.pack("<I", n))
    file.value("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5))
    file.value("llama.rope.freq_base", F32, struct.pack("<f", 1e4))
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(V - 4)), "\u2581"]
    file.value("tokenizer.ggml.model", STRING, text("llama"))
    file.value("tokenizer.ggml.tokens", ARRAY, array(STRING, [text(t) for t in tokens]))
    file.value("tokenizer.ggml.scores", ARRAY, array(F32, [struct.pack("<f", -i) for i in range(V)]))
    file.value("tokenizer.ggml.token_type", ARRAY, array(I32, [struct.pack("<i", {0: 2, 1: 3, 2: 3}.get(i, 1)) for i in range(V)]))
    file.value("tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 1)).value(
        "tokenizer.ggml.eos_token_id", U32, struct.pack("<I", 2)
    )
    file.value("tokenizer.chat_template", STRING, text("{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    file.tensor("token_embd.weight", [C, V], "Q8_0").tensor("output_norm.weight", [C])
    for name, dims in {"attn_q": [C, C], "attn_k": [C, 8 * G], "attn_v": [C, 8 * G], "attn_output": [C, C], "ffn_gate": [C, F],
                       "ffn_up": [C, F], "ffn_down": [F, C]}.items():  # fmt: skip
        file.tensor(f"blk.0.{name}.weight", dims, "Q4_0")
    file.tensor("blk.0.attn_norm.weight", [C]).tensor("blk.0.ffn_norm.weight", [C])
    return [(file.build(), file.fields)]


SEEDS = {
    "gguf": gguf_seeds,
    "safetensors": safetensors_seeds,
    "json": json_seeds,
    "index": index_seeds,
    "llama2c": llama2c_seeds,
    "folder": folder_seeds,
    "model": model_seeds,
}


FAULTS = [b"crash", b"hang", b"memory", b"error"]  # a reader with these faults, to see that each is caught


def fault(what: bytes) -> None:
    if what == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == b"hang":
        while True:
            pass
    elif what == b"memory":
        bytes(MEMORY + (64 << 20))
    elif what == b"error":
        raise KeyError("not a FormatError")


def mutate(rng: random.Random, seeds: list[tuple[bytes, list[tuple[int, int]]]]) -> bytes:
    """One to three mutations of a seed: bits, bytes, counts set to extremes, chunks cut, doubled or taken from another seed."""
    source, fields = rng.choices(seeds, [8] + [2] * (len(seeds) - 1))[0]
    data = bytearray(source)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if not data:
            break
        kind = rng.randrange(9)
        at = rng.randrange(len(data))
        near = rng.choice((at, at, rng.randrange(min(len(data), 400))))  # headers are where the trouble is
        if kind == 0:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[near] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[rng.choice((at, near)) :]
        elif kind in (3, 4):
            offset, width = rng.choice(fields) if fields and kind == 3 else (near, rng.choice((4, 8)))
            n = rng.choice((*EXTREMES, len(source), len(source) - 8, len(source) // 8, rng.randrange(1 << 20)))
            data[offset : offset + width] = (n & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind == 5:  # a chunk of some seed over what is here
            other = rng.choice(seeds)[0]
            start = rng.randrange(len(other))
            chunk = other[start : start + rng.randrange(1, 200)]
            data[near : near + len(chunk)] = chunk
        elif kind == 6:  # or between
            start = rng.randrange(len(source))
            data[near:near] = source[start : start + rng.randrange(1, 200)]
        elif kind == 7:
            del data[near : near + rng.randrange(1, 64)]
        else:  # a number written in decimal, or a word of JSON
            digits = [i for i, b in enumerate(data[:4000]) if 48 <= b <= 57]
            word = rng.choice(
                [str(n).encode() for n in EXTREMES]
                + [b"-1", b"1e999", b"NaN", b"null", b"[]", b'{"a":', b"[" * 3000, b'"', b"\\ud800"]
            )
            start = rng.choice(digits) if digits else near
            data[start : start + 1] = word
    return bytes(data)


def mutate_json(rng: random.Random, raw: bytes) -> bytes:
    """One to three values of an object replaced, removed or renamed: what is still JSON gets further into a reader."""
    value = json.loads(raw)
    for _ in range(rng.randrange(1, 4)):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
                place = inner
                continue
            how = rng.randrange(6)
            if how == 0:
                del place[key]
            elif how == 1 and isinstance(place, dict):
                place[rng.choice(("", "a", "..", key + key, "\0", "\u00fc"))] = place.pop(key)
            elif how == 2 and isinstance(inner, int):
                place[key] = inner + rng.choice((-9, -8, -4, -1, 1, 4, 8, 9))
            elif how == 3:
                place[key] = rng.choice(EXTREMES) * rng.choice((1, 1, -1))
            else:
                strings = ["", "F32", "../x.safetensors", "/x.safetensors", "x" * 5000, "a.bin", "BF16", "\0.safetensors"]
                place[key] = rng.choice([None, True, 1.5, -1, float("inf"), [], {}, [[[]]], [1, 2], {"a": 1}, *strings])
            break
    return json.dumps(value).encode()


def case(kind: str, number: int) -> bytes:
    """The file of one case."""
    if kind == "fault":
        return FAULTS[number]
    rng = random.Random(f"{kind} {number}")
    seeds = SEEDS[kind]()
    if kind == "folder":
        seeds = [seeds[number // 2 % len(seeds)]]
    if kind in ("safetensors", "json", "index", "folder") and number % 2:
        raw = rng.choice(seeds)[0]
        if kind != "safetensors":
            return mutate_json(rng, raw)
        length = int.from_bytes(raw[:8], "little")
        header = mutate_json(rng, raw[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]
    return mutate(rng, seeds)


def read(kind: str, path: Path) -> None:
    """Reads a file as a model loader would, and everything in it."""
    from fastlm import checkpoint

    tensors: Any = {}
    if kind == "fault":
        fault(path.read_bytes())
    elif kind == "gguf":
        metadata, tensors = checkpoint.read_gguf(path)
        repr(metadata)
    elif kind == "safetensors":
        tensors = checkpoint.read_safetensors(path)
    elif kind == "llama2c":
        _, tensors = checkpoint.read_llama2c(path)
    elif kind in ("folder", "model"):
        load(path.parent if kind == "folder" else path)
    elif kind == "index":
        tensors = checkpoint.read_safetensors(path.parent)
    else:
        json.dumps(checkpoint.read_json(path)).encode()
    for tensor in tensors.values():
        if isinstance(tensor, checkpoint.QuantizedArray):
            tensor.dequantize()
            if tensor.ndim == 2:
                tensor.dequantize_rows([0, tensor.shape[0] - 1])
        else:
            tensor.tobytes()


def load(path: Path) -> None:
    """A whole model; where it loads, the logits of an id three times and a text there and back."""
    import numpy as np

    from fastlm.hub import load_folder_or_gguf

    model, tokenizer = load_folder_or_gguf(path)
    with np.errstate(all="ignore"):
        model.logits(np.zeros((1, 3), np.int32))
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("abc"))


def worker(kind: str, first: int, count: int, progress: int, limited: bool) -> None:
    """Runs cases in this process; writes `number loaded refused` to the file descriptor before each, and stops at a wrong error."""
    from fastlm.checkpoint import FormatError
    from fastlm.tokenizers import TokenizerError

    with tempfile.TemporaryDirectory() as folder:
        names = {"index": "model.safetensors.index.json", "folder": "config.json", "model": "x.gguf"}
        name = names.get(kind, "x." + kind)
        paths = [Path(folder) / name]
        if kind == "folder":  # two cases for each in turn
            paths = [Path(folder) / model / name for model in FOLDERS]
            for path, model in zip(paths, FOLDERS, strict=True):
                path.parent.mkdir()
                path.with_name("model.safetensors").symlink_to(MODELS / model / "model.safetensors")
        if kind == "index":
            for i, tensor in enumerate("ab"):
                raw = json.dumps({tensor: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
                (Path(folder) / f"model-0000{i + 1}-of-00002.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
        for i, (seed, _) in enumerate(
            SEEDS.get(kind, list)()
        ):  # what is valid loads; and everything lazy is imported before the limit
            path = paths[i % len(paths)]
            path.write_bytes(seed)
            read(kind, path)
            path.unlink()
        if limited:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        loaded = refused = 0
        for number in range(first, first + count):
            os.pwrite(progress, f"{number} {loaded} {refused}\n".encode().ljust(64), 0)
            path = paths[number // 2 % len(paths)]
            path.write_bytes(case(kind, number))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(60)
            try:
                read(kind, path)
                loaded += 1
            except (FormatError, TokenizerError):
                refused += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            path.unlink()  # not overwritten: arrays may still be mapped
        os.pwrite(progress, f"{first + count} {loaded} {refused}\n".encode().ljust(64), 0)


@dataclass
class Report:
    loaded: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)  # "gguf 17: killed by SIGSEGV"


def run_piece(kind: str, first: int, count: int, limited: bool) -> Report:
    report = Report()
    end = first + count
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # an arena of its own for each thread would count as memory
    while first < end and len(report.failures) < 10:
        with tempfile.TemporaryFile() as progress:
            os.pwrite(progress.fileno(), b"-1 0 0\n", 0)
            code = [sys.executable, __file__, "--worker", "--format", kind, "--first", str(first), "--count", str(end - first)]
            code += ["--progress", str(progress.fileno())] + ([] if limited else ["--unlimited"])
            done = subprocess.run(code, pass_fds=[progress.fileno()], env=environment, capture_output=True, text=True, check=False)
            number, loaded, refused = map(int, os.pread(progress.fileno(), 64, 0).split()[:3])
        if number < 0:
            raise RuntimeError(f"the worker did not reach its first case:\n{done.stderr}")
        report.loaded += loaded
        report.refused += refused
        if done.returncode == 0:
            break
        why = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        lines = done.stderr.strip().splitlines()
        summary = [line for line in lines if "ERROR: AddressSanitizer" in line or "runtime error" in line] or lines[-1:]
        report.failures.append(f"{kind} {number}: {why} {' | '.join(summary)}")
        first = number + 1
    return report


def run(kind: str, count: int, first: int = 0, jobs: int = 2, limited: bool = not SANITIZED) -> Report:
    """`count` cases in `jobs` processes."""
    piece = -(-count // jobs)
    pieces = [(kind, first + i, min(piece, count - i), limited) for i in range(0, count, piece)]
    total = Report()
    with ThreadPoolExecutor(jobs) as pool:
        for report in pool.map(lambda p: run_piece(*p), pieces):
            total.loaded += report.loaded
            total.refused += report.refused
            total.failures += report.failures
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", choices=[*SEEDS, "fault"], action="append", help="default: all")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--unlimited", action="store_true", help="no memory limit: a sanitizer reserves terabytes of addresses")
    parser.add_argument("--keep", type=Path, help="write the file of case FIRST here and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    formats = options.format or list(SEEDS)
    if options.keep:
        options.keep.write_bytes(case(formats[0], options.first))
        return 0
    if options.worker:
        worker(formats[0], options.first, options.count, options.progress, not options.unlimited)
        return 0
    failed = False
    for kind in formats:
        report = run(kind, options.count, options.first, options.jobs, not options.unlimited)
        print(f"{kind}: {report.loaded} loaded, {report.refused} refused, {len(report.failures)} failed")
        for failure in report.failures:
            print("  " + failure)
        failed = failed or bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
