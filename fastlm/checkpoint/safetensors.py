"""safetensors: a file, or a folder of one file or of shards with their index. Format: huggingface/safetensors, README.

The library decides whether a header is valid; offsets are then read here from the same bytes, so that arrays, bfloat16 ones too,
are views of the mapped file: the library's own NumPy interface copies.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fastlm.checkpoint.atomic import atomic_write, sync_folder
from fastlm.checkpoint.errors import FormatError, short
from fastlm.checkpoint.jsonfile import parse_json, read_json, write_json
from fastlm.checkpoint.mapping import map_file, view

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit
MAX_INDEX = 64 << 20
MAX_SHARD_BYTES = 5_000_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# In the library's order, which its writer sorts by, last first: wide types come first and stay aligned.
_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}
_ORDER = {name: i for i, name in enumerate(_NUMPY)}

Tensors = dict[str, NDArray[Any]]


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """Tensors by name from a .safetensors file, or from a folder with model.safetensors, or with model.safetensors.index.json.

    Arrays are read-only views of the mapped file. Raises FormatError for a file that is corrupt, truncated or hostile, for missing
    shards or tensors (all are listed), for an index that points out of its folder, and for pickles, which are never opened;
    FileNotFoundError where there is nothing.
    """
    where = Path(path)
    if not where.is_dir():
        _refuse_pickle(where)
        return _read_file(where)
    if (where / SINGLE).exists():
        return _read_file(where / SINGLE)
    if (where / INDEX).exists():
        return _read_shards(where)
    for entry in sorted(where.iterdir()):
        _refuse_pickle(entry)
    raise FileNotFoundError(f"{where}: expected {SINGLE} or {INDEX} in this folder, found neither")


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise FormatError(
            path, "a pickle can run any code when it is opened and is never read: convert it to safetensors where you trust it"
        )


def _read_file(path: Path) -> Tensors:
    memory = map_file(path, "safetensors")
    try:
        with safe_open(os.fspath(path), framework="np"):
            pass
    except SafetensorError as error:
        raise FormatError(path, f"not a valid safetensors file: {error}") from None
    # The file may have been replaced between the two looks: nothing below trusts the first.
    size = len(memory)
    length = int.from_bytes(memory[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise FormatError(path, f"the header must fit into the file of {size} bytes, got a length of {length}", 0)
    header = parse_json(path, memory[8 : 8 + length], 8)
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > size - 8 - length:
            raise FormatError(path, f"tensor {short(name)} ends at {end} of the data, which has {size - 8 - length} bytes")
        array = view(memory, dtype, shape, 8 + length + begin)
        # A bool that is neither 0 nor 1 would be undefined: those are copied.
        tensors[name] = array.view(np.uint8) != 0 if dtype == np.bool_ else array
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, begin, end of a tensor: sizes that belong together."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, f"tensor {short(name)} must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _NUMPY:
        raise FormatError(path, f"tensor {short(name)} must have a dtype among {', '.join(_NUMPY)}, got {short(kind)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise FormatError(path, f"tensor {short(name)} must have a shape and two offsets, got {short(shape)} and {short(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _NUMPY[kind].itemsize:
        raise FormatError(
            path, f"tensor {short(name)} of {kind} {short(shape)} does not take the {end - begin} bytes between its offsets"
        )
    return _NUMPY[kind], tuple(shape), begin, end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _read_shards(folder: Path) -> Tensors:
    index = folder / INDEX
    weight_map = read_json(index, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(index, "expected weight_map, an object from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # One plain name: an index from elsewhere must not name a file outside its folder.
        plain = shard == os.path.basename(shard) and "\\" not in shard and "\0" not in shard and len(shard.encode()) <= 255
        if not plain or not shard.endswith(".safetensors"):
            raise FormatError(index, f"a shard must be the name of a .safetensors file in this folder, got {short(shard)}")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FormatError(index, f"{len(missing)} of {len(shards)} shards are missing: {_listed(missing)}")
    tensors: Tensors = {}
    owner: dict[str, str] = {}
    for shard in shards:
        for name, array in _read_file(folder / shard).items():
            if name in owner:
                raise FormatError(folder / shard, f"tensor {short(name)} is also in {owner[name]}")
            owner[name] = shard
            tensors[name] = array
    wrong = [name for name, shard in weight_map.items() if owner.get(name) != shard]
    if wrong:
        raise FormatError(index, f"{len(wrong)} tensors are not in the shard the index names: {_listed(wrong)}")
    return tensors


def _listed(names: list[str], limit: int = 40) -> str:
    return ", ".join(name[:120] for name in names[:limit]) + (", ..." if len(names) > limit else "")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors and returns the files. A path that ends in .safetensors is one file; any other is a folder, made if need be.

    A folder gets model.safetensors, or, above `max_shard_bytes`, shards and their index, written last; what an earlier save left
    there under other names is removed. Each file is atomic, the set of shards is not: to replace a sharded model write to a new
    folder and rename that. The bytes are those of safetensors.numpy.save_file. Raises TypeError for what is not an array or has a
    dtype the format lacks.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"[write_safetensors] max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray) or array.dtype not in _NAMES:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"[write_safetensors] {name} must be an array of {', '.join(_NUMPY)}, got {got}.")
    notes = {"format": "pt", **(metadata or {})}
    where = Path(path)
    if where.suffix == ".safetensors":
        atomic_write(where, lambda file: _write(file, tensors, notes))
        return [where]
    where.mkdir(parents=True, exist_ok=True)
    groups = _split(tensors, max_shard_bytes)
    if len(groups) == 1:
        files = [where / SINGLE]
        atomic_write(files[0], lambda file: _write(file, tensors, notes))
    else:
        weight_map: dict[str, str] = {}
        files = []
        for i, names in enumerate(groups):
            shard = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            _write_shard(where / shard, {name: tensors[name] for name in names}, notes)
            weight_map.update(dict.fromkeys(names, shard))
            files.append(where / shard)
        total = sum(array.nbytes for array in tensors.values())
        write_json(where / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        files.append(where / INDEX)
    stale = [where / SINGLE, where / INDEX, *where.glob("model-?????-of-?????.safetensors")]
    for old in stale:
        if old not in files:
            old.unlink(missing_ok=True)
    sync_folder(where)
    return files


def _write_shard(path: Path, tensors: Mapping[str, NDArray[Any]], notes: Mapping[str, str]) -> None:
    atomic_write(path, lambda file: _write(file, tensors, notes))


def _split(tensors: Mapping[str, NDArray[Any]], limit: int) -> list[list[str]]:
    """Names in the order given, cut so that a group stays within the limit, or is one tensor that is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if groups[-1] and size + array.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += array.nbytes
    return groups


def _write(file: BinaryIO, tensors: Mapping[str, NDArray[Any]], notes: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    names = sorted(tensors, key=lambda name: (-_ORDER[_NAMES[tensors[name].dtype]], name))
    at = 0
    for name in names:
        array = tensors[name]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in names:
        file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
