# SPDX-License-Identifier: Apache-2.0
"""Random small networks: stacks of blocks drawn by a seed, with random shapes and formats."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgraph.formats import Encoding
from qgraph.graph.plan import Role, Site
from tests.backends.builders import affine, per_channel
from tests.backends.site_formats import (
    dual_region,
    free_bytes,
    logarithmic,
    power_of_two,
    tied_bytes,
)

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.relu6, F.gelu, F.silu, torch.sigmoid, torch.tanh, F.hardswish, lambda x: x,
]  # fmt: skip


class ConvBlock(nn.Module):
    """A random convolution, an activation, sometimes a shortcut or a concatenation."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        groups = draw.choice([1, 1, 2, channels])
        dilation, self.join = draw.choice([1, 1, 2]), draw.choice(["none", "add", "mul", "cat"])
        self.conv = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, groups=groups,
            bias=draw.random() < 0.7,
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(channels) if draw.random() < 0.5 else nn.Identity()
        self.merge = nn.Conv2d(2 * channels, channels, 1) if self.join == "cat" else nn.Identity()
        self.act, self.pool = draw.choice(ACTIVATIONS), draw.random() < 0.3
        transposed = nn.ConvTranspose2d(channels, channels, draw.choice([2, 4]), 2, bias=False)
        self.up = transposed if self.pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        if self.pool:
            y = self.up(F.max_pool2d(y, 2))[:, :, : x.shape[2], : x.shape[3]]
        match self.join:
            case "add":
                return y + x
            case "mul":
                return y * x
            case "cat":
                return self.merge(torch.cat([x, y], 1))
        return y


class TokenBlock(nn.Module):
    """Norm, a linear or attention, an activation, a shortcut."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width, bias=draw.random() < 0.8)
        self.second = nn.Linear(2 * width, width)
        self.act, self.attend = draw.choice(ACTIVATIONS), draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(self.norm(x))))
        if self.attend:
            y = (y @ x.transpose(-1, -2) * 0.2).softmax(-1) @ y
        return x + y


class RandomNet(nn.Module):
    """Convolution blocks, then token blocks over the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        channels = draw.choice([4, 6, 8])
        self.stem = nn.Conv2d(3, channels, 3, stride=draw.choice([1, 2]), padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(draw, channels) for _ in range(draw.randint(1, 3))))
        self.tokens = nn.Sequential(
            *(TokenBlock(draw, channels) for _ in range(draw.randint(0, 2)))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.blocks(self.stem(x))
        return y, self.tokens(y.flatten(2).transpose(1, 2))


def random_case(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network and a batch of two images."""
    torch.manual_seed(seed)
    model = RandomNet(seed).eval()
    return model, (torch.randn(2, 3, 8, 8),)


def random_formats(seed: int) -> Callable[[Site, Tensor], Encoding]:
    """Widths of 2 to 8 bits, sometimes 16, signed or not, ranges that often saturate."""
    draw = random.Random(seed)

    def choose(site: Site, values: Tensor) -> Encoding:
        bits = draw.choice([2, 3, 4, 6, 8, 8, 8])
        if site.role is Role.WEIGHT:
            if site.axis is None:
                return affine(values, bits, signed=True)
            return per_channel(values, site.axis, bits)
        bits = 16 if draw.random() < 0.1 else bits
        return affine(values, bits, signed=draw.random() < 0.5, shrink=draw.choice([1.0, 0.6]))

    return choose


def mixed_formats(seed: int) -> Callable[[Site, Tensor], Encoding]:
    """The same, and a third of the activations by tables, or with a scale per channel."""
    plain, draw = random_formats(seed), random.Random(seed + 1)
    special = [dual_region, power_of_two, logarithmic, tied_bytes, free_bytes]

    def choose(site: Site, values: Tensor) -> Encoding:
        if site.role is Role.ACTIVATION and draw.random() < 1 / 3:
            return draw.choice(special)(site, values)
        return plain(site, values)

    return choose
