# SPDX-License-Identifier: Apache-2.0
"""Graphs written node by node, with their values, so that one pass runs in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qgraph.calibration import build_statistics
from qgraph.context import Context, Decision
from qgraph.graph.edges import Edge
from qgraph.graph.ops import kind
from qgraph.graph.plan import Plan, Role, Site
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pass

aten = torch.ops.aten


class Hand:
    """A float graph, what its nodes compute, and a plan."""

    def __init__(self) -> None:
        self.graph, self.root, self.plan = Graph(), nn.Module(), Plan()

    def given(self, name: str, value: Tensor) -> Any:
        """An input."""
        return self._with(self.graph.placeholder(name), value)

    def stored(self, name: str, value: Tensor) -> Any:
        """A buffer."""
        self.root.register_buffer(name, value)
        return self._with(self.graph.get_attr(name), value)

    def call(self, target: Any, *args: Any, name: str | None = None) -> Any:
        """An op on nodes and literals, computed at once."""
        node = self.graph.create_node("call_function", target, args, name=name)
        return self._with(node, target(*map_arg(args, lambda n: n.meta["val"])))

    def linear(self, data: Node, weight: Tensor, bias: Tensor | None = None, name: str = "") -> Any:
        """A linear layer with a stored weight."""
        label = name or f"layer{len(self.graph.nodes)}"
        held = [self.stored(f"{label}_weight", weight)]
        held += [] if bias is None else [self.stored(f"{label}_bias", bias)]
        return self.call(aten.linear.default, data, *held, name=label)

    @staticmethod
    def _with(node: Node, value: Tensor) -> Node:
        node.meta["val"] = value
        return node

    def data_site(
        self, consumer: Node, path: int = 0, bits: int = 4, axis: int | None = None
    ) -> Any:
        """Plan an operand as an activation."""
        return self._site(consumer, path, Role.ACTIVATION, bits, axis)

    def weight_site(
        self, consumer: Node, path: int = 1, bits: int = 4, axis: int | None = 0
    ) -> Any:
        """Plan an operand as a weight."""
        return self._site(consumer, path, Role.WEIGHT, bits, axis)

    def _site(self, consumer: Node, path: int, role: Role, bits: int, axis: int | None) -> Any:
        edge = Edge(consumer, (path,))
        site = Site(edge=edge, role=role, kind=kind(consumer), bits=bits, axis=axis)
        self.plan.add(site)
        return site

    def module(self, *outputs: Node) -> GraphModule:
        """The graph; without outputs it gives the last value."""
        if not any(node.op == "output" for node in self.graph.nodes):
            last = [n for n in self.graph.nodes if n.op == "call_function"][-1:]
            self.graph.output(tuple(outputs) or last[0])
        return GraphModule(self.root, self.graph)

    def context(self, module: GraphModule, *items: Pass, **options: Any) -> Context:
        """What passes share; the statistics that `items` ask for have seen the graph's values."""
        inputs = tuple(n.meta["val"] for n in module.graph.nodes if n.op == "placeholder")
        context = Context(sample=Sample(inputs), batches=[inputs], **options)
        context.plan = self.plan
        asked = [request for item in items for request in item.statistics(module, context)]
        context.statistics = build_statistics(asked)
        for key, seen in context.statistics.items():
            if isinstance(key, tuple):
                seen.update_all([node.meta["val"] for node in key])
            else:
                seen.update(key.meta["val"])
        return context

    def run(self, *items: Pass, **options: Any) -> tuple[GraphModule, Context, list[bool]]:
        """Run passes with the statistics that they ask for."""
        module = self.module()
        context = self.context(module, *items, **options)
        with torch.no_grad():
            changed = [item.run(module, context) for item in items]
        module.recompile()
        return module, context, changed


def told(context: Context, by: str) -> list[Decision]:
    """What a pass decided."""
    return [d for d in context.decisions if d.by == by]


def kinds_asked(item: Pass, hand: Hand) -> Iterable[tuple[str, str]]:
    """(value, statistic) of each request of a pass."""
    module = hand.module()
    context = Context(sample=Sample(()), batches=[], plan=hand.plan)
    return [(r.node.name, r.kind) for r in item.statistics(module, context)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
