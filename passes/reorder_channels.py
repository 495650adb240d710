# SPDX-License-Identifier: Apache-2.0
"""Group the input channels of linears and convolutions by range, a scale per group (RORQ)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import ChannelRange, Histogram, Reservoir, choose_range_for_output
from qgraph.calibration.decibels import decibels
from qgraph.calibration.output_ranges import ROUGH
from qgraph.calibration.transport import permuted_statistics
from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.channel_groups import (
    group_channels,
    group_order,
    grouped_encoding,
    octave_thresholds,
    outlier_thresholds,
    permuted,
)
from qgraph.formats.element_groups import element_groups, magnitude_thresholds
from qgraph.graph.ignore import Ignore
from qgraph.graph.ops import product
from qgraph.graph.permute_channels import apply_fold, find_fold, insert_gather, permute_columns
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.value_heads import apply_value_heads, find_value_heads
from qgraph.passes.choose_ranges import output_weight, relative_power
from qgraph.passes.use_dual_regions import (
    Score,
    affine_encoding,
    linear_score,
    row_request,
)
from qgraph.pipeline import Fact, Pass, Promise

GROUPINGS = {"outliers": outlier_thresholds, "octaves": octave_thresholds}
CLIPS = (1.3, 1.15, 1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24)  # factors on all ranges that are tried
# The more bits, the less a clip can gain and the more it can cost where larger values come.
TIGHTEST = {8: 1.0, 7: 0.85, 6: 0.7, 5: 0.42}
DOUBLINGS = 1.0  # how much more data than the calibration's the ranges are extrapolated to, log2
SMALL = 8  # tiles per layer below which tiles become smaller
# A tighter clip must lower the error on sampled rows by so much: larger values than theirs come.
TIGHTER = 0.93


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Group and reorder the input channels of products, one scale per group, outliers retained.

    PTQ4RIS retains outliers in groups of their own; here groups are channels, so that one group
    is one slice of a matrix product. Ranges come from the sweep, without padding tokens where
    `row_masks` names them. Groups are made contiguous by a permutation. It costs nothing where it
    can be folded into the linear layer before an elementwise function, or into the value
    projection of an attention (then inside each head only: a group is one slice per head);
    elsewhere, or where somebody else reads the value, a gather does it on the quantized branch.
    Where the weight serves other values as well (a head over pyramid levels) the order stays: a
    permuted copy for each would have to be stored.

    Attributes:
        groups: at most so many.
        grouping: ``"outliers"`` (mean + 3 std recursion), ``"octaves"`` (ranges halved), or
            ``"best"`` of both by the output-aware score.
        tied: scales are power-of-two multiples of the smallest (one accumulator and shifts);
            else free (one partial product per group).
        zero_points: a zero point per channel; else signed codes around 0.
        tile: group sizes are multiples of it: 4 is what int8 dot-product instructions contract at
            once; matrix units may want 16 or 32.
        reorder: make groups contiguous; without it only the scales are chosen.
        elements: the published variant instead: groups of elements by magnitude, whose group id
            costs extra bits that are counted.
        min_gain_db: needed improvement over what the sites have or, undecided, over an affine
            range searched by the same score.
        enough_db: where that rival is this good already, it stays: plain products are faster.
        kinds: op kinds that are treated, of ``"linear"`` and ``"conv"``.
        rows: sampled rows behind the score.
        skip, force: globs of consumers to leave alone, or to treat whatever the gain.
    """

    name: ClassVar[str] = "reorder-channels"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    groups: int = 4
    grouping: str = "best"
    tied: bool = True
    zero_points: bool = True
    tile: int = 4
    reorder: bool = True
    elements: bool = False
    min_gain_db: float = 0.5
    enough_db: float = 40.0
    kinds: tuple[str, ...] = ("linear", "conv")
    rows: int = 128
    skip: tuple[str, ...] = ()
    force: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.grouping not in {*GROUPINGS, "best"}:
            raise unknown_name("grouping", self.grouping, [*GROUPINGS, "best"])

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for (value, _), sites in matched(module, context, self.kinds).items():
            axis = channel_axis(sites)
            yield Request(value, "ChannelRange", (("axis", axis),))
            yield row_request(value, sites, self.rows)
            if self.elements:
                yield Request(value, "Histogram", (("bins_per_octave", 64), ("rate", 1)))

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        changed = False
        for (value, bits), sites in matched(module, context, self.kinds).items():
            if not context.left_alone(self.name, value, sites, self.skip):
                changed |= self._treat(module, context, value, sites, bits)
        return changed

    def _treat(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], bits: int
    ) -> bool:
        seen = context.statistics[value]
        axis, weight = channel_axis(sites), output_weight(module, sites)
        rows = seen.get(Reservoir, axis=axis, rows=self.rows).sampled()
        if weight is None or not rows.numel():
            context.record(self.name, value, "refused", "no sampled rows, or no stored weight")
            return False
        power = relative_power(sites)
        score = linear_score(rows, weight, power)
        rival = score(
            sites[0].encoding or _affine(seen.range().bounds(), rows, weight, bits, power)
        )
        if self.elements:
            histogram = seen.get(Histogram, bins_per_octave=64, rate=1)
            grouped = element_groups(_thresholds(histogram), *seen.range().bounds(), bits)
            self._decide_elements(context, value, sites, grouped, decibels(rival, score(grouped)))
            return False
        if decibels(1.0, rival) >= self.enough_db and not self._forced(sites):
            why = f"{decibels(1.0, rival):.1f} dB are enough"
            context.record(self.name, value, "kept", why, bits=float(bits))
            return False
        low, high = likely_range(seen.get(ChannelRange, axis=axis), rows)
        found = self._best(low, high, axis, bits, score)
        if found is None:
            context.record(self.name, value, "kept", "channel ranges form one group")
            return False
        group, encoding, error = found
        gain, count = decibels(rival, error), int(group.max()) + 1
        numbers = {"gain_db": gain, "groups": float(count), "bits": float(bits)}
        if gain < self.min_gain_db and not self._forced(sites):
            why = f"{count} groups gain {gain:+.2f} dB, needed {self.min_gain_db:g}"
            context.record(self.name, value, "kept", why, **numbers)
            return False
        order, how = self._move(module, context, value, sites, group)
        chosen = encoding if order is None else permuted(encoding, order)
        reason = f"{count} channel groups, {gain:+.2f} dB; {how}"
        for site in sites:
            site.decide(chosen, self.name, reason)
        context.record(self.name, value, "applied", reason, **numbers)
        return order is not None

    def _best(
        self, low: Tensor, high: Tensor, axis: int, bits: int, score: Score
    ) -> tuple[Tensor, AffineEncoding, float] | None:
        """Groups and scales of the smallest score; None where there is only one group."""
        size = high - low if self.zero_points else torch.maximum(high, -low)
        best: tuple[Tensor, AffineEncoding, float] | None = None
        for group in self._groupings(size):
            here: tuple[Tensor, AffineEncoding, float] | None = None
            for clip in (c for c in CLIPS if c >= TIGHTEST.get(min(bits, 8), 0.0)):
                encoding = grouped_encoding(
                    low, high, group, bits, tied=self.tied, zero_points=self.zero_points,
                    clip=clip, axis=axis,
                )  # fmt: skip
                error = score(encoding)
                if here is None or error < here[2] * TIGHTER:
                    here = group, encoding, error
            if here is not None and (best is None or here[2] < best[2]):
                best = here
        return best

    def _groupings(self, size: Tensor) -> Iterator[Tensor]:
        for name, thresholds in GROUPINGS.items():
            if self.grouping in {name, "best"}:
                tile = min(self.tile, max(1, len(size) // SMALL))
                group = group_channels(size, thresholds(size, self.groups), tile=tile)
                if int(group.max()) > 0:
                    yield group

    def _move(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], group: Tensor
    ) -> tuple[Tensor | None, str]:
        """Reorder values and weight columns; returns the order (None: unchanged) and how."""
        consumers, axis = [site.edge.consumer for site in sites], channel_axis(sites)
        if any(_serves_others(consumer, consumers) for consumer in consumers):
            return None, "order kept, the weight serves others too"
        heads = find_value_heads(value, consumers)
        order = group_order(group) if isinstance(heads, str) else heads.order(group)
        if not self.reorder or torch.equal(order, torch.arange(len(order))):
            return None, "order kept"
        for consumer in consumers:
            permute_columns(module, consumer, order)
        if not isinstance(heads, str):
            apply_value_heads(module, heads, order)
            _transport(context, [value], order, axis)
            return order, f"order inside each head folded into {heads.linear.name}"
        fold = find_fold(value, consumers)
        if not isinstance(fold, str):
            apply_fold(module, fold, order)
            _transport(context, fold.between, order, axis)
            return order, f"order folded into {fold.linear.name}"
        moved = insert_gather(module, value, [site.edge for site in sites], order, axis)
        context.statistics[moved] = permuted_statistics(context.statistics[value], order, axis)
        return order, f"gathered ({fold})"

    def _decide_elements(
        self, context: Context, value: Node, sites: list[Site], encoding: Encoding, gain: float
    ) -> None:
        numbers = {"gain_db": gain, "bits": float(encoding.bits)}
        if gain < self.min_gain_db and not self._forced(sites):
            why = f"element groups gain {gain:+.2f} dB"
            context.record(self.name, value, "kept", why, **numbers)
            return
        reason = f"{encoding.describe()}, {gain:+.2f} dB at {encoding.bits} stored bits"
        for site in sites:
            site.decide(encoding, self.name, reason)
        context.record(self.name, value, "applied", reason, **numbers)

    def _forced(self, sites: list[Site]) -> bool:
        return any(Ignore.of(self.force).matches(site.edge.consumer) for site in sites)


def likely_range(ranges: ChannelRange, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Channel ranges [C] extrapolated to `DOUBLINGS` times more data than was seen.

    How fast a channel's range grows with data is read off its range in the sampled rows [n, C]
    and in all data: hardly for bounded values, much for products of activations. Without this,
    narrow channels of heavy-tailed values get scales that clip what comes later.
    """
    assert ranges.low is not None
    assert ranges.high is not None
    assert ranges.count is not None
    low, high = ranges.low.clamp(max=0.0), ranges.high.clamp(min=0.0)
    times = float(ranges.count) / max(1, rows.numel())
    if times < 2:
        return low, high
    sampled = rows.amax(0).clamp(min=0.0) - rows.amin(0).clamp(max=0.0)
    own = ((high - low) / sampled.clamp(min=1e-12)).clamp(1.0, 2.0**8).log2() / math.log2(times)
    growth = torch.exp2(torch.maximum(own, own.mean()) * DOUBLINGS)
    return low * growth, high * growth


def _serves_others(consumer: Node, consumers: list[Node]) -> bool:
    """Whether products of other values read the consumer's weight."""
    what = product(consumer)
    assert what is not None
    weight = consumer.args[what.weight]
    return isinstance(weight, Node) and any(user not in consumers for user in weight.users)


def channel_axis(sites: list[Site]) -> int:
    """Axis of the channels that the sites' consumers contract over."""
    return -1 if sites[0].axis is None else sites[0].axis


def matched(
    module: GraphModule, context: Context, kinds: tuple[str, ...]
) -> dict[tuple[Node, int], list[Site]]:
    """Inputs of products with stored weights, undecided or decided as two regions."""
    found: dict[tuple[Node, int], list[Site]] = {}
    for key, sites in context.plan.by_value().items():
        here = [
            site
            for site in sites
            if site.kind.value in kinds
            and site.axis == sites[0].axis
            and (site.encoding is None or site.decided_by == "use-dual-regions")
            and output_weight(module, [site]) is not None
        ]
        if here:
            found[key] = here
    return found


def _transport(context: Context, values: Iterable[Node], order: Tensor, axis: int) -> None:
    for node in values:
        if node in context.statistics:
            seen = context.statistics[node]
            context.statistics[node] = permuted_statistics(seen, order, axis)


def _affine(
    bounds: tuple[float, float], rows: Tensor, weight: Tensor, bits: int, power: float
) -> AffineEncoding:
    low, high = bounds
    found = choose_range_for_output(
        rows, weight, low=low, high=high, bits=bits, relative=power, effort=ROUGH
    )
    return affine_encoding(*found, bits)


def _thresholds(histogram: Histogram) -> Tensor:
    """Magnitude thresholds of the recursion over elements."""
    bins = histogram.bins()
    centre = (bins.left.abs() + bins.right.abs()) / 2
    magnitude, index = centre.unique(return_inverse=True)
    count = torch.zeros_like(magnitude).scatter_add(0, index, bins.mass)
    return magnitude_thresholds(magnitude, count)
