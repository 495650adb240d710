# SPDX-License-Identifier: Apache-2.0
"""Two one-stage detectors: residual backbone, feature pyramid, heads shared over the levels.

RetinaNet-like (Lin et al. 2017): anchors of three sizes, class logits and box deltas. FCOS-like
(Tian et al. 2019): no anchors, distances to the four sides, a quality logit from the box branch.
Both return raw outputs over all levels; decoding and suppression are in `boxes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.convolutions import ConvUnit
from examples.zoo.objects import KINDS

STRIDES = (8, 16, 32)
ANCHORS = 3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Widths of stem and stages, channels of the pyramid and heads, convolutions per branch."""

    stem: int = 16
    stages: tuple[int, ...] = (24, 48, 96, 160)
    pyramid: int = 64
    tower: int = 2
    classes: int = len(KINDS)


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm; a 1x1 shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvUnit(inputs, outputs, stride=stride)
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class Backbone(nn.Module):
    """A stem and stages of two residual blocks that each halve the map."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.stem = ConvUnit(3, layout.stem, stride=2)
        inputs = (layout.stem, *layout.stages[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(Residual(a, b, stride=2), Residual(b, b))
            for a, b in zip(inputs, layout.stages, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the maps of the last three stages, fine first."""
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


class Pyramid(nn.Module):
    """Feature pyramid: 1x1 laterals, nearest upsampling and addition, 3x3 outputs."""

    def __init__(self, inputs: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(i, width, 1) for i in inputs)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in inputs)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return one map [B, width, H / stride, W / stride] per level, fine first."""
        sides = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in range(len(sides) - 2, -1, -1):
            above = F.interpolate(sides[level + 1], scale_factor=2.0, mode="nearest")
            sides[level] = sides[level] + above
        return [output(x) for output, x in zip(self.outputs, sides, strict=True)]


def _tower(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _prior(convolution: nn.Conv2d) -> nn.Conv2d:
    """Start class logits at a probability of 1 %, as RetinaNet section 4.1 does."""
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.constant_(convolution.bias, -4.6)
    return convolution


def rows(x: Tensor, width: int) -> Tensor:
    """Turn a map [B, A * width, H, W] into rows [B, H * W * A, width]."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)


class Detector(nn.Module):
    """What both detectors share; subclasses say what the last layers are and how levels join."""

    anchors = 1

    def __init__(self, layout: Layout | None = None) -> None:
        super().__init__()
        self.layout = layout = layout or Layout()
        width = layout.pyramid
        self.backbone = Backbone(layout)
        self.neck = Pyramid(layout.stages[-3:], width)
        self.class_tower = _tower(width, layout.tower)
        self.box_tower = _tower(width, layout.tower)
        self.class_logits = _prior(nn.Conv2d(width, self.anchors * layout.classes, 3, padding=1))
        self.box_values = nn.Conv2d(width, self.anchors * 4, 3, padding=1)
        nn.init.normal_(self.box_values.weight, std=0.01)

    def levels(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the pyramid's maps."""
        maps: list[Tensor] = self.neck(self.backbone(pixel_values))
        return maps


class RetinaNet(Detector):
    """Anchor-based: (class logits [B, N, classes], box deltas [B, N, 4])."""

    anchors = ANCHORS

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Run on images fp32 [B, 3, H, W], sides multiples of 32."""
        logits, deltas = [], []
        for x in self.levels(pixel_values):
            logits.append(rows(self.class_logits(self.class_tower(x)), self.layout.classes))
            deltas.append(rows(self.box_values(self.box_tower(x)), 4))
        return torch.cat(logits, 1), torch.cat(deltas, 1)


class FCOS(Detector):
    """Anchor-free: (class logits [B, N, classes], side distances in strides [B, N, 4],
    quality logits [B, N, 1])."""

    def __init__(self, layout: Layout | None = None) -> None:
        super().__init__(layout)
        self.quality = nn.Conv2d(self.layout.pyramid, 1, 3, padding=1)
        nn.init.constant_(self.box_values.bias, 1.0)  # type: ignore[arg-type]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run on images fp32 [B, 3, H, W], sides multiples of 32."""
        logits, distances, quality = [], [], []
        for x in self.levels(pixel_values):
            logits.append(rows(self.class_logits(self.class_tower(x)), self.layout.classes))
            boxes = self.box_tower(x)
            distances.append(rows(self.box_values(boxes), 4))
            quality.append(rows(self.quality(boxes), 1))
        return torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(quality, 1)
