# SPDX-License-Identifier: Apache-2.0
"""Mergeable statistics, the one-sweep runner, and range choice from statistics.

Statistics (`update(x)`, `merge(other)`, `state()`, `from_state(state)`; dim 0 is the sample axis):
    Range, ChannelRange(axis), Moments(axis), Histogram(bins_per_octave), ChannelHistogram(axis),
    Reservoir(axis, rows), JointReservoir(leads, rows), Gram(axis)
    FusedStatistics(statistics)            all statistics of one value, few reads of the tensor
    build_statistics(requests)             graph requests -> {node or nodes: FusedStatistics}
Ranges:
    choose_range(source, extrema, ...)     -> (low, high) from a histogram
    choose_range_for_output(rows, weight)  -> (low, high) by what the consuming layer's output sees
    weight_scales, weight_parameters,
    weight_encoding                        per-channel clip search
    affine_parameters(low, high, qmin, qmax, symmetric=...) -> (scale fp32, zero_point int32)
Sweep:
    collect(module, loader, requests, adapt=...)    one sweep fills all statistics
    Signature, adapter, first_batch        batches -> (args, kwargs)
    all_reduce(statistics, group)          merge over ranks
"""

from __future__ import annotations

from qgraph.calibration.affine import affine_parameters
from qgraph.calibration.channel_histogram import ChannelHistogram
from qgraph.calibration.distributed import all_reduce
from qgraph.calibration.extrema import ChannelRange, Range
from qgraph.calibration.fused import FusedStatistics, build_statistics, make_statistic
from qgraph.calibration.histogram import Bins, Histogram
from qgraph.calibration.loader import Signature, adapter, first_batch
from qgraph.calibration.moments import Gram, Moments
from qgraph.calibration.output_ranges import choose_range_for_output
from qgraph.calibration.ranges import choose_range
from qgraph.calibration.reservoir import JointReservoir, Reservoir
from qgraph.calibration.statistics import Observation, Statistic
from qgraph.calibration.sweep import collect
from qgraph.calibration.weight_scales import weight_encoding, weight_parameters, weight_scales

__all__ = [
    "Bins",
    "ChannelHistogram",
    "ChannelRange",
    "FusedStatistics",
    "Gram",
    "Histogram",
    "JointReservoir",
    "Moments",
    "Observation",
    "Range",
    "Reservoir",
    "Signature",
    "Statistic",
    "adapter",
    "affine_parameters",
    "all_reduce",
    "build_statistics",
    "choose_range",
    "choose_range_for_output",
    "collect",
    "first_batch",
    "make_statistic",
    "weight_encoding",
    "weight_parameters",
    "weight_scales",
]
