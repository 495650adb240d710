# SPDX-License-Identifier: Apache-2.0
"""Two segmentation networks for tiny targets: a residual U-Net and a densely nested U-Net.

Both take [B, 1, H, W] with H and W multiples of 16 and return logits [B, 1, H, W]; both have four
resolution levels and a bottleneck, so their encoder-decoder symmetry is the textbook one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a (1x1 where the width changes) shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _stem(width: int) -> nn.Sequential:
    convolution = nn.Conv2d(1, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class ResUNet(nn.Module):
    """Residual U-Net: max pooling down, bilinear upsampling and concatenated skips up."""

    def __init__(self, widths: Sequence[int] = (16, 24, 40, 64, 96)) -> None:
        super().__init__()
        self.stem = _stem(widths[0])
        inputs = (widths[0], *widths[:-1])
        self.encoder = nn.ModuleList(
            ResidualBlock(a, b) for a, b in zip(inputs, widths, strict=True)
        )
        self.decoder = nn.ModuleList(
            ResidualBlock(low + high, high)
            for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map [B, 1, H, W] to logits [B, 1, H, W]."""
        x = self.stem(image)
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = block(torch.cat([self.up(x), skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


class NestedUNet(nn.Module):
    """Densely nested U-Net: node (i, j) sees all earlier nodes of its level and its neighbours.

    Follows the idea of Li et al., "Dense Nested Attention Network for Infrared Small Target
    Detection", IEEE TIP 2023, without attention: node (i, j), j >= 1, reads (i, 0..j-1), the
    upsampled (i+1, j-1) and the pooled (i-1, j). The last nodes of all levels are lifted by a 1x1
    convolution to the input resolution and fused.
    """

    def __init__(self, widths: Sequence[int] = (8, 12, 24, 48, 80)) -> None:
        super().__init__()
        self.depth = len(widths)
        self.stem = _stem(widths[0])
        self.nodes = nn.ModuleDict()
        for j in range(self.depth):
            for i in range(self.depth - j):
                self.nodes[f"{i}_{j}"] = ResidualBlock(self._inputs(widths, i, j), widths[i])
        self.lifts = nn.ModuleList(nn.Conv2d(w, widths[0], 1) for w in widths[1:])
        self.fuse = ResidualBlock(self.depth * widths[0], widths[0])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.spread = nn.ModuleList(
            nn.Upsample(scale_factor=2 ** (i + 1), mode="nearest") for i in range(self.depth - 1)
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    @staticmethod
    def _inputs(widths: Sequence[int], i: int, j: int) -> int:
        if j == 0:
            return widths[max(i - 1, 0)]
        return j * widths[i] + widths[i + 1] + (widths[i - 1] if i else 0)

    def forward(self, image: Tensor) -> Tensor:
        """Map [B, 1, H, W] to logits [B, 1, H, W]."""
        value: dict[tuple[int, int], Tensor] = {}
        x = self.stem(image)
        for j in range(self.depth):
            for i in range(self.depth - j):
                if j == 0:
                    x = self.nodes[f"{i}_0"](x if i == 0 else self.pool(x))
                    value[i, 0] = x
                    continue
                parts = [value[i, k] for k in range(j)] + [self.up(value[i + 1, j - 1])]
                if i:
                    parts.append(self.pool(value[i - 1, j]))
                value[i, j] = self.nodes[f"{i}_{j}"](torch.cat(parts, dim=1))
        last = [value[i, self.depth - 1 - i] for i in range(self.depth)]
        lifted = [
            up(lift(v)) for up, lift, v in zip(self.spread, self.lifts, last[1:], strict=True)
        ]
        logits: Tensor = self.head(self.fuse(torch.cat([last[0], *lifted], dim=1)))
        return logits
