# SPDX-License-Identifier: Apache-2.0
"""Work that gets killed: each job writes `whole.*` into a folder, the same bytes each time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

import qgraph
from qgraph.backends import onnx
from qgraph.model import QuantizedModel
from qgraph.passes import ReconstructBlocks


class Net(nn.Module):
    """Three products with two shortcuts, so that reconstruction finds regions."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        scores: torch.Tensor = self.head(x)
        return scores


@functools.cache
def model() -> GraphModule:
    """Traced once; every fork has it."""
    torch.manual_seed(0)
    return qgraph.trace(Net().eval(), loader()[0])


@functools.cache
def loader() -> list[torch.Tensor]:
    """Calibration batches."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(6)]


@functools.cache
def wide(seed: int) -> QuantizedModel:
    """A model of about a megabyte, so that writing it takes a while."""
    torch.manual_seed(seed)
    built = nn.Sequential(nn.Linear(8, 1000), nn.ReLU(), nn.Linear(1000, 1000)).eval()
    return qgraph.compile(built, [torch.randn(8, 8)], "int8", verify=False, progress=False)


def calibration(folder: Path) -> None:
    """Compile and save."""
    quantized = qgraph.compile(model(), loader(), "w4a8", cache_dir=folder, progress=False)
    quantized.save(folder / "whole.qgraph")


def sensitivity(folder: Path) -> None:
    """Measure with a state file, then write the table."""
    table = qgraph.sensitivity(
        model(), loader(), weight_bits=(3, 4, 8), activation_bits=(4, 8),
        state_file=folder / "state.json", progress=False,
    )  # fmt: skip
    table.to_json(folder / "whole.json")


def reconstruction(folder: Path) -> None:
    """Learn to round with a state directory, then save."""
    chosen = qgraph.pipeline("w3a4_recon")
    quick = ReconstructBlocks(steps=20, batch=8, warm_start=False)
    chosen = chosen.replace("reconstruct-blocks", quick)
    quantized = qgraph.compile(model(), loader(), chosen, cache_dir=folder, progress=False)
    quantized.save(folder / "whole.qgraph")


def save(folder: Path, *, times: int = 40) -> None:
    """Save two models over each other; the second stays."""
    for number in range(times):
        wide(number % 2).save(folder / "whole.qgraph")


def export(folder: Path, *, times: int = 2) -> None:
    """Export over a file that is there already."""
    for number in range(times):
        wide(number % 2).to_onnx(folder / "whole.onnx")


def export_beside(folder: Path, *, times: int = 2) -> None:
    """The same with the tensors in a file beside it."""
    for number in range(times):
        onnx.export(wide(number % 2).graph_module, folder / "whole.onnx", external_data=True)


JOBS: dict[str, Callable[[Path], None]] = {
    job.__name__: job
    for job in (calibration, sensitivity, reconstruction, save, export, export_beside)
}
