# SPDX-License-Identifier: Apache-2.0
"""Statistics of an attention operand by channel, tied to the weight rows that make the channels.

From them follows, without a second sweep, what the operand looks like after rows changed sign or
keys were centred, and what quantizing it then costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.calibration.affine import affine_parameters
from qgraph.calibration.channel_histogram import ChannelHistogram
from qgraph.calibration.clip_grid import CodeRange
from qgraph.calibration.extrema import ChannelRange, Range
from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.histogram import Bins
from qgraph.calibration.ranges import choose_range, expected_error
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.channel_maps import ChannelMaps
from qgraph.graph.ops import MOVES, SPLITS, OpKind, kind
from qgraph.graph.requests import Request
from qgraph.graph.row_labels import is_source

aten = torch.ops.aten
POOLED = 1024  # bins of a tensor's density; channels have 257 each
_THROUGH = MOVES | SPLITS | {aten._to_copy.default, aten.clone.default}
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True, slots=True)
class View:
    """Where the channels of an operand can be observed.

    Attributes:
        operand: the value that a product reads.
        node: the value that is observed: the operand, or the linear behind it where heads are
            merged into the batch.
        axis: channel axis (or axes) of `node`.
        labels: int64 [C] of the operand's channels.
        channels: int64 [C], their places among the channels of `node`.
        factor: operand = factor * observed.
    """

    operand: Node
    node: Node
    axis: int | tuple[int, ...]
    labels: Tensor
    channels: Tensor
    factor: float

    def requests(self) -> Iterator[Request]:
        """What the sweep must gather."""
        yield Request(self.node, "ChannelRange", (("axis", self.axis),))
        yield Request(self.node, "ChannelHistogram", (("axis", self.axis),))


def step_up(node: Node) -> tuple[Node, float] | None:
    """(what a movement or plain scaling reads, its factor); None for any other op."""
    above = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(above, Node):
        return None
    if node.target in _SCALES and isinstance(node.args[1], (int, float)):
        number = float(node.args[1])
        divides = node.target in {aten.div.Tensor, aten.div.Scalar}
        return above, 1.0 / number if divides else number
    moves = node.target in _THROUGH or kind(node) is OpKind.MOVE
    return (above, 1.0) if moves else None


def path_to_projection(operand: Node) -> tuple[Node, float, tuple[Node, ...]] | None:
    """(linear, factor, nodes between) if the operand is a linear's output, moved and scaled."""
    node, factor, passed = operand, 1.0, []
    while not is_source(node):
        step = step_up(node)
        if step is None:
            return None
        passed.append(node)
        node, factor = step[0], factor * step[1]
    return node, factor, tuple(passed)


def view_of(maps: ChannelMaps, operand: Node) -> View | None:
    """Where to observe an operand by channel; None if its channels cannot be told apart."""
    found = maps.channels(operand)
    if found is None:
        return None
    axes, labels = found
    if -operand.meta["val"].ndim not in axes:
        axis = axes[0] if len(axes) == 1 else axes
        return View(operand, operand, axis, labels, torch.arange(labels.numel()), 1.0)
    path = path_to_projection(operand)
    if path is None:
        return None
    source, factor, _ = path
    rows = maps.labels.rows_of(source)
    channels = torch.isin(rows, labels).nonzero().squeeze(1)
    axis = -1 if kind(source) is OpKind.LINEAR else 1
    return View(operand, source, axis, rows[channels], channels, factor)


