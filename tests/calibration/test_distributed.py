# SPDX-License-Identifier: Apache-2.0
"""Statistics merged over ranks equal those of one process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from qgraph.calibration import FusedStatistics, Histogram, Moments, Range, Reservoir, all_reduce
from qgraph.errors import CalibrationError


def fresh() -> FusedStatistics:
    return FusedStatistics([Range(), Histogram(), Reservoir(rows=5), Moments()])


def data() -> torch.Tensor:
    return torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    seen, idle = fresh(), fresh()
    seen.update(data()[rank * 2 : 2 + rank * 4])
    if rank:
        idle.update(data())
    all_reduce({"a": seen, "b": idle})
    torch.save([seen.state(), idle.state()], Path(folder) / f"{rank}.pt")
    try:
        all_reduce({i: fresh() for i in range(rank + 1)})
    except CalibrationError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_without_a_process_group_nothing_changes():
    seen = fresh()
    seen.update(data())
    before = seen.state()
    all_reduce({"a": seen})
    assert all(torch.equal(v, before[k]) for k, v in seen.state().items())


@pytest.mark.slow
def test_two_ranks_end_with_the_statistics_of_all_data():
    whole = fresh()
    whole.update(data())
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
        for states in ranks:
            for state in states:
                for name, value in whole.state().items():
                    torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(v, ranks[1][0][k]) for k, v in ranks[0][0].items())
        for rank in range(2):
            told = (Path(folder) / f"{rank}.txt").read_text()
            assert told == "ranks observe different numbers of values: [1, 2]"
