# SPDX-License-Identifier: Apache-2.0
"""Move quantizers up to where values are made, so that codes travel instead of floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.formats import AffineEncoding
from qgraph.graph.build import insert_call, insert_move
from qgraph.graph.dialect import QUANTIZE, encoding_of, is_quantize
from qgraph.graph.edges import Edge
from qgraph.pipeline import Fact, Pass, Promise

aten = torch.ops.aten
# Moves that keep every element exactly once: quantizing before or after is the same work.
PERMUTING = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.roll.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default,
})  # fmt: skip


@dataclass(frozen=True)
class HoistQuantizers(Pass):
    """Swap ``quantize(move(x))`` to ``move(quantize(x))`` and drop ReLUs that a quantizer implies.

    Exact: per-tensor encoding is elementwise, so it commutes with movement; and where the
    zero point is the bottom code, clamping already does what the ReLU did.
    """

    name: ClassVar[str] = "hoist-quantizers"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        pending = [n for n in module.graph.nodes if n.target is QUANTIZE]
        while pending:
            node = pending.pop()
            if node._erased:  # a twin took its place meanwhile
                continue
            encoding = encoding_of(module, node)
            if not isinstance(encoding, AffineEncoding) or encoding.axis is not None:
                continue
            while step := self._step(module, node, encoding):
                node, changed = step, True
        if changed:
            module.graph.eliminate_dead_code()
        return changed

    def _step(self, module: GraphModule, node: Node, encoding: AffineEncoding) -> Node | None:
        source = node.args[0]
        assert isinstance(source, Node)
        if source.op != "call_function":
            return None
        if source.target is aten.relu.default and int(encoding.zero_point) == encoding.qmin:
            Edge(node, (0,)).redirect(source.args[0])  # type: ignore[arg-type]
        elif source.target in PERMUTING and all(is_quantize(user) for user in source.users):
            node = self._swap(module, node, source)
        else:
            return None
        if not source.users:  # to the next step it would be one who reads floats
            module.graph.erase_node(source)
        return node

    def _swap(self, module: GraphModule, node: Node, move: Node) -> Node:
        """``move -> quantize`` becomes ``quantize -> move``; returns the new quantize node."""
        value = move.args[0]
        assert isinstance(value, Node)
        twin = next((u for u in value.users if _same_quantizer(u, node)), None)
        if twin is None:
            twin = insert_call(module, QUANTIZE, value, *node.args[1:], like=node, before=move)
        elif move < twin:  # made for a move further down
            move.prepend(twin)
        _pull_up(twin)
        moved = insert_move(module, move, twin, before=node)
        node.replace_all_uses_with(moved)
        module.graph.erase_node(node)
        return twin


def _same_quantizer(candidate: Node, node: Node) -> bool:
    if candidate.target is not QUANTIZE or candidate is node:
        return False
    ours = [a.target if isinstance(a, Node) else a for a in node.args[1:]]
    theirs = [a.target if isinstance(a, Node) else a for a in candidate.args[1:]]
    return ours == theirs


def _pull_up(twin: Node) -> None:
    """Parameters of the old quantizer must be read before the new one."""
    for argument in twin.args[1:]:
        if isinstance(argument, Node) and twin < argument:
            twin.prepend(argument)
