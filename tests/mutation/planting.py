# SPDX-License-Identifier: Apache-2.0
"""Plant a bug in a copy of the repository and run tests on it, in a fork that has torch at hand.

Importing torch takes longer than most rooms' tests, so one process imports what no bug touches and
forks for each. Bytecode in the copy is checked by hash: a changed file is never read stale.
"""

from __future__ import annotations

import compileall
import importlib
import os
import py_compile
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "out", "*_cache", "__pycache__", "site", "*.egg-info"
)
PRELOADED = (
    "torch", "torch.export", "torch.fx", "onnx", "onnxruntime", "onnxscript", "networkx",
    "safetensors.torch", "scipy.optimize", "hypothesis", "pytest", "xdist",
)  # fmt: skip
# pytest: 1 says that tests failed, 2 that they could not even be collected.
NOTICED = (1, 2)
HANGS = 10  # wall time over processor time


class Verdict(NamedTuple):
    """How a run of tests ended; `why` it noticed nothing, or ""; `by` which test it did."""

    why: str
    seconds: float
    output: str
    by: str = ""


class Change(NamedTuple):
    """Characters `start` to `end` of a file become `new`."""

    file: str
    start: int
    end: int
    new: str


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """A copy that may be broken, with bytecode that is checked against its source."""
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=SKIPPED)
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        for room in ("qgraph", "passes", "backends", "examples"):
            compileall.compile_dir(copy / room, quiet=2, invalidation_mode=mode)
        yield copy


def run(change: Change | None, tests: Sequence[str], copy: Path, seconds: float) -> Verdict:
    """Run tests on the copy with the change in it; the copy is whole again afterwards.

    `seconds` are of processor time, so that a busy machine makes no survivors.
    """
    if change is None:
        return _forked(tests, copy, seconds)
    target = copy / change.file
    whole = target.read_text()
    target.write_text(whole[: change.start] + change.new + whole[change.end :])
    try:
        return _forked(tests, copy, seconds)
    finally:
        target.write_text(whole)


def _forked(tests: Sequence[str], copy: Path, seconds: float) -> Verdict:
    began = time.monotonic()
    log = copy / "out.txt"
    child = os.fork()
    if child == 0:
        _test(tests, copy, log, round(seconds))
    status = None
    while status is None and time.monotonic() - began < HANGS * seconds:
        time.sleep(0.05)
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    taken = time.monotonic() - began
    output = log.read_text(errors="replace") if log.exists() else ""
    if status is None:
        return Verdict("the tests hang", taken, output)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return Verdict(f"no test failed within {seconds:.0f} s", taken, output)
    # A crash of the interpreter is noticed too.
    noticed = code in NOTICED or code < 0
    why = "" if noticed else "all tests passed" if code == 0 else f"pytest ended with {code}"
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return Verdict(why, taken, output, first[1] if noticed and first else "")


def _test(tests: Sequence[str], copy: Path, log: Path, seconds: int) -> None:
    """In the child: leave through `os._exit` only."""
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.chdir(copy)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ["PYTHONPATH"] = str(copy)
        os.environ["HYPOTHESIS_PROFILE"] = "unshrunk"
        sys.dont_write_bytecode = True
        sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p) != ROOT)]
        for name in [n for n in sys.modules if n.split(".")[0] in {"qgraph", "tests"}]:
            del sys.modules[name]
        import pytest
        import torch

        torch.set_num_threads(1)
        code = pytest.main(
            ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist",
             "-W", "ignore::pytest.PytestAssertRewriteWarning",
             "-m", "not slow and not cuda", *tests]
        )  # fmt: skip
    except BaseException:  # noqa: BLE001  whatever it was, this process must not go on as a parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
