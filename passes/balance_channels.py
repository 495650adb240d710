# SPDX-License-Identifier: Apache-2.0
"""Move range from wide input channels of a linear into its weight columns, by powers of two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import ChannelRange, Reservoir, choose_range_for_output
from qgraph.calibration.decibels import decibels
from qgraph.calibration.output_ranges import sketch
from qgraph.calibration.transport import scaled_statistics
from qgraph.context import Context
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.build import attribute
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.scale_channels import (
    find_scaled_source,
    insert_scale,
    scale_columns,
    scale_source,
)
from qgraph.passes.choose_ranges import relative_power
from qgraph.passes.reorder_channels import matched
from qgraph.passes.use_dual_regions import affine_encoding, row_request, row_weights
from qgraph.pipeline import Fact, Pass, Promise

LINEARS = (OpKind.LINEAR.value,)
# Of the balancing, so much goes by the data; the rest goes by the weight.
SHARES = (1.0, 0.85, 0.7, 0.5)
SPREADS = (1, 2, 3, 4)  # largest exponent
OUTPUTS = 96  # output channels of each consumer that the score looks at


@dataclass(frozen=True)
class BalanceChannels(Pass):
    """Divide wide input channels by ``2^k`` and multiply the weight's columns by it.

    The layer computes the same floats, but one scale per tensor now serves all channels, and the
    product stays a plain integer product: nothing to group, nothing to shift. What it costs is
    resolution of the weights, so the exponents are chosen by the error that both quantizations
    together leave in the layer's output on sampled rows.

    Attributes:
        min_gain_db: needed improvement over leaving the channels as they are.
        rows: sampled rows behind the score.
        skip: globs of consumers to leave alone.
    """

    name: ClassVar[str] = "balance-channels"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    min_gain_db: float = 0.5
    rows: int = 128
    skip: tuple[str, ...] = ()

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for (value, _), sites in matched(module, context, LINEARS).items():
            yield Request(value, "ChannelRange", (("axis", -1),))
            yield row_request(value, sites, self.rows)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        changed = False
        for (value, bits), sites in matched(module, context, LINEARS).items():
            if not context.left_alone(self.name, value, sites, self.skip):
                changed |= self._treat(module, context, value, sites, bits)
        return changed

    def _treat(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], bits: int
    ) -> bool:
        seen = context.statistics[value]
        rows, ranges = (
            seen.get(Reservoir, axis=-1, rows=self.rows).sampled(),
            seen.get(ChannelRange, axis=-1),
        )
        weights = [(_weight(module, site), _weight_bits(context, site)) for site in sites]
        trial = _Trial(rows, weights, ranges, bits, relative_power(sites))
        plain = trial.error(torch.ones(rows.shape[1]))
        factors = list(exponents(ranges, torch.cat([w for w, _ in weights])))
        errors = [trial.error(factor) for factor in factors]
        best = min(range(len(errors)), key=errors.__getitem__)
        gain, factor = decibels(plain, errors[best]), factors[best]
        spread = float(factor.log2().max())
        numbers = {"gain_db": gain, "spread": spread, "bits": float(bits)}
        if gain < self.min_gain_db:
            why = f"balancing gains {gain:+.2f} dB, needed {self.min_gain_db:g}"
            context.record(self.name, value, "kept", why, **numbers)
            return False
        how = self._rewrite(module, context, value, sites, factor)
        encoding = trial.encoding(factor)
        reason = f"channels balanced by up to 2^{spread:.0f}, {gain:+.2f} dB; {how}"
        for site in sites:
            site.decide(encoding, self.name, reason)
        context.record(self.name, value, "applied", reason, **numbers)
        return True

    def _rewrite(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], factor: Tensor
    ) -> str:
        consumers = list(dict.fromkeys(site.edge.consumer for site in sites))
        source = find_scaled_source(value, consumers)
        for consumer in consumers:
            scale_columns(module, consumer, factor)
        scaled = scaled_statistics(context.statistics[value], 1.0 / factor)
        if isinstance(source, str):
            moved = insert_scale(module, value, [site.edge for site in sites], 1.0 / factor)
            context.statistics[moved] = scaled
            return f"multiplied ({source})"
        scale_source(module, source, 1.0 / factor)
        node = value
        while True:  # every value from the source on is scaled now
            if node in context.statistics:
                context.statistics[node] = scaled_statistics(context.statistics[node], 1.0 / factor)
            if node is source:
                return f"folded into {source.name}"
            node = node.args[0]  # type: ignore[assignment]


class _Trial:
    """The error of a layer's output when data and weights are both quantized."""

    def __init__(
        self,
        rows: Tensor,
        weights: list[tuple[Tensor, int]],
        ranges: ChannelRange,
        bits: int,
        power: float,
    ) -> None:
        assert ranges.low is not None
        assert ranges.high is not None
        weights = [(_some(weight), width) for weight, width in weights]
        self.rows, self.weights, self.bits = rows, weights, bits
        self.low, self.high = ranges.low, ranges.high
        self.outputs = [rows @ weight.T for weight, _ in weights]
        energy = torch.stack([o.square().sum(1) for o in self.outputs]).sum(0)
        self.importance = row_weights(energy, power).unsqueeze(1)
        self.power = power

    def encoding(self, factor: Tensor) -> AffineEncoding:
        """The affine encoding of ``x / factor`` with an output-aware range."""
        low, high = float((self.low / factor).min()), float((self.high / factor).max())
        stacked = sketch(torch.cat([w for w, _ in self.weights]), 64) * factor
        found = choose_range_for_output(
            self.rows / factor, stacked, low=low, high=high, bits=self.bits, relative=self.power
        )
        return affine_encoding(*found, self.bits)

    def error(self, factor: Tensor) -> float:
        """Squared error of all outputs, each row relative to its output's size."""
        data = self.encoding(factor).fake(self.rows / factor)
        total = 0.0
        for (weight, bits), output in zip(self.weights, self.outputs, strict=True):
            error = data @ _rounded(weight * factor, bits).T - output
            total += float((error.square() * self.importance).sum())
        return total


def exponents(ranges: ChannelRange, weight: Tensor) -> Iterator[Tensor]:
    """Candidate factors, fp32 [C] powers of two from 1 up."""
    assert ranges.low is not None
    assert ranges.high is not None
    width = (ranges.high.clamp(min=0) - ranges.low.clamp(max=0)).clamp(min=1e-6).log2()
    column = weight.abs().amax(0).clamp(min=1e-6).log2()
    for share in SHARES:
        wanted = share * width - (1 - share) * column
        for spread in SPREADS:
            power = (wanted - wanted.max()).ceil().clamp(min=-spread)
            yield torch.exp2(power - power.min())


def _some(weight: Tensor) -> Tensor:
    """Evenly spread output channels, `OUTPUTS` at most."""
    return weight[:: -(-weight.shape[0] // OUTPUTS)]


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight on a symmetric grid per output channel, full range."""
    grid = IntGrid(bits, signed=True, narrow=True)
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / grid.qmax
    return (weight / scale).round() * scale


def _weight(module: GraphModule, site: Site) -> Tensor:
    target = str(site.edge.consumer.args[1].target)  # type: ignore[union-attr]
    return attribute(module, target).detach().float()


def _weight_bits(context: Context, site: Site) -> int:
    found = context.plan.at(Edge(site.edge.consumer, (1,)))
    return 16 if found is None else found.bits
