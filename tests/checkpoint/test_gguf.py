from __future__ import annotations

import struct
import time

import gguf
import ml_dtypes
import numpy as np
import pytest

from fastlm import _C
from fastlm.checkpoint import FormatError, QuantizedArray, read_gguf
from tools.fuzz_checkpoint import ARRAY, BOOL, F32, I32, STRING, TYPES, U8, U32, GGUFFile, array, text

QUANTS = list(_C.quant_formats)


def test_against_the_gguf_package(tmp_path):
    """A file of the gguf package's writer: every type of tensor and value comes back."""
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny ü")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("tokens", ["a", "b ü", ""])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("ids", [1, -2, 3])
    plain = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "vector": rng.standard_normal(7).astype(np.float32),
        "f64": rng.standard_normal((2, 2)),
        "i8": rng.integers(-9, 9, (2, 3)).astype(np.int8),
        "i16": rng.integers(-9, 9, (2, 3)).astype(np.int16),
        "i32": rng.integers(-9, 9, (2, 3)).astype(np.int32),
        "i64": rng.integers(-9, 9, (2, 3)),
    }
    for name, a in plain.items():
        writer.add_tensor(name, a)
    bf16 = rng.standard_normal((3, 4)).astype(ml_dtypes.bfloat16)
    writer.add_tensor("bf16", bf16.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    blocks = {}
    for kind in QUANTS:
        size = _C.quant_formats[kind][2]
        blocks[kind] = rng.integers(0, 256, (3, 2 * size), np.uint8)
        writer.add_tensor(kind, blocks[kind], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata, tensors = read_gguf(path)
    expected = {
        "general.architecture": "llama", "general.name": "tiny ü", "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 4_000_000_000,
        "i32": -70000, "u64": 1 << 63, "i64": -(1 << 62), "f32": 1.5, "f64": 0.1, "yes": True, "tokens": ["a", "b ü", ""],
    }  # fmt: skip
    for key, value in expected.items():
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    np.testing.assert_array_equal(metadata["scores"], np.array([0.5, -1.0], np.float32))
    np.testing.assert_array_equal(metadata["ids"], [1, -2, 3])
    assert metadata["ids"].dtype == np.int32
    for name, a in {**plain, "bf16": bf16}.items():
        assert tensors[name].dtype == a.dtype, name
        assert tensors[name].shape == a.shape, name
        assert tensors[name].tobytes() == a.tobytes(), name
        assert not tensors[name].flags.writeable
        assert not tensors[name].flags.owndata
    for kind in QUANTS:
        q = tensors[kind]
        assert isinstance(q, QuantizedArray)
        assert (q.kind, q.shape) == (kind, (3, 2 * _C.quant_formats[kind][1]))
        np.testing.assert_array_equal(q.blocks, blocks[kind])
        assert not q.blocks.flags.owndata
    assert list(tensors) == [*plain, "bf16", *QUANTS]


def write(path, file, **lies):
    path.write_bytes(file if isinstance(file, bytes) else file.build(**lies))
    return path


def test_versions_and_shapes(tmp_path):
    for version in (2, 3):
        file = GGUFFile(version=version, alignment=64).value("general.alignment", U32, struct.pack("<I", 64))
        file.tensor("w", [4, 3, 2]).tensor("s", []).tensor("q", [32, 5], "Q8_0")
        metadata, tensors = read_gguf(write(tmp_path / "a.gguf", file))
        assert metadata == {"general.alignment": 64}
        assert tensors["w"].shape == (2, 3, 4)
        assert tensors["s"].shape == ()
        assert tensors["q"].shape == (5, 32)
    metadata, tensors = read_gguf(write(tmp_path / "a.gguf", GGUFFile()))
    assert metadata == {}
    assert tensors == {}


def test_nested_arrays(tmp_path):
    value = array(ARRAY, [array(STRING, [text("a"), text("b")]), array(ARRAY, [array(U8, [b"\1", b"\2"])]), array(I32, [])])
    metadata, _ = read_gguf(write(tmp_path / "a.gguf", GGUFFile().value("k", ARRAY, value)))
    assert metadata["k"][0] == ["a", "b"]
    np.testing.assert_array_equal(metadata["k"][1][0], np.array([1, 2], np.uint8))
    assert len(metadata["k"][2]) == 0


def test_truth_values(tmp_path):
    """A byte that is neither 0 nor 1 is true, and stored as 1."""
    file = GGUFFile().value("k", ARRAY, array(BOOL, [b"\0", b"\1", b"\x80"])).value("b", BOOL, b"\x02")
    metadata, _ = read_gguf(write(tmp_path / "a.gguf", file))
    assert metadata["k"].view(np.uint8).tolist() == [0, 1, 1]
    assert metadata["b"] is True


def test_large_vocabulary(tmp_path):
    """400 thousand tokens and as many merges in well under a second."""
    tokens = array(STRING, [text(f"token{i}") for i in range(400_000)])
    merges = array(STRING, [text(f"tok en{i}") for i in range(400_000)])
    path = write(tmp_path / "a.gguf", GGUFFile().value("t", ARRAY, tokens).value("m", ARRAY, merges))
    start = time.process_time()
    metadata, _ = read_gguf(path)
    assert time.process_time() - start < 0.6  # 0.1 s when nothing else runs
    assert metadata["t"][399_999] == "token399999"


def test_not_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="expected a GGUF file, got a folder"):
        read_gguf(tmp_path)
    with pytest.raises(FormatError, match="got an empty file"):
        read_gguf(write(tmp_path / "a.gguf", b""))
    with pytest.raises(FormatError, match="split into 3 files"):
        read_gguf(write(tmp_path / "a.gguf", GGUFFile().value("split.count", U32, struct.pack("<I", 3))))
    with pytest.raises(FormatError, match=r"split into array\(\[1, 1\]"):
        read_gguf(write(tmp_path / "a.gguf", GGUFFile().value("split.count", ARRAY, array(U8, [b"\1", b"\1"]))))


def head(tensors=0, values=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, values)


def one(payload, kind=ARRAY, key="k"):
    """A file with one value."""
    return head(values=1) + text(key) + struct.pack("<I", kind) + payload


def tensor(dims, kind=0, offset=0, name="w", ndim=None, data=4096):
    """A file with one tensor, and room for its data."""
    raw = head(tensors=1) + text(name) + struct.pack("<I", len(dims) if ndim is None else ndim)
    raw += b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in dims) + struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(data)


