# SPDX-License-Identifier: Apache-2.0
"""Grouped affine formats: channels of similar range share a scale, outliers keep all their bits.

One scale per tensor spends nearly all codes on a few wide channels. Grouping by range gives each
group a scale of its own; tied by powers of two (``s_g = s_0 2^k``) the products of all groups
add up in one accumulator after a shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.affine import AffineEncoding, IntGrid

MAX_GROUPS = 16
SMALLEST_WIDTH = 2.0**-40


def outlier_thresholds(ranges: Tensor, groups: int) -> Tensor:
    """Ascending thresholds fp64 [G - 1]: ``mean + 3 std`` over the ranges left above the last.

    The recursion of PTQ4RIS on channel ranges [C] instead of elements; it ends when no range is
    above, or at `groups` groups (the topmost is open-ended). A single group has no thresholds.

    Raises:
        ConfigError: fewer than 1 or more than 16 groups, or ranges that are negative or no numbers.
    """
    left = _checked(ranges, groups)
    found: list[Tensor] = []
    while len(found) < groups - 1:
        threshold = left.mean() + 3 * left.std(correction=0)
        if not bool(threshold < left.max() * (1 - 1e-12)):
            break
        found.append(threshold)
        left = left[left > threshold]
    return torch.stack(found) if found else ranges.new_zeros(0, dtype=torch.float64)


def octave_thresholds(ranges: Tensor, groups: int) -> Tensor:
    """Ascending thresholds fp64: the largest range halved up to ``groups - 1`` times.

    The best groups for scales tied by powers of two: every channel's scale is at most twice what
    it needs, until the last group takes the rest.
    """
    top = _checked(ranges, groups).max()
    halved = top * torch.exp2(-torch.arange(groups - 1, 0, -1, dtype=torch.float64))
    return halved[halved > 0]


def _checked(ranges: Tensor, groups: int) -> Tensor:
    values = ranges.detach().double().cpu()
    if not 1 <= groups <= MAX_GROUPS:
        msg = f"groups is {groups}; allowed: 1 to {MAX_GROUPS}"
        raise ConfigError(msg)
    if not values.numel() or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        msg = f"channel ranges [{values.numel()}] must be finite and not negative"
        raise ConfigError(msg)
    return values


def group_channels(ranges: Tensor, thresholds: Tensor, *, tile: int = 1) -> Tensor:
    """Group of each channel, int64 [C]: 0 for the smallest ranges, without empty groups.

    With `tile`, sizes of all groups but the first become multiples of it by pulling in the widest
    channels of the group below: a channel may get a scale wider than it needs, never a narrower.
    """
    values = ranges.detach().double().cpu()
    group = torch.bucketize(values, thresholds)
    if tile > 1:
        group = _padded(values, group, tile)
    compact: Tensor = torch.unique(group, return_inverse=True)[1]
    return compact


def _padded(ranges: Tensor, group: Tensor, tile: int) -> Tensor:
    order = ranges.argsort(stable=True)  # also sorts the groups, which ascend with the range
    ranked, end = group[order], len(order)
    for number in range(int(group.max()), 0, -1):
        start = min(int((ranked < number).sum()), end)
        size = -(-(end - start) // tile) * tile
        start = max(0, end - size)
        ranked[start:end] = number
        end = start
    padded = torch.empty_like(group)
    padded[order] = ranked
    return padded


def group_order(group: Tensor) -> Tensor:
    """The permutation int64 [C] that makes groups contiguous: stable by (group, channel)."""
    return group.argsort(stable=True)


def grouped_encoding(
    low: Tensor, high: Tensor, group: Tensor, bits: int, *,
    tied: bool = True, zero_points: bool = True, clip: float = 1.0, axis: int = -1,
) -> AffineEncoding:  # fmt: skip
    """The affine encoding with one scale per group of channels.

    Args:
        low, high: channel ranges [C].
        group: group of each channel [C].
        bits: of a code.
        tied: scales are power-of-two multiples of the smallest, rounded up; else free.
        zero_points: each channel gets its own zero point that centres its range among the codes
            (a precomputed correction of the product); else signed codes with zero point 0.
        clip: factor on all ranges.
        axis: channel axis of the values.
    """
    low, high = low.double().clamp(max=0.0) * clip, high.double().clamp(min=0.0) * clip
    grid = IntGrid(bits, signed=not zero_points)
    width = high - low if zero_points else 2 * torch.maximum(high, -low)
    steps = grid.qmax if zero_points else 2 * grid.qmax
    widest = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    widest = widest.scatter_reduce(0, group, width, "amax").clamp(min=SMALLEST_WIDTH)
    top = float((widest.max() / steps).float())
    scales = widest / steps
    if tied:
        scales = top * torch.exp2(-(top / scales * (1 - 2.0**-20)).log2().floor().clamp(min=0.0))
    scale = scales.float()[group]
    zero = torch.zeros_like(group, dtype=torch.int32)
    if zero_points:
        centre = (grid.qmax - (high + low) / scale.double()) / 2
        zero = centre.round().clamp(grid.qmin, grid.qmax).to(torch.int32)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax, axis=axis)


def permuted(encoding: AffineEncoding, order: Tensor) -> AffineEncoding:
    """The encoding of a value whose channels are taken in this order."""
    return AffineEncoding(
        scale=encoding.scale[order], zero_point=encoding.zero_point[order], qmin=encoding.qmin,
        qmax=encoding.qmax, axis=encoding.axis,
    )  # fmt: skip
