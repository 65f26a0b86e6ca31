from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastlm.checkpoint import FormatError, read_safetensors, write_safetensors

DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "float64", "int64", "uint64"]


def some_tensors():
    """One of every dtype, an empty one, a scalar, and one that is not contiguous."""
    rng = np.random.default_rng(0)
    tensors = {f"w.{d}": rng.integers(0, 2 if d == "bool" else 100, (3, 5)).astype(d) for d in DTYPES}
    tensors["bf16"] = rng.standard_normal((4, 7)).astype(ml_dtypes.bfloat16)
    tensors["e4m3"] = rng.standard_normal(9).astype(ml_dtypes.float8_e4m3fn)
    tensors["e5m2"] = rng.standard_normal(9).astype(ml_dtypes.float8_e5m2)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["scalar"] = np.array(3.5, np.float32)
    tensors["strided"] = rng.standard_normal((6, 8)).astype(np.float32)[::2, ::-1].T
    return tensors


def equal(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def raw_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_round_trip(tmp_path):
    tensors = some_tensors()
    assert write_safetensors(tmp_path / "a.safetensors", tensors) == [tmp_path / "a.safetensors"]
    got = read_safetensors(tmp_path / "a.safetensors")
    equal(got, tensors)
    assert not got["w.float32"].flags.writeable
    assert got["w.float32"].base is not None  # a view of the mapped file


def test_bytes_of_the_library(tmp_path):
    """The file is byte for byte what safetensors.numpy.save_file writes, and each reads the other's."""
    tensors = {name: np.ascontiguousarray(a) if a.ndim else a for name, a in some_tensors().items()}
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    equal(read_safetensors(tmp_path / "theirs.safetensors"), tensors)


def test_names(tmp_path):
    tensors = {name: np.ones(2, np.float32) for name in ('a"b\\c\n', "ü", "𝒳", "z" * 500, "\x01")}
    write_safetensors(tmp_path, tensors)
    equal(read_safetensors(tmp_path), tensors)


def test_unaligned(tmp_path):
    """A valid file whose tensors stand at odd bytes: copied, not read across words."""
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    path = raw_file(tmp_path / "odd.safetensors", header, b"\x07" + np.array([1.5, -2], np.float32).tobytes())
    got = read_safetensors(path)
    np.testing.assert_array_equal(got["b"], [1.5, -2])
    assert got["b"].flags.aligned


def test_shards(tmp_path):
    tensors = {f"layer.{i}": np.full((10, 10), i, np.float32) for i in range(7)}
    files = write_safetensors(tmp_path, tensors, max_shard_bytes=1000)
    names = [f.name for f in files]
    assert names == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)] + ["model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"]["layer.6"] == "model-00004-of-00004.safetensors"
    equal(read_safetensors(tmp_path), tensors)
    # A later save under other names leaves nothing of the earlier one.
    write_safetensors(tmp_path, tensors, max_shard_bytes=1500)
    assert len(list(tmp_path.iterdir())) == 4
    equal(read_safetensors(tmp_path), tensors)
    write_safetensors(tmp_path, {"one": tensors["layer.1"]})
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    equal(read_safetensors(tmp_path), {"one": tensors["layer.1"]})


def test_missing_shards(tmp_path):
    files = write_safetensors(tmp_path, {f"layer.{i}": np.zeros(100, np.float32) for i in range(4)}, max_shard_bytes=400)
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(FormatError, match=r"2 of 4 shards are missing: model-00001-of-00004.*, model-00003-of-00004"):
        read_safetensors(tmp_path)


