# SPDX-License-Identifier: Apache-2.0
"""The convolution unit that stems and decoders of the zoo are made of."""

from __future__ import annotations

from torch import nn


class ConvUnit(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
