# SPDX-License-Identifier: Apache-2.0
"""Scaling the channels that a linear layer contracts over: ``x / r`` meets ``W diag(r)``.

With powers of two every product is the same float, so the layer's output is bit for bit the same.
The division is folded into what makes the value if that commutes with it and nobody else looks: a
layer norm's gamma and beta, or the rows of a linear layer before a ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.build import attribute, insert_buffer, insert_call, replace_tensor
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind, kind

aten = torch.ops.aten

# f(x / r) = f(x) / r for r > 0
_HOMOGENEOUS = frozenset({
    aten.relu.default, aten.leaky_relu.default, aten.clone.default, aten.contiguous.default,
    aten.dropout.default,
})  # fmt: skip


def find_scaled_source(value: Node, consumers: list[Node]) -> Node | str:
    """The layer norm or linear layer whose channels can be scaled instead, or why there is none."""
    if extra := [user for user in value.users if user not in consumers]:
        return f"{value.name} is also read by {extra[0].name}"
    node = value
    while node.target in _HOMOGENEOUS:
        node = node.args[0]  # type: ignore[assignment]
        if len(node.users) != 1:
            return f"{node.name} has other readers"
    if node.target is aten.layer_norm.default:
        shape, stored = node.args[1], [a for a in node.args[2:] if isinstance(a, Node)]
        if len(stored) == 2 and isinstance(shape, (list, tuple)) and len(shape) == 1:
            return node if all(a.op == "get_attr" for a in stored) else f"{node.name}: computed"
        return f"{node.name} has no gamma and beta over one axis"
    if kind(node) is OpKind.LINEAR:
        stored = [a for a in node.args[1:] if isinstance(a, Node)]
        return node if all(a.op == "get_attr" for a in stored) else f"{node.name}: computed"
    return f"{node.name} does not commute with a scale"


def scale_source(module: GraphModule, source: Node, factor: Tensor) -> None:
    """Multiply the channels of a layer norm or linear layer by `factor` [C]."""
    positions = (2, 3) if source.target is aten.layer_norm.default else (1, 2)
    for position in positions:
        if position < len(source.args) and isinstance(source.args[position], Node):
            edge = Edge(source, (position,))
            target = str(edge.source.target)
            values = attribute(module, target)
            shaped = factor if values.ndim == 1 else factor[:, None]
            replace_tensor(module, edge, values * shaped, target)


def insert_scale(module: GraphModule, value: Node, consumers: list[Edge], factor: Tensor) -> Node:
    """Let these edges read ``value * factor``; all other readers keep the value."""
    following = value.next
    while following.op in {"placeholder", "get_attr"}:
        following = following.next
    stored = insert_buffer(module, f"{value.name}_factor", factor, before=following)
    scaled = insert_call(module, aten.mul.Tensor, value, stored, like=value, before=following)
    for edge in consumers:
        edge.redirect(scaled)
    return scaled


def scale_columns(module: GraphModule, consumer: Node, factor: Tensor) -> None:
    """Multiply the columns of the consumer's weight; tied readers keep the old weight."""
    edge = Edge(consumer, (1,))
    target = str(edge.source.target)
    replace_tensor(module, edge, attribute(module, target) * factor, target)
