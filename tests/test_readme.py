"""The README's Python is run as it stands; its tables name only what exists."""

from __future__ import annotations

import re
from pathlib import Path

from fastlm import data, ops
from fastlm.cli.demo import shakespeare

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(shakespeare()[:100_000], encoding="utf-8")
    names: dict[str, object] = {}
    for code in blocks("python"):  # a later block goes on from the earlier
        assert len(code.splitlines()) <= 20
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "To be" in printed
    assert (tmp_path / "my-model" / "config.json").exists()
    assert float(printed.split()[-2]) < 6  # the held-out loss of masked words


def test_objectives_exist():
    table = README.split("## Objectives")[1].split("\n## ")[0]
    names = re.findall(r"^\| `data\.(\w+)`", table, flags=re.M)
    assert len(names) >= 8
    assert [n for n in names if not hasattr(data, n)] == []


def test_operations_exist():
    table = README.split("## Operations")[1].split("\n## ")[0]
    names = [name for row in re.findall(r"^\| (.*?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 15
    assert [n for n in names if not hasattr(ops, n)] == []
