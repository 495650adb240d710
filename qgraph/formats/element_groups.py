# SPDX-License-Identifier: Apache-2.0
"""Element-wise grouping as PTQ4RIS publishes it: elements, not channels, share scales by magnitude.

Group k holds the elements with ``T_(k-1) < |x| <= T_k`` and quantizes them with all b bits on the
grid of its own range; ``T_k = mean + 3 std`` of the magnitudes left. Every element then also needs
its group's number: those bits are counted. The last group is open-ended (the published code puts
what exceeds it into the first group and destroys it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.base import check_bits
from qgraph.formats.levels import LevelEncoding

ROUNDS = 10
FINENESS = 16  # the finest step in units of the common scale; others are rounded to a multiple


def magnitude_thresholds(magnitude: Tensor, count: Tensor, *, rounds: int = ROUNDS) -> Tensor:
    """Ascending thresholds fp64 of the recursion, from a histogram of |x| without zeros.

    Args:
        magnitude: bin centres, ascending, fp64 [K]; count: how many elements, [K].
        rounds: at most so many groups.
    """
    count = count.double()
    n, total, squares = (
        (count * magnitude**power).flip(0).cumsum(0).flip(0) for power in (0, 1, 2)
    )
    found: list[float] = []
    at = 0
    while len(found) < rounds - 1 and at < len(magnitude) and float(n[at]) > 1:
        mean = float(total[at] / n[at])
        variance = max(0.0, float(squares[at] / n[at]) - mean**2) * float(n[at] / (n[at] - 1))
        threshold = mean + 3 * math.sqrt(variance)
        following = int(torch.searchsorted(magnitude, threshold, right=True))
        if following >= len(magnitude) or following <= at:
            break
        found.append(threshold)
        at = following
    return torch.tensor(found, dtype=torch.float64)


def element_groups(thresholds: Tensor, low: float, high: float, bits: int) -> LevelEncoding:
    """The table of levels of all groups together.

    Args:
        thresholds: ascending magnitudes fp64 [G-1] between groups; none gives a plain affine table.
        low, high: range of the values.
        bits: of a code inside its group; the encoding stores ``bits + ceil(log2 G)``.

    Raises:
        ConfigError: low or high is not finite, or both are 0.
    """
    if not math.isfinite(low) or not math.isfinite(high) or low == high == 0:
        msg = f"range [{low}, {high}]; allowed: finite, not both ends 0"
        raise ConfigError(msg)
    top = (1 << check_bits(bits)) - 1
    edges = [0.0, *thresholds.tolist(), math.inf]
    ends = [(max(low, -t), min(high, t)) for t in edges[1:]]
    steps = [(b - a) / top for a, b in ends]
    unit = steps[0] / FINENESS
    levels, groups = [torch.zeros(1, dtype=torch.int64)], [torch.zeros(1, dtype=torch.int64)]
    for number, (step, (a, _)) in enumerate(zip(steps, ends, strict=True)):
        zero = round(-a / step)
        grid = (torch.arange(top + 1) - zero) * round(step / unit)
        size = grid.abs() * unit
        inside = (size > edges[number]) & ((size <= edges[number + 1]) | (number == 0))
        levels.append(grid[inside])
        groups.append(torch.full_like(grid[inside], number))
    values, index = torch.cat(levels).unique(return_inverse=True)
    group = torch.zeros_like(values).scatter_(0, index, torch.cat(groups))
    extra = math.ceil(math.log2(len(steps)))
    return LevelEncoding(
        name=f"{len(steps)} element groups", scale=torch.tensor(unit), levels=values.int(),
        thresholds=_cuts(values, group, thresholds / unit), storage_bits=bits + extra,
    )  # fmt: skip


def _cuts(levels: Tensor, group: Tensor, thresholds: Tensor) -> Tensor:
    """Midway inside a group, at the group's threshold between two groups."""
    first, second = levels[:-1].double(), levels[1:].double()
    cuts = (first + second) / 2
    lower = torch.minimum(group[:-1], group[1:])
    sign = torch.where(second > 0, 1.0, -1.0)
    between = group[:-1] != group[1:]
    if len(thresholds):
        at = thresholds[lower.clamp(max=len(thresholds) - 1)] * sign
        valid = (at >= first) & (at.float().double() < second)
        cuts = torch.where(between & valid, at, cuts)
    return cuts.float()
