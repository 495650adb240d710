# SPDX-License-Identifier: Apache-2.0
"""One absurd value among calibration data ruins every range around it: say so."""

from __future__ import annotations

import torch

from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.histogram import Histogram
from qgraph.calibration.reservoir import Reservoir

# Massive activations of transformers are some 1,000 times the median. What half precision can hold
# is no reason for doubt either: the median of a softmax's output is often tiny.
SUSPECT = 1e6
HALF_MAX = 65504.0


def outlier_ratio(seen: FusedStatistics) -> float:
    """Largest magnitude over the median magnitude of nonzero samples; 0 where all is usual."""
    peak = max((abs(bound) for bound in seen.range().bounds()), default=0.0)
    typical = _median(seen) if peak > HALF_MAX else 0.0
    return peak / typical if typical > 0 else 0.0


def _median(seen: FusedStatistics) -> float:
    rows = seen.find(Reservoir)
    if rows is not None:
        values = rows.sampled().abs().flatten()
        values = values[values > 0]
        return float(values.median()) if values.numel() else 0.0
    histogram = seen.find(Histogram)
    if histogram is None:
        return 0.0
    bins = histogram.bins()
    if not bins.mass.numel():
        return 0.0
    middle = ((bins.left + bins.right) / 2).abs()
    order = middle.argsort()
    total = bins.mass[order].cumsum(0)
    place = int(torch.searchsorted(total, total[-1] / 2))
    return float(middle[order][place])
