# SPDX-License-Identifier: Apache-2.0
"""Weights that several products read are rounded with feedback for all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qgraph
from qgraph.passes import ReconstructBlocks
from qgraph.report.layers import sqnr


class Levels(nn.Module):
    """One tower of two convolutions over three sizes of a map, as detectors have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 16, 1)
        self.tower = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        sizes = [x, x[:, :, ::2, ::2], x[:, :, ::4, ::4]]
        return torch.cat([self.head(self.tower(each)).flatten(2) for each in sizes], 2)


def images(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    made = [torch.randn(8, 6, 16, 16, generator=generator) for _ in range(4)]
    return [torch.einsum("oc,bchw->bohw", mixing, x) for x in made]


def rounded(model: nn.Module, data: list[Tensor], *, warm: bool) -> qgraph.QuantizedModel:
    chosen = qgraph.pipeline("w3a8").insert_after(
        "insert-quantizers", ReconstructBlocks(steps=0, warm_start=warm)
    )
    return qgraph.compile(model, data, chosen)


def test_a_tower_over_three_levels_comes_nearer_on_images_never_seen() -> None:
    torch.manual_seed(0)
    model, data, fresh = Levels().eval(), images(0), images(1)[0]
    plain, warm = (rounded(model, data, warm=w) for w in (False, True))
    with torch.no_grad():
        wanted = model(fresh)
    assert sqnr(wanted, warm(fresh)) > sqnr(wanted, plain(fresh)) + 1.0
    told = [d for d in warm.report.decisions if d.by == "reconstruct-blocks"]
    assert all(d.numbers["flips"] > 0 for d in told if d.outcome == "applied")
