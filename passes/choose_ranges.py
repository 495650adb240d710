# SPDX-License-Identifier: Apache-2.0
"""Choose the affine range of every activation that no other pass gave a format."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import (
    Histogram,
    Reservoir,
    affine_parameters,
    choose_range,
    choose_range_for_output,
)
from qgraph.calibration.outliers import SUSPECT, outlier_ratio
from qgraph.calibration.output_ranges import BRIEF_FROM, effort_for
from qgraph.calibration.ranges import range_sqnr
from qgraph.calibration.ranks import Ranks
from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.build import attribute
from qgraph.graph.ops import OpKind, argument, product
from qgraph.graph.plan import Site
from qgraph.graph.provenance import module_path
from qgraph.graph.requests import Request
from qgraph.graph.seen_through import is_normalised_after
from qgraph.pipeline import Fact, Pass, Promise

METHODS = ("auto", "output", "mse", "minmax", "percentile", "entropy")
WIDE = 8  # bits from which what a clip takes away weighs more than rounding

LOGGER = logging.getLogger("qgraph")
WHAT = "choosing ranges"
Key = tuple[Node, int]
Clips = dict[Key, tuple[float, float]]


@dataclass(frozen=True)
class ChooseRanges(Pass):
    """Give every undecided activation site an unsigned affine encoding per tensor.

    Attributes:
        method: ``"output"`` minimises the error of the consuming layers' outputs over sampled
            rows (a plain MSE clip can be worse than min-max: a few large entries meet large
            weights) and falls back to ``"mse"`` where the consumer has no stored weight;
            ``"auto"`` takes it where sampled rows tell enough (see `rows_tell_enough`), else
            ``"mse"`` over the histogram; or ``"minmax"``, ``"percentile"``, ``"entropy"``.
            `python -m benchmarks.range_methods` compares them.
        rows: sampled rows per value where outputs judge.
        add_sqnr: a residual add whose operand would keep less than so many dB stays in float and
            is reported (residual streams of transformers live off a few huge channels); minus
            infinity quantizes every add.
        brief_from: ranges of so many bits are searched less finely (8;
            `python -m benchmarks.search_effort` says what more would win).

    Consumers of one value at one width share one encoding.
    """

    name: ClassVar[str] = "choose-ranges"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.RANGES})

    method: str = "auto"
    rows: int = 128
    add_sqnr: float = 35.0
    brief_from: int = BRIEF_FROM

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("range method", self.method, METHODS)

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for (value, _), sites in context.plan.by_value(undecided_only=True).items():
            yield Request(value, "Range")
            by_output = self._outputs_judge(sites)
            added = any(site.kind is OpKind.ADD for site in sites)
            if self.method != "minmax" and (not by_output or added):
                yield Request(value, "Histogram")
            if by_output:
                axis = sites[0].axis if sites[0].axis is not None else -1
                options = (("axis", axis), ("rows", self.rows), ("per_sample", 16))
                yield Request(value, "Reservoir", options)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        clips = self._spare_adds(context)
        undecided = list(context.plan.by_value(undecided_only=True).items())

        def choose(number: int) -> tuple[float, float, str]:
            key, sites = undecided[number]
            return self._range(module, context, key, sites, clips)

        found = Ranks.here().spread(len(undecided), choose, WHAT)
        for ((value, bits), sites), (low, high, how) in zip(undecided, found, strict=True):
            self._doubt(context, value)
            grid = IntGrid(bits, signed=False)
            scale, zero_point = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=False)
            encoding = AffineEncoding(
                scale=scale, zero_point=zero_point, qmin=grid.qmin, qmax=grid.qmax
            )
            for site in sites:
                site.decide(encoding, self.name, f"{how} range [{low:.4g}, {high:.4g}]")
        return False

    def _outputs_judge(self, sites: list[Site]) -> bool:
        if self.method == "auto":
            return rows_tell_enough(sites)
        return self.method == "output" and any(map(stored_weight, sites))

    def _doubt(self, context: Context, value: Node) -> None:
        """Tell of data that no range can serve; the median shows what is usual."""
        ratio = outlier_ratio(context.statistics[value])
        if ratio > SUSPECT:
            reason = (
                f"one value is {ratio:.0e} times the median: check the calibration data"
                f" (the range is chosen without trusting it)"
            )
            context.record(self.name, value, "kept", reason, ratio=ratio)
            LOGGER.warning("%s: %s", module_path(value) or value.name, reason)

    def _range(
        self, module: GraphModule, context: Context, key: Key, sites: list[Site], known: Clips
    ) -> tuple[float, float, str]:
        value, bits = key
        seen = context.statistics[value]
        extrema = seen.range()
        effort = effort_for(bits, self.brief_from)
        by_output = self._outputs_judge(sites)
        if self.method == "auto" and seen.find(Reservoir if by_output else Histogram) is None:
            by_output = not by_output  # bits changed since calibration: what it asked for judges
        weight = output_weight(module, sites) if by_output else None
        if weight is not None:
            rows = seen.get(Reservoir, rows=self.rows).sampled()
            low, high = extrema.bounds()
            # a norm divides by the size of its row; what lives on unnormalised counts as it is
            found = choose_range_for_output(
                rows, weight, low=low, high=high, bits=bits, relative=relative_power(sites),
                effort=effort,
            )  # fmt: skip
            return (*found, "output-aware")
        method = "mse" if self.method in {"auto", "output"} else self.method
        if method == "mse" and key in known:
            return (*known[key], method)
        source = seen.get(Histogram) if method != "minmax" else seen.find(Histogram)
        found = choose_range(
            source, extrema, bits=bits, method=method,  # type: ignore[arg-type]
            schedule=effort.histogram,
        )  # fmt: skip
        return (*found, method)

    def _spare_adds(self, context: Context) -> Clips:
        """Take adds off the plan whose operands would lose too much; the clips that it tried."""
        adds: dict[Node, list[Site]] = {}
        for site in context.plan.activations():
            if site.kind is OpKind.ADD and site.encoding is None and self.add_sqnr > -math.inf:
                adds.setdefault(site.edge.consumer, []).append(site)
        keys = list(dict.fromkeys((s.value, s.bits) for sites in adds.values() for s in sites))
        keys = [key for key in keys if context.statistics[key[0]].find(Histogram) is not None]
        found = Ranks.here().spread(len(keys), lambda at: self._clip(context, keys[at]), WHAT)
        kept_by = {key: float(sqnr) for key, (_, _, sqnr) in zip(keys, found, strict=True)}
        for consumer, sites in adds.items():
            kept = min(kept_by.get((site.value, site.bits), math.inf) for site in sites)
            if kept < self.add_sqnr:
                for site in sites:
                    context.plan.remove(site)
                reason = f"an operand would keep {kept:.1f} dB, below {self.add_sqnr:g}"
                context.record(self.name, consumer, "kept", reason, sqnr=kept)
        return {key: (low, high) for key, (low, high, _) in zip(keys, found, strict=True)}

    def _clip(self, context: Context, key: Key) -> tuple[float, float, float]:
        """The best clip of a value at a width, and the dB that the value keeps."""
        value, bits = key
        seen = context.statistics[value]
        bins = seen.get(Histogram).bins()
        schedule = effort_for(bits, self.brief_from).histogram
        ends = choose_range(bins, seen.range(), bits=bits, schedule=schedule)
        return (*ends, range_sqnr(bins, ends, bits=bits))


def relative_power(sites: Sequence[Site]) -> float:
    """How much a row's own output weighs down its errors: 1.5 before a norm, else not at all."""
    return 1.5 if all(is_normalised_after(site.edge.consumer) for site in sites) else 0.0


