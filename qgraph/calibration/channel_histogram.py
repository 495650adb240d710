# SPDX-License-Identifier: Apache-2.0
"""Per-channel histograms with linear bins whose width is a power of two and only ever doubles.

Bins of magnitude ``floor(|x| / w)`` nest when w doubles, so widening is exact and the result does
not depend on the order in which large values came.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from qgraph.calibration.histogram import Bins
from qgraph.calibration.statistics import Axes, Observation, Statistic, count_indices
from qgraph.errors import ConfigError

MIN_EXPONENT = -64


class ChannelHistogram(Statistic):
    """Histogram [C, 2 * half + 1] of each channel: negative bins, zero, positive bins.

    Args:
        axis: channel axis; several (head and channel) count as one, flattened in that order.
        half: bins on each side of zero, a power of two.
        positions: at most so many positions per sample (0: all).

    Attributes:
        counts: int64 [C, 2 * half + 1]; column ``half`` counts exact zeros, column
            ``half + 1 + m`` values with ``m <= x / w < m + 1``, mirrored for negative x.
        exponent: int32 [C]; the bins reach 2^exponent, their width is w = 2^exponent / half.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("axis", "half", "positions")
    FIELDS: ClassVar[tuple[str, ...]] = ("counts", "exponent")
    counts: Tensor | None
    exponent: Tensor | None

    def __init__(self, axis: Axes = -1, half: int = 128, positions: int = 16) -> None:
        if half < 2 or half & (half - 1):
            msg = f"half={half}; allowed: powers of two from 2"
            raise ConfigError(msg)
        self.axis = axis
        self.half = half
        self.positions = positions
        self.counts = self.exponent = None

    def observe(self, seen: Observation) -> None:  # noqa: D102
        values, keep = seen.vectors(self.axis, self.positions or 1 << 62)
        values = torch.nan_to_num(values.flatten(0, 1))
        if keep is not None:
            values = torch.where(keep.flatten()[:, None], values, 0.0)
        channels = values.shape[1]
        if values.numel() == 0:
            return
        peak = values.abs().amax(0)
        reach = torch.frexp(peak).exponent.clamp_(min=MIN_EXPONENT).to(torch.int32)
        reach = torch.where(peak > 0, reach, MIN_EXPONENT)
        if self.exponent is not None:  # bins nest: counting in the wide ones is widening for free
            reach = torch.maximum(reach, self.exponent)
        index = self._column(values, reach)
        columns = 2 * self.half + 1
        index += torch.arange(channels, device=values.device) * columns
        if keep is not None:
            index = torch.where(keep.flatten()[:, None], index, channels * columns)
        table = count_indices(index, channels * columns + 1)[:-1]
        self._add(table.view(channels, columns), reach)

    def _column(self, values: Tensor, reach: Tensor) -> Tensor:
        """Column of each value [N, C]; dividing by a power of two is exact."""
        unit = torch.ldexp(torch.ones_like(values[0]), (reach - (self.half.bit_length() - 1)))
        magnitude = (values.abs() / unit).floor_().clamp_(max=self.half - 1).long() + 1
        return magnitude * values.sign().long() + self.half

    def _widen(self, counts: Tensor, steps: Tensor) -> Tensor:
        """Counts with each channel's bins 2^steps times as wide."""
        if counts.device.type == "cpu" and not bool(steps.any()):
            return counts
        offset = torch.arange(-self.half, self.half + 1, device=counts.device)
        # a shift of 62 empties every magnitude into the first bin
        magnitude = (offset.abs() - 1).clamp(min=0) >> steps.long().clamp(max=62)[:, None]
        column = (magnitude + 1) * offset.sign() + self.half
        return torch.zeros_like(counts).scatter_add_(1, column, counts)

    def _add(self, counts: Tensor, reach: Tensor) -> None:
        if self.counts is None or self.exponent is None:
            self.counts, self.exponent = counts.contiguous(), reach
            return
        top = torch.maximum(self.exponent, reach)
        old, new = self._widen(self.counts, top - self.exponent), self._widen(counts, top - reach)
        self.counts, self.exponent = old + new, top

    def _combine(self, other: Self) -> None:
        fields = other.fields()
        self._add(fields["counts"], fields["exponent"])

    def _with(self, counts: Tensor, exponent: Tensor) -> ChannelHistogram:
        made = ChannelHistogram(self.axis, self.half, self.positions)
        made._load({"counts": counts, "exponent": exponent})
        return made

    def mirrored(self, channels: Tensor | None = None) -> ChannelHistogram:
        """The histograms when `channels` (bool [C]; None: all) change sign, exactly."""
        if self.counts is None or self.exponent is None:
            return ChannelHistogram(self.axis, self.half, self.positions)
        flipped = self.counts.flip(1)
        if channels is not None:
            flipped = torch.where(channels[:, None], flipped, self.counts)
        return self._with(flipped, self.exponent.clone())

    def permuted(self, order: Tensor) -> ChannelHistogram:
        """The histograms when channel i becomes what was channel ``order[i]``."""
        if self.counts is None or self.exponent is None:
            return ChannelHistogram(self.axis, self.half, self.positions)
        return self._with(self.counts[order], self.exponent[order])

    def bins(self, shift: Tensor | None = None) -> Bins:
        """The density of all channels together, channel c moved by ``shift[c]`` (fp64 [C])."""
        if self.counts is None or self.exponent is None:
            empty = torch.zeros(0, dtype=torch.float64)
            return Bins(empty, empty, empty, 0.0)
        counts = self.counts.cpu().double()
        width = self.exponent.cpu().double().exp2()[:, None] / self.half
        offset = torch.arange(-self.half, self.half + 1, dtype=torch.float64)
        left = torch.where(offset > 0, offset - 1, offset) * width
        right = torch.where(offset < 0, offset + 1, offset) * width
        moved = torch.zeros(counts.shape[0], 1, dtype=torch.float64)
        if shift is not None:
            moved = shift.detach().cpu().double()[:, None]
            right = torch.maximum(right, left + width * 2.0**-20)  # the zero bin, now off zero
        zeros = 0.0 if shift is not None else float(counts[:, self.half].sum())
        if shift is None:
            counts[:, self.half] = 0
        used = counts > 0
        left, right = (left + moved)[used], (right + moved)[used]
        order = left.argsort(stable=True)
        return Bins(left[order], right[order], counts[used][order], zeros)
