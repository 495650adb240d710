# SPDX-License-Identifier: Apache-2.0
"""Expected error of formats given by level tables, in closed form over a histogram.

Inside a bin the density is taken as uniform, so between two decision thresholds the squared error
integrates to a difference of cubes. All candidate tables cost one vectorised pass over the bins,
whatever the number of values behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qgraph.calibration.histogram import Bins
from qgraph.errors import ConfigError
from qgraph.formats.levels import LevelEncoding

CELLS = 1 << 19  # candidates x (bins + levels) that are held at once


def table_error(bins: Bins, candidates: Sequence[LevelEncoding]) -> Tensor:
    """Sum of squared errors, fp64 [K], of K level tables over a density.

    Raises:
        ConfigError: a candidate has more than one scale or table.
    """
    for each in candidates:
        if each.scale.ndim or each.levels.ndim != 1:
            msg = f"{each.describe()}: one histogram scores per-tensor tables only"
            raise ConfigError(msg)
    if not candidates:
        return torch.zeros(0, dtype=torch.float64)
    levels = [each.levels.double() * each.scale.double().cpu() for each in candidates]
    cuts = [each.thresholds.double() * each.scale.double().cpu() for each in candidates]
    size = max(1, CELLS // (bins.mass.numel() + max(len(row) for row in levels)))
    parts = range(0, len(levels), size)
    return torch.cat([
        _errors(bins, _padded(levels[p : p + size]), _padded(cuts[p : p + size])) for p in parts
    ])  # fmt: skip


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows of unequal length as [K, longest]; unused places hold inf and are never ranks."""
    return pad_sequence(rows, batch_first=True, padding_value=torch.inf)


def _errors(bins: Bins, levels: Tensor, cuts: Tensor) -> Tensor:
    """fp64 [K] for tables [K, L] and thresholds [K, L-1], both in units of the values."""
    whole = _between(levels[:, 1:-1], cuts[:, :-1], cuts[:, 1:])
    before = torch.cat(
        [torch.zeros_like(levels[:, :1]), whole.nan_to_num(0.0, 0.0, 0.0).cumsum(1)], 1
    )
    shape = (levels.shape[0], bins.mass.numel())
    left, right = (x.expand(shape).contiguous() for x in (bins.left, bins.right))
    first, last = torch.searchsorted(cuts, left), torch.searchsorted(cuts, right)
    start, stop = levels.gather(1, first), levels.gather(1, last)
    top = cuts.gather(1, first.clamp(max=cuts.shape[1] - 1))
    bottom = cuts.gather(1, (last - 1).clamp(min=0))
    # intervals strictly between the two ends: ranks first + 1 ... last - 1
    inner = before.gather(1, (last - 1).clamp(min=0)) - before.gather(
        1, first.clamp(max=before.shape[1] - 1)
    )
    split = _between(start, left, top) + inner + _between(stop, bottom, right)
    area = torch.where(first == last, _between(start, left, right), split)
    return area @ (bins.mass / (bins.right - bins.left))


def _between(level: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``integral from low to high of (level - t)^2 dt``."""
    return ((high - level) ** 3 - (low - level) ** 3) / 3
