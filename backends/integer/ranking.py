# SPDX-License-Identifier: Apache-2.0
"""Encoding to a table of levels without a search.

Nearest-level thresholds are multiples of one half, so how many lie below ``u`` depends on
``ceil(2 u)`` alone: a table over half steps gives the rank, exactly, in one gather.
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
    """Ranks of ``ceil(2 u)`` from `low` to `high`."""

    low: int
    high: int
    ranks: Tensor


def half_steps(encoding: LevelEncoding) -> HalfSteps | None:
    """The table, or None where thresholds are finer than halves, differ by channel, or are many."""
    if encoding.scale.numel() != 1 or encoding.thresholds.ndim != 1:
        return None
    doubled = encoding.thresholds.double() * 2
    whole = doubled.to(torch.int64)
    if not torch.equal(whole.double(), doubled):
        return None
    low, high = int(whole[0]), int(whole[-1]) + 1
    if high - low >= LARGEST_TABLE:
        return None
    steps = torch.arange(low, high + 1)
    ranks = torch.searchsorted(whole, steps)  # thresholds strictly below
    return HalfSteps(low, high, ranks.to(rank_dtype(encoding.levels.shape[-1])))
