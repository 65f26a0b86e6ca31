"""The thread pool: the same bits on any number of threads, forks, many callers at once, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.tensor import Tensor


def work(seed=0):
    """An operation with parallel parts forward and backward; its results as one array."""
    rng = np.random.default_rng(seed)
    x, w = (
        Tensor(rng.standard_normal((300, 257)).astype(np.float32), True),
        Tensor(rng.standard_normal(257).astype(np.float32), True),
    )
    y = ops.rms_norm(ops.activation(x, "gelu"), w)
    y.backward(rng.standard_normal((300, 257)).astype(np.float32))
    return np.concatenate([y.data.ravel(), x.grad.ravel(), w.grad])


def test_bits_over_threads(isa, threads):
    results = []
    for n in (1, 2, 3, 8, 64):
        _C.set_num_threads(n)
        assert backend.num_threads() == n
        results.append(work())
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_number_of_threads_is_refused(threads):
    before = backend.num_threads()
    for n in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"\[set_num_threads\] n must be from 1 to 1024, got {n}"):
            backend.set_num_threads(n)
    assert backend.num_threads() == before


def wait(pid, seconds=20.0):
    """The exit status of a child; it is killed where it takes too long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


def fork_and_work(expected):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if np.array_equal(work(), expected) and np.array_equal(work(), expected) else 3)
        finally:
            os._exit(4)
    return wait(pid)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork(threads):
    """A child of a process whose pool runs makes its own pool: right results, no hang, and the parent goes on."""
    _C.set_num_threads(2)
    expected = work()
    for _ in range(20):
        assert fork_and_work(expected) == 0
        np.testing.assert_array_equal(work(), expected)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_while_another_thread_computes(threads):
    _C.set_num_threads(2)
    expected = work()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            work()

    other = threading.Thread(target=busy)
    other.start()
    try:
        for _ in range(20):
            assert fork_and_work(expected) == 0
    finally:
        stop.set()
        other.join()


def test_many_callers(threads):
    """Eight Python threads, 200 calls each: whoever finds the pool taken computes alone, with the same bits."""
    _C.set_num_threads(2)
    rng = np.random.default_rng(3)
    x = [rng.standard_normal((70, 130)).astype(np.float32) for _ in range(8)]
    w = rng.standard_normal(130).astype(np.float32)
    expected = [ops.layer_norm(a, w) for a in x]
    wrong = []

    def caller(i):
        for _ in range(200):
            if not np.array_equal(ops.layer_norm(x[i], w), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for t in callers:
        t.start()
    for t in callers:
        t.join(60)
    assert not any(t.is_alive() for t in callers)
    assert wrong == []


def test_number_of_threads_changes_while_others_compute(threads):
    _C.set_num_threads(2)
    expected = work()
    wrong = []
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            if not np.array_equal(work(), expected):
                wrong.append(1)

    callers = [threading.Thread(target=busy) for _ in range(3)]
    for t in callers:
        t.start()
    for n in (1, 4, 2, 3) * 5:
        _C.set_num_threads(n)
        time.sleep(0.005)
    stop.set()
    for t in callers:
        t.join(60)
    assert wrong == []


def test_nested(isa, threads):
    """A parallel region inside a piece of another runs on the thread that meets it."""
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        x = np.arange(5000, dtype=np.float32)
        y = np.empty_like(x)
        _C.simd_map("nested", y, x)
        np.testing.assert_array_equal(y, x + 1)


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTLM_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("text", ["0", "-1", "abc", "2x", "1025", "1.5", "99999999999999999999"])
def test_environment_refuses_threads(text):
    done = run("from fastlm import ops", FASTLM_NUM_THREADS=text)
    assert done.returncode == 1
    assert f'FASTLM_NUM_THREADS must be a whole number from 1 to 1024, got "{text}"' in done.stderr.splitlines()[-1]


def test_environment_sets_threads_and_isa():
    done = run(
        "from fastlm import backend; print(backend.num_threads(), backend.isa())", FASTLM_NUM_THREADS="3", FASTLM_ISA="scalar"
    )
    assert done.stdout == "3 scalar\n", done.stderr


def test_environment_refuses_isa():
    done = run("from fastlm import ops", FASTLM_ISA="sse9")
    assert done.returncode == 1
    assert 'FASTLM_ISA must be one of scalar, avx2, avx512, neon, got "sse9"' in done.stderr.splitlines()[-1]
    lacking = next(name for name in ("neon", "avx2", "avx512") if name not in _C.isas())
    done = run("from fastlm import ops", FASTLM_ISA=lacking)
    assert done.returncode == 1
    assert f"FASTLM_ISA={lacking}: this CPU ({_C.cpu_name()}) cannot run it" in done.stderr.splitlines()[-1]
    assert backend.isa() in _C.isas()
