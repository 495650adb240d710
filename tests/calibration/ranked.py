# SPDX-License-Identifier: Apache-2.0
"""Jobs of a few gloo processes on one machine."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

import qgraph
from qgraph.errors import QGraphError

PATIENCE = 300.0  # seconds; busy machines start processes slowly


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)
    ).eval()


def small_batches(count: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8, generator=generator) for _ in range(count)]


def entry(rank: int, size: int, folder: str, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        found = work(rank)
    except QGraphError as error:
        found = error
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returned, or the typed error it raised, on each rank; None if it died."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload([__name__])  # torch is imported once for all ranks
        context = start_processes(
            entry, (size, folder, work), nprocs=size, join=False, start_method="forkserver"
        )
        assert context is not None
        for process in context.processes:
            process.join(PATIENCE)
        paths = [Path(folder) / f"{rank}.pickle" for rank in range(size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compiled(
    pipeline: str = "int8", batches: list[torch.Tensor] | None = None
) -> qgraph.QuantizedModel:
    return qgraph.compile(
        small_model(), small_batches() if batches is None else batches, pipeline, verify=False,
        progress=False,
    )  # fmt: skip