M = (1 << 64) - 1
# Replicas of holes that GGUF and model readers have had.
HOSTILE = {
    "wrong magic": (head(magic=b"GGML"), "must start with 'GGUF'"),
    "zip": (b"PK\3\4" + bytes(100), "must start with 'GGUF'"),
    "three bytes": (b"GGU", "file ends"),
    "no counts": (b"GGUF\3\0\0\0", "file ends"),
    "version 1": (head(version=1), "version must be 2 or 3, got 1"),
    "version 4": (head(version=4), "version must be 2 or 3, got 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors 2^64 - 1": (head(tensors=M), "tensors do not fit"),
    "tensors that would overflow": (head(tensors=M // 24 + 2) + bytes(64), "tensors do not fit"),
    "keys 2^64 - 1": (head(values=M), "keys do not fit"),
    "keys 2^63": (head(values=1 << 63), "keys do not fit"),
    "more keys than bytes": (head(values=2) + text("k") + struct.pack("<I", U8) + b"\1", "keys do not fit"),
    "key length 2^64 - 1": (head(values=1) + struct.pack("<Q", M) + bytes(40), "a key must have at most 65536 bytes"),
    "key length past the end": (head(values=1) + struct.pack("<Q", 60000) + bytes(40), "does not fit"),
    "key of 65537 bytes": (one(b"\1", U8, "k" * 65537), "a key must have at most 65536 bytes, got 65537"),
    "empty key": (one(b"\1", U8, ""), "a key must be UTF-8 and not empty"),
    "key not UTF-8": (one(b"\1", U8, b"\xff\xfe"), "a key must be UTF-8"),
    "key of a surrogate": (one(b"\1", U8, b"\xed\xa0\x80"), "a key must be UTF-8"),
    "key overlong": (one(b"\1", U8, b"\xc0\xaf"), "a key must be UTF-8"),
    "key cut in a letter": (one(b"\1", U8, b"ab\xf0\x9f\x98"), "a key must be UTF-8"),
    "key twice": (GGUFFile().value("k", U8, b"\1").value("k", U8, b"\2").build(), "each key once, got 'k' twice"),
    "value type 13": (one(bytes(40), 13), "a value's type must be from 0 to 12, got 13"),
    "value type 2^32 - 1": (one(bytes(40), 2**32 - 1), "must be from 0 to 12"),
    "value cut": (one(b"\1\2\3", U32), "does not fit"),
    "string length 2^64 - 1": (one(struct.pack("<Q", M) + bytes(40), STRING), "at most 16777216 bytes"),
    "string length 2^63 - 1": (one(struct.pack("<Q", (1 << 63) - 1) + bytes(40), STRING), "at most 16777216 bytes"),
    "string past the end": (one(struct.pack("<Q", 100) + bytes(40), STRING), "does not fit"),
    "string not UTF-8": (one(text(b"a\xffb"), STRING), "a string must be valid UTF-8"),
    "array of 2^64 - 1": (one(array(U8, [], M)), "at most 16777216 elements"),
    "array whose bytes overflow": (one(array(10, [], (1 << 61) + 1)), "at most 16777216 elements"),
    "array past the end": (one(array(F32, [bytes(4)], 3)), "3 elements does not fit"),
    "strings past the end": (one(array(STRING, [], 16_000_000)), "does not fit"),
    "array type 13": (one(array(13, [], 1) + bytes(40)), "an array's type must be from 0 to 12"),
    "49 bytes that hang": (one(array(STRING, [], 1 << 62))[:49], "at most 16777216 elements"),
    "49 bytes, arrays of nothing": (one(array(ARRAY, [], (1 << 60) + 7))[:49], "at most 16777216 elements"),
    "arrays within arrays": (one(b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(100_000))), "at most 4 deep"),
    "five deep": (one(b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(4)) + array(U8, [])), "at most 4 deep"),
    "alignment 0": (one(struct.pack("<I", 0), U32, "general.alignment"), "power of two from 8"),
    "alignment 4": (one(struct.pack("<I", 4), U32, "general.alignment"), "power of two from 8"),
    "alignment 48": (one(struct.pack("<I", 48), U32, "general.alignment"), "power of two from 8"),
    "alignment 2^31": (one(struct.pack("<I", 1 << 31), U32, "general.alignment"), "power of two from 8"),
    "alignment of another type": (one(struct.pack("<Q", 32), 10, "general.alignment"), "must be a 32-bit unsigned number"),
    "alignment a string": (one(text("32"), STRING, "general.alignment"), "must be a 32-bit unsigned number"),
    "five axes": (tensor([1] * 5), "at most 4 axes, got 5"),
    "2^32 - 1 axes": (tensor([1], ndim=2**32 - 1), "at most 4 axes"),
    "axis 0": (tensor([4, 0]), "axes of 1 or more, got 0"),
    "axis -1": (tensor([-1]), "axes of 1 or more"),
    "axis 2^63": (tensor([1 << 63]), "axes of 1 or more"),
    "product overflows to 0": (tensor([1 << 32, 1 << 32]), "more elements than can be counted"),
    "product overflows to 1": (tensor([0xAAAAAAAAAAAAAAB, 3, 16]), "more elements than can be counted"),
    "product overflows to a small number": (tensor([(1 << 61) + 1, 8]), "more elements than can be counted"),
    "bytes overflow": (tensor([1 << 62]), "more bytes than can be counted"),
    "2^62 weights, quantised": (tensor([1 << 62], 12), "takes 2594073385365405696 bytes at 0 of the data, which has 4096"),
    "larger than the file": (tensor([1 << 40]), "the file is truncated or corrupt"),
    "one byte too large": (tensor([8], data=31), "the file is truncated or corrupt"),
    "offset past the end": (tensor([1], offset=8192), "the file is truncated or corrupt"),
    "offset 2^64 - 32": (tensor([8], offset=M - 31), "the file is truncated or corrupt"),
    "offset that would wrap into the header": (tensor([64], offset=M - 63), "the file is truncated or corrupt"),
    "offset not aligned": (tensor([1], offset=4), "must start at a multiple of 32, got 4"),
    "row not whole blocks": (tensor([33, 2], 8), "a row must be a multiple of 32 for Q8_0, got 33"),
    "scalar of blocks": (tensor([], 8), "a row must be a multiple of 32"),
    "K row of half a block": (tensor([128, 2], 12), "a row must be a multiple of 256 for Q4_K, got 128"),
    "type 4": (tensor([32], 4), "must have a type that ggml defines, got 4"),
    "type 2^32 - 1": (tensor([32], 2**32 - 1), "must have a type that ggml defines"),
    "a type that is not read": (tensor([256], 10), "is Q2_K, which is not read: requantise"),
    "name not UTF-8": (tensor([1], name=b"\xff"), "name must be UTF-8"),
    "name of 2 kB": (tensor([1], name="n" * 2000), "a tensor's name must have at most 1024 bytes"),
    "empty name": (tensor([1], name=""), "name must be UTF-8 and not empty"),
    "tensor twice": (GGUFFile().tensor("w", [2]).tensor("w", [2]).build(), "each tensor once, got 'w' twice"),
    "no data": (tensor([1], data=0), "the file is truncated or corrupt"),
    "no padding": (tensor([1])[:50], "file ends"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    raw, message = HOSTILE[name]
    path = write(tmp_path / "a.gguf", raw)
    with pytest.raises(FormatError) as error:
        read_gguf(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path} at byte {error.value.offset}: ")
    assert 0 <= error.value.offset <= len(raw)
    assert len(str(error.value)) < 500


def test_every_truncation(tmp_path):
    """A file cut at any byte is refused: nothing is optional, and no read passes the end."""
    file = GGUFFile().value("k", STRING, text("value")).value("a", ARRAY, array(STRING, [text("x"), text("yz")]))
    for kind in TYPES:
        file.tensor(f"t.{kind}", [256], kind)
    whole = file.build()
    path = tmp_path / "a.gguf"
    # The last tensor's padding belongs to nobody.
    end = len(whole) - (-256 * 2 % 32)
    step = 7  # prime to the record's sizes
    for n in [*range(1, 200), *range(200, end, step), end - 1]:
        with pytest.raises(FormatError):
            read_gguf(write(path, whole[:n]))
        path.unlink()  # still mapped, perhaps: a new file, not the old one shortened
    read_gguf(write(path, whole))


def test_messages(tmp_path):
    path = write(tmp_path / "a.gguf", tensor([4, 0]))
    with pytest.raises(ValueError, match=r"a\.gguf at byte 45: tensor 'w' must have axes of 1 or more, got 0"):
        read_gguf(path)