def rows_tell_enough(sites: list[Site]) -> bool:
    """Whether a range is better judged by layers' outputs over sampled rows than by a histogram.

    Sampled rows show the bulk, not what is rare: a tiny target is in none of them, and a clip that
    removes it looks free. That does no harm where errors count relative to their row, or where
    few bits make rounding the larger error. It does in convolutions, of whose pixels a few in a
    thousand are sampled, and from 8 bits on.
    """
    if not any(map(stored_weight, sites)):
        return False
    rare_decides = any(site.kind is OpKind.CONV or site.bits >= WIDE for site in sites)
    return not rare_decides or relative_power(sites) > 0


def output_weight(module: GraphModule, sites: list[Site]) -> Tensor | None:
    """Weights [O, C] of all consumers with a stored weight, stacked; None if there are none.

    A convolution counts each kernel position as an output of its own.
    """
    stacked = []
    for stored in filter(None, map(stored_weight, sites)):
        values = attribute(module, str(stored.target)).detach().to(torch.float32)
        stacked.append(values.movedim(1, -1).reshape(-1, values.shape[1]))
    return torch.cat(stacked) if stacked else None


def stored_weight(site: Site) -> Node | None:
    """The weight that a layer multiplies the site's value with, if it is stored and ungrouped."""
    what = product(site.edge.consumer)
    if what is None or site.kind not in {OpKind.LINEAR, OpKind.CONV}:
        return None
    weight = site.edge.consumer.args[what.weight]
    grouped = site.kind is OpKind.CONV and argument(site.edge.consumer, 6) != 1
    if not isinstance(weight, Node) or weight.op != "get_attr" or grouped:
        return None
    return weight if site.edge.path == (what.data,) else None
