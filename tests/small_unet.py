# SPDX-License-Identifier: Apache-2.0
"""A small U-Net for tests of mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyUNet(nn.Module):
    """Two resolutions, a residual add, a concatenated skip, a bilinear upsampling."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.deep = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.deeper = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.merge = nn.Conv2d(3 * width, width, 3, padding=1)
        self.short = nn.Conv2d(3 * width, width, 1)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.first(x) + x)
        y = torch.relu(self.deep(nn.functional.max_pool2d(x, 2)))
        y = torch.relu(self.deeper(y))
        y = nn.functional.interpolate(y, scale_factor=2, mode="bilinear")
        z = torch.cat([y, x], 1)
        logits: Tensor = self.head(torch.relu(self.merge(z) + self.short(z)))
        return logits


def tiny_unet() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return TinyUNet().eval()


def images(batches: int = 3, size: int = 4) -> list[Tensor]:
    """Random batches [size, 1, 16, 16], the same each time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 1, 16, 16, generator=generator) for _ in range(batches)]
