from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fastlm import _C


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU runs, in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after the test."""
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the layers of proof that the GPU's kernels do without here."""
    from fastlm.cuda import status
    from tests.gpu.build import layers

    usable, why = status()
    skipped = {layer: reason for layer, reason in (layers() | {"a real device": "" if usable else why}).items() if reason}
    for layer, reason in skipped.items():
        terminalreporter.write_line(f"GPU kernels without {layer}: {reason.rstrip('.')}.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nvcc is, no test of the GPU's kernels may be skipped for want of a tool."""
    from tests.gpu.build import gpu_build

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or gpu_build().nvcc() is None:
        return
    skipped = [r for r in reporter.stats.get("skipped", []) if r.nodeid.startswith("tests/gpu/")]
    wanting = sorted(
        {r.nodeid.split("[")[0] for r in skipped if re.search(r"triton|nvcc|toolkit|cuda\.h|g\+\+", str(r.longrepr), re.I)}
    )
    if wanting:
        reporter.write_line(f"\nskipped although nvcc is here: {', '.join(wanting)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
