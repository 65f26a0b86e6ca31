"""The ahead-of-time compilation, minutes in processes of its own, runs beside the other tests; test_budget.py waits for it at the end."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from tests.gpu.build import ROOT

RUNNING: list[subprocess.Popen[str]] = []
COMPILED: dict[tuple[str, ...], Future[tuple[int, str]]] = {}


def build(arguments: tuple[str, ...]) -> tuple[int, str]:
    """The exit status of tools/gpu_build.py --check, and what it says. In a process of its own: here Triton may be in its interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["nice", sys.executable, str(ROOT / "tools/gpu_build.py"), "--check", "--no-pack", *arguments]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    RUNNING.append(process)
    said, _ = process.communicate()
    return process.returncode, said


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_budget.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins with what the selected tests will ask for."""
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):  # a worker of xdist compiles in the test itself
        return
    wanted = [
        i.callspec.params["arguments"] for i in session.items if getattr(i, "originalname", "") == "test_budget" and not skipped(i)
    ]
    pool = ThreadPoolExecutor(1)
    COMPILED.update({arguments: pool.submit(build, arguments) for arguments in wanted})


def skipped(item: pytest.Item) -> bool:
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def pytest_sessionfinish() -> None:
    """Nothing goes on where the session ended early."""
    for future in COMPILED.values():
        future.cancel()
    for process in RUNNING:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture
def compiled(arguments: tuple[str, ...]) -> tuple[int, str]:
    return COMPILED[arguments].result() if arguments in COMPILED else build(arguments)


@pytest.fixture
def on() -> Iterator[Any]:
    """The emulated device with the Triton twins in their interpreter: nothing outside of arrays is written, and every form that was
    launched is one that is compiled ahead of time."""
    before = Emulated.damaged
    with emulated(twin="triton") as device:
        yield device
    assert Emulated.damaged == before, "memory outside of an array was written"
    for op, launched in device.launched.items():
        listed = {variant(*v) for v in importlib.import_module(f"fastlm.kernels.{op}.{op}_triton").variants()}
        assert launched <= listed, f"{launched - listed} would not be compiled ahead of time"