@dataclass(frozen=True)
class OperandChannels:
    """What was seen of an operand's channels, or what follows after a rewrite.

    Attributes:
        labels: int64 [C].
        extrema: range per channel, in units of the operand.
        histogram: of the observed value, still to be multiplied by `factor`.
        factor: see `View`.
        shift: fp64 [C], what was added to each channel.
    """

    labels: Tensor
    extrema: ChannelRange
    histogram: ChannelHistogram
    factor: float
    shift: Tensor | None = None

    @classmethod
    def of(cls, view: View, seen: FusedStatistics) -> OperandChannels:
        """Read the statistics that a view asked for."""
        extrema = seen.get(ChannelRange, axis=view.axis).permuted(view.channels)
        histogram = seen.get(ChannelHistogram, axis=view.axis).permuted(view.channels)
        return cls(view.labels, _scaled(extrema, view.factor), histogram, view.factor)

    def mirrored(self, negative: Tensor) -> OperandChannels:
        """After the channels where `negative` (bool [C]) changed sign."""
        if self.extrema.low is not None:
            negative = negative.to(self.extrema.low.device)
        return dataclasses.replace(
            self,
            extrema=self.extrema.mirrored(negative),
            histogram=self.histogram.mirrored(negative),
        )

    def shifted(self, by: Tensor) -> OperandChannels:
        """After `by` (fp64 [C]) was added to the channels."""
        moved = ChannelRange(self.extrema.axis)
        low, high = self.bounds()
        ends = {"low": (low + by).float(), "high": (high + by).float()}
        moved._load(self.extrema.fields() | ends)
        return dataclasses.replace(self, extrema=moved, shift=by)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value, fp64 [C]."""
        fields = self.extrema.fields()
        return fields["low"].double().cpu(), fields["high"].double().cpu()

    def range(self) -> Range:
        """Over all channels."""
        return self.extrema.tensor_range()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, fp64 [C]."""
        mean, variance = histogram_moments(self.histogram)
        mean = mean * self.factor
        return mean if self.shift is None else mean + self.shift, variance * self.factor**2

    def bins(self) -> Bins:
        """The density of all channels together."""
        shift = None if self.shift is None else self.shift / self.factor
        found = self.histogram.bins(shift)
        if self.factor < 0:
            ends = -found.right.flip(0), -found.left.flip(0), found.mass.flip(0)
            found = Bins(*ends, found.zeros)
        size = abs(self.factor)
        return Bins(found.left * size, found.right * size, found.mass, found.zeros)

    def encoding(self, bits: int, method: str) -> tuple[AffineEncoding, float]:
        """(unsigned affine encoding, expected squared error per element)."""
        whole, bins = self.range(), pooled(self.bins(), *self.range().bounds())
        low, high = choose_range(bins, whole, bits=bits, method=method)
        grid = IntGrid(bits, signed=False)
        scale, zero_point = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=False)
        encoding = AffineEncoding(
            scale=scale, zero_point=zero_point, qmin=grid.qmin, qmax=grid.qmax
        )
        ends = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
        error = expected_error(bins, CodeRange(grid.qmin, grid.qmax, symmetric=False), *ends)
        return encoding, float(error) / max(bins.total, 1.0)

    def statistics(self, view: View) -> FusedStatistics | None:
        """The summary as statistics of the operand; None where it was observed elsewhere."""
        if view.node is not view.operand or self.shift is not None:
            return None
        return FusedStatistics([self.extrema, self.histogram])


def histogram_moments(histogram: ChannelHistogram) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, fp64 [C], from the middles of its bins."""
    if histogram.counts is None or histogram.exponent is None:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    counts = histogram.counts.cpu().double()
    width = histogram.exponent.cpu().double().exp2()[:, None] / histogram.half
    offset = torch.arange(-histogram.half, histogram.half + 1, dtype=torch.float64)
    centre = (offset - 0.5 * offset.sign()) * width
    total = counts.sum(1).clamp(min=1.0)
    mean = (counts * centre).sum(1) / total
    variance = (counts * (centre - mean[:, None]).square()).sum(1) / total
    return mean, variance


def pooled(bins: Bins, low: float, high: float, count: int = POOLED) -> Bins:
    """The same density in `count` equal bins over [low, high]."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        return bins
    width = (high - low) / count
    at = (((bins.left + bins.right) / 2 - low) / width).floor().clamp(0, count - 1).long()
    mass = torch.zeros(count, dtype=torch.float64).scatter_add_(0, at, bins.mass)
    left = low + torch.arange(count, dtype=torch.float64) * width
    used = mass > 0
    return Bins(left[used], left[used] + width, mass[used], bins.zeros)


def _scaled(extrema: ChannelRange, factor: float) -> ChannelRange:
    """Ranges of ``factor * x``."""
    if factor == 1.0 or extrema.low is None or extrema.high is None:
        return extrema
    ends = extrema.low * factor, extrema.high * factor
    low, high = ends if factor > 0 else ends[::-1]
    moved = ChannelRange(extrema.axis)
    moved._load(extrema.fields() | {"low": low, "high": high})
    return moved
