# SPDX-License-Identifier: Apache-2.0
"""Ranges of a value: over the whole tensor, and per channel. Exact, whatever the batching."""

from __future__ import annotations

from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from qgraph.calibration.statistics import Axes, Observation, Statistic


class _Extremes(Statistic):
    """Shared part: fields, their merge, and adding the extrema of one tensor."""

    FIELDS: ClassVar[tuple[str, ...]] = ("low", "high", "count", "nonfinite")
    low: Tensor | None
    high: Tensor | None
    count: Tensor | None
    nonfinite: Tensor | None

    def __init__(self) -> None:
        self.low = self.high = self.count = self.nonfinite = None

    def _add(self, low: Tensor, high: Tensor, seen: int | Tensor, nonfinite: int | Tensor) -> None:
        if self.low is None or self.high is None:
            zero = torch.zeros((), dtype=torch.int64, device=low.device)
            self.low, self.high = low, high
            self.count, self.nonfinite = zero + seen, zero + nonfinite
            return
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)
        if self.count is not None:
            self.count = self.count + seen
        if self.nonfinite is not None and not (isinstance(nonfinite, int) and not nonfinite):
            self.nonfinite = self.nonfinite + nonfinite

    def _combine(self, other: Self) -> None:
        fields = other.fields()
        self._add(*(fields[name] for name in self.FIELDS))


R = TypeVar("R", bound=_Extremes)


class Range(_Extremes):
    """Smallest and largest finite value of a tensor.

    Attributes:
        low, high: fp32 [], over finite values (inf, -inf when there are none).
        count: int64 [], values seen; nonfinite: int64 [], how many were NaN or infinite.
        All None before the first update.
    """

    def observe(self, seen: Observation) -> None:  # noqa: D102
        seen.put_off(self._add, *seen.extrema())

    def mirrored(self) -> Range:
        """The range of ``-x``."""
        return _mirror(self, Range())

    def bounds(self) -> tuple[float, float]:
        """(low, high) as floats; (0, 0) when nothing finite was seen."""
        if self.low is None or self.high is None:
            return 0.0, 0.0
        low, high = float(self.low), float(self.high)
        return (low, high) if low <= high else (0.0, 0.0)


class ChannelRange(_Extremes):
    """Smallest and largest finite value per channel.

    Args:
        axis: channel axis: -1 for inputs of linear layers, 1 for those of convolutions; several
            (head and channel) count as one, flattened in that order.

    Attributes:
        low, high: fp32 [C]; count, nonfinite: int64 [], over all channels.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("axis",)

    def __init__(self, axis: Axes = -1) -> None:
        super().__init__()
        self.axis = axis

    def observe(self, seen: Observation) -> None:  # noqa: D102
        seen.put_off(self._add, *seen.channel_extrema(self.axis))

    def mirrored(self, channels: Tensor | None = None) -> ChannelRange:
        """The ranges when `channels` (bool [C]; None: all) change sign."""
        return _mirror(self, ChannelRange(self.axis), channels)

    def permuted(self, order: Tensor) -> ChannelRange:
        """The ranges when channel i becomes what was channel ``order[i]``."""
        moved = ChannelRange(self.axis)
        if self.low is not None and self.high is not None:
            moved._load(self.fields() | {"low": self.low[order], "high": self.high[order]})
        return moved

    def tensor_range(self) -> Range:
        """The range over all channels."""
        whole = Range()
        if self.low is not None and self.high is not None:
            whole._load(self.fields() | {"low": self.low.amin(), "high": self.high.amax()})
        return whole


def _mirror(source: R, target: R, channels: Tensor | None = None) -> R:
    if source.low is not None and source.high is not None:
        flip = torch.ones_like(source.low, dtype=torch.bool) if channels is None else channels
        low = torch.where(flip, -source.high, source.low)
        high = torch.where(flip, -source.low, source.high)
        target._load(source.fields() | {"low": low, "high": high})
    return target
