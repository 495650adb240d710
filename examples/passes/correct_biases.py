# SPDX-License-Identifier: Apache-2.0
"""A pass that needs statistics: give back the mean that quantized weights lose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph import Context, Fact, Pass
from qgraph.calibration import Moments
from qgraph.graph.build import replace_tensor
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.tensors import stored_operand


@dataclass(frozen=True)
class CorrectBiases(Pass):
    """Add ``(W - Q(W)) E[x]`` to the bias of every linear (Nagel et al., arXiv 1906.04721).

    Place it behind choose-weight-scales: it needs their decisions.
    """

    name: ClassVar[str] = "correct-biases"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:
        """Means per channel of what each linear reads."""
        for site in _linears(context):
            yield Request(_data(site), "Moments", (("axis", -1),))

    def run(self, module: GraphModule, context: Context) -> bool:
        """Register new biases; nothing is written in place."""
        changed = False
        for site in _linears(context):
            node, seen = site.edge.consumer, context.statistics.get(_data(site))
            moments = None if seen is None else seen.find(Moments, axis=-1)
            reason = self._refusal(site, moments)
            if reason:
                context.record(self.name, node, "refused", reason)
                continue
            assert site.encoding is not None
            assert moments is not None
            weight, bias = (stored_operand(module, node, i) for i in (1, 2))
            lost: Tensor = (weight - site.encoding.fake(weight)).double() @ moments.mean
            replace_tensor(module, Edge(node, (2,)), (bias + lost).float(), "corrected_bias")
            context.record(
                self.name, node, "applied", "mean given back", most=float(lost.abs().max())
            )
            changed = True
        return changed

    def _refusal(self, site: Site, moments: Moments | None) -> str:
        if site.encoding is None:
            return "its weight has no format yet; move this pass behind choose-weight-scales"
        if len(site.edge.consumer.args) < 3 or site.edge.consumer.args[2] is None:
            return "it has no bias"
        return "" if moments is not None else "an earlier pass changed its input's statistics"


def _linears(context: Context) -> list[Site]:
    return [site for site in context.plan.weights() if site.kind is OpKind.LINEAR]


def _data(site: Site) -> Node:
    value = site.edge.consumer.args[0]
    assert isinstance(value, Node)
    return value
