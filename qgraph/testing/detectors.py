# SPDX-License-Identifier: Apache-2.0
"""Detectors: heads on a feature pyramid, or object queries that look at the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.testing.case import Case, Inputs, Recipe


class _Pyramid(nn.Module):
    """Two levels; scores and boxes have very different ranges."""

    def __init__(self, recipe: Detector) -> None:
        super().__init__()
        width = recipe.channels
        self.recipe = recipe
        self.stem, self.down = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.side = nn.Conv2d(width, width, 1)
        self.score = nn.Conv2d(width, recipe.classes, 3, padding=1)
        self.box = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor] | Tensor:
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.down(fine))
        fine = self.side(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        scores, boxes = [], []
        for level, stride in ((fine, 2.0), (coarse, 4.0)):
            scores.append(self.score(level).flatten(2).transpose(1, 2).sigmoid())
            boxes.append(self.box(level).flatten(2).transpose(1, 2).exp() * stride)
        found, where = torch.cat(scores, 1), torch.cat(boxes, 1)
        if self.recipe.joined:  # as exported detectors often end: one tensor for both
            return torch.cat([where * 16.0, found], -1)
        return {"scores": found, "boxes": where}


class _Queries(nn.Module):
    """Learned queries, cross attention, two linear heads."""

    def __init__(self, recipe: Detector) -> None:
        super().__init__()
        width = 8
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.queries = nn.Parameter(torch.randn(5, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.score, self.box = nn.Linear(width, recipe.classes), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        queries = self.queries.expand(x.shape[0], -1, -1)
        found = queries + self.attention(queries, tokens, tokens, need_weights=False)[0]
        return {"scores": self.score(found), "boxes": self.box(found).sigmoid()}


@dataclass(frozen=True)
class Detector(Recipe):
    """A detector; input [B, 3, 16, 16].

    Attributes:
        style: "pyramid" (dense heads on two levels) or "queries".
        channels: of the pyramid.
        classes: number of them.
        joined: whether boxes and scores leave as one tensor (pyramid only).
    """

    style: str = "pyramid"
    channels: int = 4
    classes: int = 3
    joined: bool = False

    def build(self) -> nn.Module:  # noqa: D102
        return _Pyramid(self) if self.style == "pyramid" else _Queries(self)

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return (torch.randn(batch, 3, 16, 16),)


def detectors() -> st.SearchStrategy[Case]:
    """Cases with detectors."""
    recipes = st.builds(
        Detector,
        style=st.sampled_from(["pyramid", "queries"]),
        channels=st.sampled_from([4, 6]),
        classes=st.integers(2, 4),
        joined=st.booleans(),
    )
    return st.builds(Case, recipe=recipes, seed=st.integers(0, 99))
