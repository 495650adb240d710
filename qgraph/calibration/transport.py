# SPDX-License-Identifier: Apache-2.0
"""Statistics of a rewritten value from those of the value: no second sweep.

Exact for all but sampled rows, which stay rows of the rewritten value (a fresh sweep might have
sampled others).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qgraph.calibration.extrema import ChannelRange, Range
from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.histogram import Histogram
from qgraph.calibration.moments import Gram, Moments
from qgraph.calibration.reservoir import Reservoir
from qgraph.calibration.statistics import Statistic


def permuted_statistics(seen: FusedStatistics, order: Tensor, axis: int = -1) -> FusedStatistics:
    """Statistics of ``x.index_select(axis, order)``; those along another axis are dropped."""
    moved = [_permuted(each, order, axis) for each in seen.statistics]
    return FusedStatistics([each for each in moved if each is not None], check=seen.check)


def scaled_statistics(seen: FusedStatistics, factor: Tensor) -> FusedStatistics:
    """Statistics of ``x * factor`` for positive factors [C] of the last axis.

    Keeps ranges, per-channel ranges and sampled rows; a histogram of the whole tensor cannot be
    rescaled channel by channel and is dropped.
    """
    kept: list[Statistic] = []
    for each in seen.statistics:
        if isinstance(each, ChannelRange) and each.axis == -1:
            scaled = _mapped(each, {"low", "high"}, lambda v: v * factor)
            kept.append(scaled)
            if isinstance(scaled, ChannelRange):
                kept.append(scaled.tensor_range())
        elif isinstance(each, Reservoir) and each.axis == -1:
            kept.append(_mapped(each, {"payload0"}, lambda v: v * factor))
    return FusedStatistics(kept, check=seen.check)


def _permuted(each: Statistic, order: Tensor, axis: int) -> Statistic | None:
    if isinstance(each, (Range, Histogram)):
        return each
    if getattr(each, "axis", None) != axis:
        return None
    if isinstance(each, Reservoir):
        return _mapped(each, {"payload0"}, lambda v: v[..., order])
    if isinstance(each, ChannelRange):
        return each.permuted(order)
    if isinstance(each, Gram):
        return _mapped(each, {"matrix"}, lambda v: v[order][:, order])
    if isinstance(each, Moments):
        return _mapped(each, {"total", "squares"}, lambda v: v[order])
    return None


def _mapped(each: Statistic, names: set[str], change: Callable[[Tensor], Tensor]) -> Statistic:
    """A copy with some of its fields changed."""
    state = each.state()
    return type(each).from_state({k: change(v) if k in names else v for k, v in state.items()})
