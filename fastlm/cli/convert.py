"""`fastlm convert`: anything that can be read, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from fastlm.lm import LM, load


def run(arguments: argparse.Namespace) -> None:
    source, target = Path(arguments.source), Path(arguments.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty: give another folder")
    if source.is_file() and source.suffix == ".bin":
        lm = llama2c(source, Path(arguments.tokenizer) if arguments.tokenizer else None, arguments.dtype)
    else:
        if arguments.tokenizer:
            raise ValueError("--tokenizer is for llama2.c files; other formats bring their own")
        lm = load(arguments.source, dtype=arguments.dtype)
    lm.save(target)
    print(f"{lm!r}\nwritten to {target}")


def llama2c(source: Path, tokenizer: Path | None, dtype: str) -> LM:
    """A llama2.c checkpoint (version 0) as a model; its tokenizer is a file of its own."""
    from fastlm.checkpoint.llama2c import convert_llama2c
    from fastlm.tokenizers import Tokenizer

    if tokenizer is not None and not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} is no file")
    save = None if tokenizer is None else Tokenizer.from_llama2c(tokenizer).save
    with tempfile.TemporaryDirectory() as folder:
        lm = load(convert_llama2c(source, folder, save), dtype=dtype)
        for p in lm.model.named_parameters().values():
            p.data = p.data.copy()  # the file it is a view of goes away
    if tokenizer is None:
        print("no tokenizer: give llama2.c's with --tokenizer, or only ids go in and out")
    return lm
