# SPDX-License-Identifier: Apache-2.0
"""Encoding to a table of levels without a search.

Cut the line into half steps ``(k - 1) / 2 < u <= k / 2``. Levels are integers with one decision
threshold between neighbours, so a cell holds at most one: the rank is the number of thresholds in
cells below, plus one comparison. Nearest-level thresholds lie on cell ends and need none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.formats import LevelEncoding
from qgraph.formats.levels import rank_dtype

LARGEST_TABLE = 2**18


@dataclass(frozen=True, slots=True, eq=False)
class HalfSteps:
    """Tables over ``ceil(2 u)`` from `low` to `high`.

    Attributes:
        ranks: thresholds in cells below.
        cuts: fp32, the threshold inside the cell, inf without one; None if no cell has one
            short of its end.
    """

    low: int
    high: int
    ranks: Tensor
    cuts: Tensor | None


def half_steps(encoding: LevelEncoding) -> HalfSteps | None:
    """The tables, or None where thresholds differ by channel, crowd in a cell, or reach far."""
    if encoding.scale.numel() != 1 or encoding.thresholds.ndim != 1:
        return None
    cells = torch.ceil(encoding.thresholds.double() * 2).to(torch.int64)
    low, high = int(cells[0]) - 1, int(cells[-1]) + 1
    if high - low >= LARGEST_TABLE or not bool((cells.diff() > 0).all()):
        return None
    ranks = torch.searchsorted(cells, torch.arange(low, high + 1))
    cuts = torch.full((high - low + 1,), float("inf"))
    cuts[cells - low] = encoding.thresholds
    on_ends = torch.equal(cells.double() / 2, encoding.thresholds.double())
    dtype = rank_dtype(encoding.levels.shape[-1])
    return HalfSteps(low, high, ranks.to(dtype), None if on_ends else cuts)
