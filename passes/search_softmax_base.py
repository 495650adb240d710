# SPDX-License-Identifier: Apache-2.0
"""Choose the format of attention probabilities by the error that the attention output sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.calibration import (
    ChannelHistogram,
    ChannelRange,
    FusedStatistics,
    Histogram,
    JointReservoir,
)
from qgraph.calibration.decibels import decibels
from qgraph.calibration.probability_formats import (
    CELLS,
    FAMILIES,
    Choice,
    Sample,
    best_by_family,
    best_by_head,
)
from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.graph.attention_sites import value_product
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.row_labels import concrete
from qgraph.pipeline import Fact, Pass, Promise

HEADS = 1  # axis of the heads in probabilities [B, H, T, S]
PER_HEAD_POSITIONS = 1024  # of one sample, in a head's histogram


@dataclass(frozen=True)
class SearchSoftmaxBase(Pass):
    """Search base, scale and kind of format for each attention's probabilities.

    The objective is the squared error of A V over sampled rows of A with their V, taken from the
    one sweep (PTQ4SAM's adaptive granularity, arXiv 2405.03144, section 3.3, on a fixed grid of
    scales: the error is not unimodal in the scale). Power-of-two bases, a uniform format and a
    dual-region one compete; the smallest error wins, a tie goes to the first in `formats`.

    Attributes:
        formats: families that may win, of ``"uniform"``, ``"power_of_two"``, ``"dual_region"``.
        min_gain_db: another format must beat the uniform one by so much.
        attention_rows: sampled rows per site (`per_head`: of each head).
        per_head: scale, base and regions of each head's own, where the probabilities are
            [B, H, T, S]. The family is one for all heads of a site.
    """

    name: ClassVar[str] = "search-softmax-base"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    formats: tuple[str, ...] = FAMILIES
    min_gain_db: float = 0.0
    attention_rows: int = 128
    per_head: bool = False

    def __post_init__(self) -> None:
        for each in self.formats:
            if each not in FAMILIES:
                what = "format family"
                raise unknown_name(what, each, FAMILIES)

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for _, site in attention_products(module, context):
            heads = self._heads(site)
            request = joint_request(site, self.attention_rows, heads=heads)
            if isinstance(request, Request):
                yield request
                yield Request(site.value, "Range")
                yield Request(site.value, "Histogram")
                if heads:
                    yield Request(site.value, "ChannelRange", (("axis", HEADS),))
                    options = (("axis", HEADS), ("positions", PER_HEAD_POSITIONS))
                    yield Request(site.value, "ChannelHistogram", options)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        for softmax, site in attention_products(module, context):
            if site.encoding is not None:
                context.record(self.name, softmax, "kept", f"{site.decided_by} has decided")
                continue
            request = joint_request(site, self.attention_rows, heads=self._heads(site))
            if not isinstance(request, Request):
                context.record(self.name, softmax, "refused", request)
                continue
            key = (site.value, *request.partners)
            found = self._candidates(
                site, context.statistics[key].get(JointReservoir), context.statistics[site.value]
            )
            self._decide(context, softmax, site, found)
        return False

    def _heads(self, site: Site) -> int:
        """Heads that get numbers of their own; 0: one format for all."""
        shape = site.value.meta["val"].shape
        count = shape[HEADS] if self.per_head and len(shape) == 4 else 0
        return count if isinstance(count, int) and count > 1 else 0

    def _candidates(
        self, site: Site, reservoir: JointReservoir, seen: FusedStatistics
    ) -> dict[str, Choice]:
        """The best format of each family; empty if no probability above zero was sampled."""
        rows, values, *labels = reservoir.sampled()
        if rows.numel() == 0 or float(rows.max()) <= 0.0:
            return {}
        if not labels:
            peak = max(seen.range().bounds()[1], float(rows.max()))
            sample = Sample(rows, values, peak, seen.get(Histogram).bins())
            return best_by_family(sample, site.bits, self.formats)
        peaks = seen.get(ChannelRange, axis=HEADS).fields()["high"]
        histogram = seen.get(ChannelHistogram, axis=HEADS, positions=PER_HEAD_POSITIONS)
        samples = []
        for head in range(self._heads(site)):
            own = labels[0].flatten() == head
            if not bool((rows[own] > 0).any()):  # too few rows: as all heads together
                own = torch.ones_like(own)
            peak = max(float(peaks[head]), float(rows[own].max()))
            bins = histogram.permuted(torch.tensor([head])).bins()
            samples.append(Sample(rows[own], values[own], peak, bins))
        return best_by_head(samples, site.bits, self.formats, axis=HEADS)

    def _decide(
        self, context: Context, softmax: Node, site: Site, found: dict[str, Choice]
    ) -> None:
        if not found:
            context.record(self.name, softmax, "refused", "no probabilities were sampled")
            return
        uniform = found.get("uniform")
        best = min(found.values(), key=lambda each: each.error)
        gain = 0.0 if uniform is None else decibels(uniform.error, best.error)
        if uniform is not None and gain < max(self.min_gain_db, 1e-9):
            best, gain = uniform, 0.0
        numbers = {f"error_{family}": each.error for family, each in found.items()}
        reason = f"{best.detail}: smallest error of the attention output"
        if uniform is not None and best is not uniform:
            reason += f", {gain:.2f} dB below uniform"
        site.decide(best.encoding, self.name, reason)
        context.record(
            self.name, softmax, "applied" if best.family != "uniform" else "kept", reason,
            gain_db=gain, bits=float(site.bits), heads=float(self._heads(site)), **numbers,
        )  # fmt: skip


def attention_products(module: GraphModule, context: Context) -> Iterator[tuple[Node, Site]]:
    """Planned probabilities: every softmax whose output is the left operand of a product."""
    for node in module.graph.nodes:
        if kind(node) is OpKind.SOFTMAX:
            product = value_product(node)
            site = None if product is None else context.plan.at(Edge(product, (0,)))
            if site is not None:
                yield node, site


def joint_request(site: Site, rows: int, *, heads: int = 0) -> Request | str:
    """Rows of A with their V (of each of so many heads), or why they cannot be sampled."""
    value, other = site.value, site.edge.consumer.args[1]
    if not isinstance(other, Node):
        return "the values are no tensor of the graph"
    first, second = value.meta["val"].shape, other.meta["val"].shape
    same = [str(a) == str(b) for a, b in zip(first[:-2], second[:-2], strict=False)]
    if len(first) != len(second) or len(first) < 3 or not all(same):
        return "probabilities and values do not share their leading dimensions"
    most = CELLS // max(1, concrete(second[-2]) * concrete(second[-1]))
    kept = max(8, min(rows * max(1, heads), most))
    options: tuple[tuple[str, object], ...] = (
        ("leads", (len(first) - 1, len(first) - 2)), ("rows", kept)
    )  # fmt: skip
    if heads:
        options += (("per_sample", 4 * heads), ("index_axis", HEADS))
    return Request(value, "JointReservoir", options, (other,))
