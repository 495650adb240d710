# SPDX-License-Identifier: Apache-2.0
"""Convolutional networks: all strides, groups, dilations, norms, activations and joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.testing.case import Case, Inputs, Recipe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardswish": F.hardswish,
}  # fmt: skip
JOINS = ("none", "add", "mul", "cat")


@dataclass(frozen=True)
class ConvBlock:
    """One convolution and what surrounds it."""

    kernel: int = 3
    groups: int = 1
    dilation: int = 1
    stride: int = 1
    bias: bool = True
    norm: bool = False
    activation: str = "relu"
    join: str = "none"


class _Block(nn.Module):
    def __init__(self, block: ConvBlock, channels: int) -> None:
        super().__init__()
        padding = block.dilation * (block.kernel // 2)
        self.conv = nn.Conv2d(
            channels, channels, block.kernel, block.stride, padding, block.dilation,
            channels if block.groups < 0 else block.groups, block.bias,
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(channels) if block.norm else nn.Identity()
        up = nn.ConvTranspose2d(channels, channels, 2, 2) if block.stride == 2 else nn.Identity()
        self.up, self.join = up, block.join
        self.merge = nn.Conv2d(2 * channels, channels, 1) if self.join == "cat" else nn.Identity()
        self.act = ACTIVATIONS[block.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.act(self.norm(self.conv(x))))
        match self.join:
            case "add":
                return y + x
            case "mul":
                return y * x
            case "cat":
                merged: Tensor = self.merge(torch.cat([x, y], 1))
                return merged
        return y


@dataclass(frozen=True)
class ConvNet(Recipe):
    """A stem and blocks; input [B, 3, size, size]."""

    channels: int = 4
    blocks: tuple[ConvBlock, ...] = (ConvBlock(),)
    size: int = 8

    def build(self) -> nn.Module:  # noqa: D102
        stem = nn.Conv2d(3, self.channels, 3, padding=1)
        return nn.Sequential(stem, *(_Block(block, self.channels) for block in self.blocks))

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return (torch.randn(batch, 3, self.size, self.size),)


def conv_blocks() -> st.SearchStrategy[ConvBlock]:
    """Blocks; groups of -1 mean depthwise."""
    return st.builds(
        ConvBlock,
        kernel=st.sampled_from([1, 3]),
        groups=st.sampled_from([1, 2, -1]),
        dilation=st.sampled_from([1, 2]),
        stride=st.sampled_from([1, 2]),
        bias=st.booleans(),
        norm=st.booleans(),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        join=st.sampled_from(JOINS),
    )


def conv_models(max_blocks: int = 3) -> st.SearchStrategy[Case]:
    """Cases with convolutional networks."""
    blocks = st.lists(conv_blocks(), min_size=1, max_size=max_blocks).map(tuple)
    nets = st.builds(ConvNet, channels=st.sampled_from([4, 6]), blocks=blocks)
    return st.builds(Case, recipe=nets, seed=st.integers(0, 99))
