# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder segmentation networks with skips."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.testing.case import Case, Inputs, Recipe


def _double(inside: int, outside: int, *, norm: bool) -> nn.Sequential:
    steps: list[nn.Module] = [nn.Conv2d(inside, outside, 3, padding=1)]
    steps += [nn.BatchNorm2d(outside)] if norm else []
    return nn.Sequential(*steps, nn.ReLU())


class _UNet(nn.Module):
    def __init__(self, recipe: UNet) -> None:
        super().__init__()
        widths = [recipe.channels << level for level in range(recipe.depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.recipe = recipe
        self.stem = _double(3, widths[0], norm=recipe.norm)
        self.down = nn.ModuleList(_double(a, b, norm=recipe.norm) for a, b in pairs)
        transposed = recipe.up == "transposed"
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, 2) if transposed else nn.Conv2d(b, a, 1) for a, b in pairs
        )
        twice = 2 if recipe.skip == "cat" else 1
        self.fuse = nn.ModuleList(_double(twice * a, a, norm=recipe.norm) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], recipe.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for up, fuse in zip(reversed(self.up), reversed(self.fuse), strict=True):
            y = up(y)
            if self.recipe.up != "transposed":
                smooth = {"align_corners": False} if self.recipe.up == "bilinear" else {}
                y = F.interpolate(y, scale_factor=2.0, mode=self.recipe.up, **smooth)
            skip = skips.pop()
            y = fuse(torch.cat([skip, y], 1) if self.recipe.skip == "cat" else skip + y)
        mask: Tensor = self.head(y)
        return mask


@dataclass(frozen=True)
class UNet(Recipe):
    """A U-Net; input [B, 3, 16, 16], output mask logits [B, classes, 16, 16].

    Attributes:
        channels: of the first level; they double on each.
        depth: levels below the first.
        up: "transposed", "nearest" or "bilinear".
        skip: "cat" or "add".
        norm: whether batch norms follow the convolutions.
        classes: channels of the output.
    """

    channels: int = 4
    depth: int = 1
    up: str = "transposed"
    skip: str = "cat"
    norm: bool = False
    classes: int = 1

    def build(self) -> nn.Module:  # noqa: D102
        return _UNet(self)

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return (torch.randn(batch, 3, 16, 16),)


def unets() -> st.SearchStrategy[Case]:
    """Cases with U-Nets."""
    recipes = st.builds(
        UNet,
        channels=st.sampled_from([4, 6]),
        depth=st.integers(1, 2),
        up=st.sampled_from(["transposed", "nearest", "bilinear"]),
        skip=st.sampled_from(["cat", "add"]),
        norm=st.booleans(),
        classes=st.integers(1, 3),
    )
    return st.builds(Case, recipe=recipes, seed=st.integers(0, 99))
