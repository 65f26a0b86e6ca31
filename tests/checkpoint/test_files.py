"""Atomic writing and JSON."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from fastlm.checkpoint import FormatError, atomic_write, read_json, write_json


def test_atomic_write(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"new, but only ha")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        atomic_write(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no" / "a.bin", b"")


def test_killed_while_writing(tmp_path):
    """A process killed in the middle of a save leaves the old file whole."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from fastlm.checkpoint import atomic_write
def half(file):
    file.write(b"new"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
atomic_write(sys.argv[1], half)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_bytes() == b"old"


def test_json(tmp_path):
    value = {"a": 1, "b": [1.5, None, True, "ü\U0001f600"], "c": {"d": {}}, "e": 1e400}
    write_json(tmp_path / "c.json", value)
    assert read_json(tmp_path / "c.json") == value
    (tmp_path / "c.json").write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "c.json") == {"a": "\U0001f600"}
    (tmp_path / "c.json").write_text('{"a": "' + '\\"[' * 1000 + '"}')  # brackets in a string do not nest
    assert len(read_json(tmp_path / "c.json")["a"]) == 2000


BAD = {
    "empty": (b"", "not JSON: Expecting value"),
    "list": (b"[1]", "expected a JSON object, got a list"),
    "string": (b'"x"', "got a string"),
    "number": (b"7", "got a number"),
    "null": (b"null", "got null"),
    "truncated": (b'{"a": [1, 2', "not JSON"),
    "trailing": (b'{"a": 1} x', "not JSON: Extra data"),
    "comment": (b'{"a": 1} // x', "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "at byte 7: JSON must be UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "half a pair": (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
    "half a pair as a key": (b'{"\\uDE00": 1}', "half of a surrogate pair"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
    "deep lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nest at most 64 deep"),
    "deep objects": (b'{"a": ' * 70 + b"1" + b"}" * 70, "nest at most 64 deep"),
    "deep, unclosed": (b'{"a": ' + b"[" * 1_000_000, "nest at most 64 deep"),
    "deep after an escaped quote": (b'{"\\"": ' + b"[" * 100_000, "nest at most 64 deep"),
    "long number": (b'{"a": ' + b"9" * 100_000 + b"}", "not JSON that is read"),
    "control character": (b'{"a": "\x01"}', "not JSON: Invalid control character"),
    "zeros": (bytes(1000), "not JSON"),
    "quotes": (b'"\\' * 500_000, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_json_refuses(tmp_path, name):
    raw, message = BAD[name]
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError) as error:
        read_json(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_json_limits(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(FormatError, match="at most 50 bytes, got more"):
        read_json(path, limit=50)
    with pytest.raises(FormatError, match="got a folder"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="got not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
