# SPDX-License-Identifier: Apache-2.0
"""The published dual-region quantizer of post-softmax values, which adds its regions.

Its code sends ``clip(a, t, 1)`` through the coarse grid and ``clip(a, 0, t)`` through the fine one
and sums the two, so every value is off by about t. The search over 20 splits by the error of A
hides that by running to tiny t. For comparison only; no such table of levels exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import Reservoir
from qgraph.context import Context
from qgraph.graph.build import insert_call
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.seen_through import softmax_behind
from qgraph.pipeline import Fact, Pass, Promise

aten = torch.ops.aten
SPLITS = 20


def summed_regions(values: Tensor, threshold: float, bits: int) -> Tensor:
    """``Q_coarse(clip(a, t, 1)) + Q_fine(clip(a, 0, t))``."""
    top = (1 << (bits - 1)) - 1
    coarse = (values.clamp(threshold, 1.0) * top).round().clamp(0, top) / top
    fine = (values.clamp(0.0, threshold) * (top / threshold)).round().clamp(0, top)
    return coarse + fine * (threshold / top)


@dataclass(frozen=True)
class SumRegions(Pass):
    """Insert the summing quantizer on softmax operands and take them off the plan."""

    name: ClassVar[str] = "sum-regions"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for site in _sites(context):
            yield Request(site.value, "Reservoir", (("axis", -1), ("rows", 128)))

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        found = list(_sites(context))
        for site in found:
            rows = context.statistics[site.value].get(Reservoir).sampled()
            splits = [2.0**-i for i in range(SPLITS)]
            errors = [
                float((summed_regions(rows, t, site.bits) - rows).square().sum()) for t in splits
            ]
            best = splits[min(range(SPLITS), key=errors.__getitem__)]
            site.edge.redirect(_insert(module, site.value, best, site.bits))
            context.plan.remove(site)
            context.record(self.name, site.value, "applied", f"regions added at {best:g}")
        return bool(found)


def _sites(context: Context) -> Iterable[Site]:
    return [
        site
        for site in context.plan.activations()
        if site.encoding is None and site.edge.path == (0,) and softmax_behind(site.value)
    ]


def _insert(module: GraphModule, value: Node, threshold: float, bits: int) -> Node:
    top = (1 << (bits - 1)) - 1
    following = value.next

    def grid(low: float, high: float, steps: float) -> Node:
        node = value
        for target, args in (
            (aten.clamp.default, (low, high)), (aten.mul.Tensor, (steps,)),
            (aten.round.default, ()), (aten.clamp.default, (0, top)),
            (aten.mul.Tensor, (1.0 / steps,)),
        ):  # fmt: skip
            node = insert_call(module, target, node, *args, like=value, before=following)
        return node

    parts = grid(threshold, 1.0, float(top)), grid(0.0, threshold, top / threshold)
    return insert_call(module, aten.add.Tensor, *parts, like=value, before=following)
