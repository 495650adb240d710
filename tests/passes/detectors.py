# SPDX-License-Identifier: Apache-2.0
"""Small detectors with shared heads, for tests of what the `det` pipelines do."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

SIDE = 32


class Shared(nn.Module):
    """Two levels, one head per kind of output read at both: logits [B, N, 3], boxes [B, N, 4]."""

    def __init__(self, *, joined: bool = False) -> None:
        super().__init__()
        self.joined = joined
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.lateral = nn.Conv2d(8, 8, 1)
        self.class_tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.box_tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.classes = nn.Conv2d(8, 3, 1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Run on images [B, 3, SIDE, SIDE]."""
        fine = self.stem(image)
        coarse = self.down(fine)
        above = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        logits, boxes = [], []
        for x in (self.lateral(fine) + above, coarse):
            logits.append(self.classes(self.class_tower(x)).flatten(2).transpose(1, 2))
            boxes.append(self.boxes(self.box_tower(x)).flatten(2).transpose(1, 2))
        scores, values = torch.cat(logits, 1), torch.cat(boxes, 1)
        if not self.joined:
            return scores, values
        rows = torch.cat([values * 100, scores.sigmoid()], 2)
        return rows + rows.roll(1, 1)  # an addition that a careless plan quantizes


@cache
def detector(*, joined: bool = False) -> Shared:
    """The same weights each time."""
    torch.manual_seed(1)
    return Shared(joined=joined).eval().requires_grad_(False)


def images(count: int = 32, seed: int = 0) -> list[Tensor]:
    """Batches of 8."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, 3, SIDE, SIDE, generator=generator).split(8))


def decode(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and boxes around fixed places, divided by the image size."""
    logits, values = outputs
    count = values.shape[1]
    where = torch.linspace(0.2, 0.8, count)[:, None].expand(-1, 2)
    half = 0.15 * values[..., 2:].clamp(-2, 2).exp()
    centre = where + 0.2 * values[..., :2]
    return logits, torch.cat([centre - half, centre + half], -1)
