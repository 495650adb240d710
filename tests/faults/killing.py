# SPDX-License-Identifier: Apache-2.0
"""One trial: start a job in a fork, kill -9 it at a random moment, look, run it again, compare."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import qgraph
from tests.faults.jobs import JOBS, export, export_beside, save

TWICE = {job.__name__: job for job in (save, export, export_beside)}


@dataclass(frozen=True)
class Trial:
    """What one kill did.

    Attributes:
        job: which.
        seed: of the moment.
        at: share of the job's time at which it was killed.
        killed: whether it was still running.
        left: "nothing", "old", or "new": the file that a reader found after the kill.
        rubbish: temporary files that the kill left; none may be left by the run after it.
        kept: state files of finished work that the second run found.
        failure: what did not hold.
    """

    job: str
    seed: int
    at: float
    killed: bool
    left: str
    rubbish: int
    kept: int
    failure: str = ""


def forked(job: str, folder: Path, *, kill_after: float | None = None) -> tuple[int, float]:
    """Run in a fork; exit code (negative: the signal) and seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            torch.set_num_threads(1)
            JOBS[job](folder)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def digests(folder: Path) -> dict[str, str]:
    """The results in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("whole.*")}


def temporaries(folder: Path) -> list[Path]:
    """What writers leave when they are killed."""
    return [p for p in folder.rglob("*") if p.name.startswith(".") or p.suffix in {".part", ".new"}]


@dataclass(frozen=True)
class Uninterrupted:
    """What a job gives when nobody kills it, every file that may be seen on the way, its time."""

    last: dict[str, str]
    seen: frozenset[str]
    seconds: float


def uninterrupted(job: str) -> Uninterrupted:
    """Run a job twice in folders of its own; both must agree."""
    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as name:
            code, seconds = forked(job, Path(name))
            assert code == 0, f"{job} ended with {code}"
            found.append((digests(Path(name)), seconds))
    assert found[0][0] == found[1][0], f"{job} is not deterministic"
    seen = set(found[0][0].values())
    if job in TWICE:  # both of two models are right on the way
        with tempfile.TemporaryDirectory() as name:
            TWICE[job](Path(name), times=1)
            seen |= set(digests(Path(name)).values())
    return Uninterrupted(found[0][0], frozenset(seen), found[1][1])


def trial(job: str, seed: int, whole: Uninterrupted) -> Trial:
    """Kill once, look at what is there, run again, compare."""
    at = random.Random(f"{job}/{seed}").random()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, _ = forked(job, folder, kill_after=at * whole.seconds)
        after = digests(folder)
        broken = [n for n, digest in after.items() if digest not in whole.seen]
        failure = f"half-written: {broken}" if broken else _unreadable(folder)
        rubbish, kept = len(temporaries(folder)), len(list(folder.rglob("region_*.pt")))
        kept += (folder / "state.json").exists()
        again, _ = forked(job, folder)
        if again != 0:
            failure = failure or f"the run after the kill ended with {again}"
        elif digests(folder) != whole.last:
            failure = failure or "the run after the kill gave another file"
        elif temporaries(folder):
            failure = failure or f"left behind: {[p.name for p in temporaries(folder)]}"
    left = "nothing" if not after else "new" if after == whole.last else "old"
    return Trial(job, seed, round(at, 3), code != 0, left, rubbish, kept, failure)


def _unreadable(folder: Path) -> str:
    """A file that is there must load."""
    for path in folder.glob("whole.*"):
        if path.suffix in {".qgraph", ".onnx"}:
            try:
                qgraph.load(path)
            except qgraph.ArtifactError as error:
                return f"{path.name} does not load: {error}"
    return ""
