"""Makes the vocabularies of this folder: `python make.py FOLDER_WITH_GGML_VOCABULARIES VOCAB_BPE`.

The whole vocabularies of llama.cpp's `models/ggml-vocab-*.gguf` are megabytes, and some have terms of their own. Here are only the
tokens that occur in the 47 golden texts (cases.inp), and the merges between them: every other token can play no part there.
"""

import json
import lzma
import sys
import unicodedata
from pathlib import Path

import gguf

from fastlm.tokenizers.stream import byte_alphabet

HERE = Path(__file__).parent
SPACE = "\u2581"


def metadata(path: Path) -> dict:
    return {k: v.contents() for k, v in gguf.GGUFReader(path).fields.items() if k.startswith("tokenizer.")}


def subset(meta: dict, text: str) -> dict:
    model = meta["tokenizer.ggml.model"]
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if model == "gpt2":
        letters = {b: c for c, b in byte_alphabet().items()}
        text = "".join(letters[b] for b in text.encode())
    elif model == "llama":
        text = SPACE + text.replace(" ", SPACE).replace("\n", "\n" + SPACE)
    else:
        folded = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        text = text + folded
    keep = [i for i, t in enumerate(tokens) if types[i] != 1 or len(t) == 1 or t.lstrip(SPACE if model == "bert" else "") in text]
    keep = [i for i in keep if types[i] != 3 or i in {v for k, v in meta.items() if k.endswith("token_id")}]
    names = {tokens[i] for i in keep}
    out = {k: v for k, v in meta.items() if not isinstance(v, list) and not k.endswith("token_id")}
    out |= {k: keep.index(v) for k, v in meta.items() if k.endswith("token_id")}
    for key in ("tokens", "token_type", "scores"):
        if f"tokenizer.ggml.{key}" in meta:
            out[f"tokenizer.ggml.{key}"] = [meta[f"tokenizer.ggml.{key}"][i] for i in keep]
    if "tokenizer.ggml.merges" in meta:
        parts = [(m, m[1:].partition(" ")) for m in meta["tokenizer.ggml.merges"]]
        out["tokenizer.ggml.merges"] = [m for m, (a, _, b) in parts if {m[0] + a, b, m[0] + a + b} <= names]
    return {"ids": keep, "metadata": out}


if __name__ == "__main__":
    source = Path(sys.argv[1])
    text = (HERE / "cases.inp").read_bytes().decode()
    for name in ("gpt-2", "llama-bpe", "llama-spm", "bert-bge"):
        made = json.dumps(subset(metadata(source / f"ggml-vocab-{name}.gguf"), text), ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{name}.json.xz").write_bytes(lzma.compress(made.encode(), preset=9))
    (HERE / "gpt-2.bpe.xz").write_bytes(lzma.compress(Path(sys.argv[2]).read_bytes(), preset=9))
