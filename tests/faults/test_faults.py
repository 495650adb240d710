# SPDX-License-Identifier: Apache-2.0
"""A few trials of `make faults` on every run, and faults that are no kill: disk, loader, Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import qgraph
from qgraph.calibration.streams import Shelf
from qgraph.errors import CalibrationError, ExportError
from tests.faults.jobs import Net, loader, model, wide
from tests.faults.killing import Uninterrupted, digests, temporaries, trial
from tests.faults.run import totals

ROOT = Path(__file__).parents[2]
exporting = importlib.import_module("qgraph.backends.onnx.export")  # the package has it as a call


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: what a full disk or a quota does to a writer.

    No fixture: between a test's phases others write too, such as coverage its data.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def big():
    return wide(0)


def test_no_space_for_a_saved_model_leaves_the_old_file_and_nothing_else(tmp_path, big):
    path = tmp_path / "whole.qgraph"
    path.write_bytes(b"the old file")
    with (
        small_files(),
        pytest.raises(ExportError, match=r"whole\.qgraph: cannot be written: File too large"),
    ):
        big.save(path)
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["whole.qgraph"]


def test_no_space_for_an_onnx_file_leaves_the_old_file_and_nothing_else(tmp_path, big):
    path = tmp_path / "whole.onnx"
    path.write_bytes(b"the old file")
    with small_files(), pytest.raises(ExportError, match=r"whole\.onnx"):
        big.to_onnx(path)
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["whole.onnx"]


def test_no_space_for_activations_is_said_before_anything_is_mapped(tmp_path):
    shelf = Shelf(tmp_path, persistent=True)
    shelf.allocate("fits", (100, 4), torch.float32).fill_(1.0)
    with (
        small_files(),
        pytest.raises(CalibrationError, match="4000000 bytes for activations cannot be had"),
    ):
        shelf.allocate("does not", (1000, 1000), torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["fits.bin"]


def test_a_read_only_folder_is_refused_by_name(tmp_path, big, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")  # root may write anywhere

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ExportError, match=r"m\.qgraph: cannot be written: Permission denied"):
        big.save(tmp_path / "m.qgraph")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


class Dying(Dataset[torch.Tensor]):
    """Its worker is killed at the third item, as by the kernel when memory runs out."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(6)


def test_a_loader_worker_that_dies_ends_the_compilation_and_leaves_the_model_alone():
    net = Net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = DataLoader(Dying(), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match="worker"):
        qgraph.compile(net, batches, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not multiprocessing.active_children()


PROGRAM = """
import signal, sys, torch, qgraph
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from torch.utils.data import DataLoader, TensorDataset
from tests.faults.jobs import Net
data = DataLoader(TensorDataset(torch.randn(100000, 6)), batch_size=2, num_workers=1)
print("ready", flush=True)
def told(what, done, total):
    if done > 3:
        print("calibrating", flush=True)
qgraph.compile(Net().eval(), data, "int8", progress=told)
"""


def test_ctrl_c_ends_a_compilation_with_its_loader_workers():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line == "calibrating\n":
                break
        errors = ""
        for _ in range(4):  # what is raised while an object is destroyed, Python drops
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                errors = process.communicate(timeout=15)[1]
                break
        assert process.poll() not in {None, 0}
        assert "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 20
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _session(process.pid)


def _session(leader: int) -> list[int]:
    """Processes that still live in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_calibration_ends_as_an_uninterrupted_one(seed, tmp_path):
    quantized = qgraph.compile(model(), loader(), "w4a8", progress=False)
    quantized.save(tmp_path / "whole.qgraph")
    last = digests(tmp_path)
    whole = Uninterrupted(last, frozenset(last.values()), 0.05)  # long before the end
    found = trial("calibration", seed, whole)
    assert not found.failure
    assert found.killed


def killed_at(step: int, path: Path) -> None:
    """Export in a fork that is killed at a step: before a file is published, or tidying begins."""
    child = os.fork()
    if child == 0:
        left = [step]

        def stop(real: Callable[..., None]) -> Callable[..., None]:
            def stopping(*args: object) -> None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                real(*args)

            return stopping

        for name in ("publish", "_remove_stale"):
            setattr(exporting, name, stop(getattr(exporting, name)))
        try:
            exporting.export(wide(1).graph_module, path, external_data=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_graph_never_meets_the_tensors_of_another_export(step, tmp_path):
    path, x = tmp_path / "whole.onnx", torch.randn(8, 8)
    exporting.export(wide(0).graph_module, path, external_data=True)
    old, new = (wide(number)(x) for number in range(2))
    assert not torch.allclose(old, new, atol=0.1)
    killed_at(step, path)
    torch.testing.assert_close(qgraph.load(path)(x), new if step == 2 else old, atol=0.02, rtol=0)
    info = exporting.export(wide(1).graph_module, path, external_data=True)
    torch.testing.assert_close(qgraph.load(path)(x), new, atol=0.02, rtol=0)
    assert len(list(tmp_path.iterdir())) == 2
    assert info.size == sum(part.stat().st_size for part in tmp_path.iterdir())
    exporting.export(wide(1).graph_module, path, external_data=False)
    assert [part.name for part in tmp_path.iterdir()] == ["whole.onnx"]


def test_a_half_written_file_would_be_seen(tmp_path):
    """The trials themselves can fail."""
    wrong = Uninterrupted({"whole.qgraph": "another digest"}, frozenset(), 30.0)
    found = trial("calibration", 3, wrong)
    assert found.failure
    assert "1 failed" in totals([vars(found)])
    (tmp_path / ".m.qgraph.1-00000000.tmp").touch()
    assert temporaries(tmp_path)