def test_index_names_a_tensor_that_is_not_there(tmp_path):
    files = write_safetensors(tmp_path, {f"layer.{i}": np.zeros(100, np.float32) for i in range(2)}, max_shard_bytes=400)
    index = json.loads(files[-1].read_text())
    index["weight_map"]["layer.7"] = files[0].name
    files[-1].write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"1 tensors are not in the shard the index names: layer\.7"):
        read_safetensors(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    files = write_safetensors(tmp_path, {f"layer.{i}": np.zeros(100, np.float32) for i in range(2)}, max_shard_bytes=400)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(FormatError, match=r"'layer\.0' is also in model-00001"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "a/b.safetensors",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "",
        "x" * 300 + ".safetensors",
        "\0.safetensors",
    ],
)
def test_index_stays_in_its_folder(tmp_path, shard):
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "evil.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(FormatError, match="a shard must be the name of a"):
        read_safetensors(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"w": 1}, {"w": None}, "x"])
def test_index_shape(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="expected weight_map"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.PKL"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match="pickle can run any code"):
            read_safetensors(path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "no.safetensors")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "empty file": (b"", 0, None),
    "seven bytes": (b"", 0, None),
    "length past the end": (b"{}", 0, 3),
    "length 2^63": (b"{}", 0, 1 << 63),
    "length 2^64 - 1": (b"{}", 0, (1 << 64) - 1),
    "length overflows with 8": (b"{}", 0, (1 << 64) - 8),
    "length 0": (b"", 0, 0),
    "not JSON": (b"{]", 0, None),
    "a list": (b"[]", 0, None),
    "deep": (b"[" * 100000, 0, None),
    "not UTF-8": (b'{"\xff":1}', 0, None),
    "truncated data": ({"w": F32}, 7, None),
    "trailing data": ({"w": F32}, 9, None),
    "overflowing shape": ({"w": {**F32, "shape": [1 << 62, 8]}}, 8, None),
    "overflowing to the right size": ({"w": {**F32, "shape": [(1 << 61) + 1, 8]}}, 32, None),
    "negative shape": ({"w": {**F32, "shape": [-2]}}, 8, None),
    "shape of floats": ({"w": {**F32, "shape": [2.0]}}, 8, None),
    "shape of truth": ({"w": {**F32, "shape": [True, 2]}}, 8, None),
    "offsets reversed": ({"w": {**F32, "data_offsets": [8, 0]}}, 8, None),
    "offsets past the end": ({"w": {**F32, "data_offsets": [8, 16]}}, 8, None),
    "offsets too many": ({"w": {**F32, "data_offsets": [0, 8, 8]}}, 8, None),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, None),
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, None),
    "dtype unknown": ({"w": {**F32, "dtype": "F31"}}, 8, None),
    "dtype of half bytes": ({"w": {**F32, "dtype": "F4"}}, 8, None),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, None),
    "same name twice": (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        None,
    ),
    "entry is a number": ({"w": 7}, 0, None),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile(tmp_path, name):
    header, data, length = BAD[name]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(data), length)
    if name in ("empty file", "seven bytes"):
        path.write_bytes(bytes(7 if name == "seven bytes" else 0))
    with pytest.raises(FormatError) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_writer_refuses(tmp_path):
    with pytest.raises(TypeError, match=r"w must be an array of BOOL.*got complex64"):
        write_safetensors(tmp_path, {"w": np.zeros(2, np.complex64)})
    with pytest.raises(TypeError, match="got list"):
        write_safetensors(tmp_path, {"w": [1.0]})
    with pytest.raises(TypeError, match="got >f4"):
        write_safetensors(tmp_path, {"w": np.zeros(2, ">f4")})
    with pytest.raises(ValueError, match="max_shard_bytes"):
        write_safetensors(tmp_path, {}, max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_a_mapped_file(tmp_path):
    """A model is saved over the files that its arrays are mapped from."""
    write_safetensors(tmp_path, {"w": np.arange(10000, dtype=np.float32)})
    mapped = read_safetensors(tmp_path)
    write_safetensors(tmp_path, {"w": mapped["w"] + 1})
    np.testing.assert_array_equal(mapped["w"], np.arange(10000))
    np.testing.assert_array_equal(read_safetensors(tmp_path)["w"], np.arange(10000) + 1)
