# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m qgraph compile`, the whole way: files, exit codes and what a shell is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import os
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
def loader():
    torch.manual_seed(1)
    return [torch.randn(3, 8) for _ in range(5)]
class Dies:
    def __len__(self):
        return 5
    def __iter__(self):
        for number, batch in enumerate(loader()):
            if number == 3 and os.environ.get("RANK") == "1":
                os._exit(9)
            yield batch
def spoiled():
    batches = loader()
    batches[3][0, 0] = float("nan")
    return batches
"""
pytestmark = pytest.mark.slow  # processes that import torch, one after the other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    (place / "model.py").write_text(MODEL)
    return place


def run(folder: Path, loader: str, out: str, ranks: int) -> subprocess.CompletedProcess[str]:
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(job if ranks > 1 else []), "-m", "qgraph", "compile", "model.py:build",
         "--data", f"model.py:{loader}", "-o", out],
        cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_job_writes_the_files_of_one_process(folder: Path) -> None:
    job, alone = run(folder, "loader", "job", 2), run(folder, "loader", "alone", 1)
    assert (job.returncode, alone.returncode) == (0, 0), job.stderr
    assert job.stdout.count("lowest SQNR") == 1  # one rank prints
    for name in ("model.qgraph", "model.onnx"):
        assert (folder / "job" / name).read_bytes() == (folder / "alone" / name).read_bytes()


def test_a_rank_that_dies_is_told_on_the_others_and_no_files_are_written(folder: Path) -> None:
    job = run(folder, "Dies", "died", 2)
    assert job.returncode != 0
    assert "exitcode" in job.stderr  # torchrun names the rank
    assert not list((folder / "died").glob("model.*"))


def test_what_one_rank_refuses_is_told_with_its_batch(folder: Path) -> None:
    job = run(folder, "spoiled", "spoiled", 2)
    assert job.returncode != 0
    assert "batch 3" in job.stderr
    assert "non-finite" in job.stderr
    assert not list((folder / "spoiled").glob("model.*"))
