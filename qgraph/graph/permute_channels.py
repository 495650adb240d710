# SPDX-License-Identifier: Apache-2.0
"""Reordering the channels that a linear layer or convolution contracts over.

Its output does not depend on their order if the columns of its weight follow. The order of the
values is changed where they are made, if that costs nothing and nobody else looks (rows of the
linear layer before an elementwise function), and else on the quantized branch by a gather.

A layer norm cannot be reordered by its weights: ``P LN(x; g, b) = LN(P x; P g, P b)``, so
permuting gamma and beta alone computes something else, and its input belongs to others too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.build import attribute, insert_buffer, insert_call, replace_tensor
from qgraph.graph.edges import Edge
from qgraph.graph.ops import ELEMENTWISE, OpKind, argument, kind

aten = torch.ops.aten

_SCALAR = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.dropout.default})


@dataclass(frozen=True, slots=True)
class Fold:
    """A linear layer, and the elementwise values between it and the consumers."""

    linear: Node
    between: tuple[Node, ...]


def find_fold(value: Node, consumers: list[Node]) -> Fold | str:
    """Where the order of `value` can be changed for nothing, or why nowhere."""
    if extra := [user for user in value.users if user not in consumers]:
        return f"{value.name} is also read by {extra[0].name}"
    between, node = [value], value
    while node is value or not _makes_channels(node):
        reason = _no_elementwise(node)
        if reason:
            return reason
        node = node.args[0]  # type: ignore[assignment]
        if len(node.users) != 1:
            return f"{node.name} has other readers"
        between.append(node)
    if any(isinstance(a, Node) and a.op != "get_attr" for a in node.args[1:]):
        return f"the weight of {node.name} is computed"
    return Fold(node, tuple(between))


def _makes_channels(node: Node) -> bool:
    """Whether the rows of the node's weight are the channels of its value."""
    return kind(node) is OpKind.LINEAR or (kind(node) is OpKind.CONV and argument(node, 6) == 1)


def _no_elementwise(node: Node) -> str:
    """Why a node is not a function of each element of its only input, or ''."""
    if kind(node) is OpKind.NORM:
        return f"{node.name} is a norm: its weights cannot reorder the value that it divides"
    alone = [a for a in node.args if isinstance(a, Node)] == list(node.args[:1])
    unary = node.target in ELEMENTWISE or node.target in _COPIES
    if alone and (unary or node.target in _SCALAR):
        return ""
    return f"{node.name} is neither linear nor elementwise"


def apply_fold(module: GraphModule, fold: Fold, order: Tensor) -> None:
    """Permute the rows of the linear layer: its output becomes ``y[..., order]``."""
    for position in (1, 2):
        if position < len(fold.linear.args) and isinstance(fold.linear.args[position], Node):
            edge = Edge(fold.linear, (position,))
            target = str(edge.source.target)
            replace_tensor(module, edge, attribute(module, target)[order], target)


def insert_gather(
    module: GraphModule, value: Node, consumers: list[Edge], order: Tensor, axis: int = -1
) -> Node:
    """Let these edges read the value with reordered channels; other readers keep the value."""
    following = value.next
    while following.op in {"placeholder", "get_attr"}:
        following = following.next
    index = insert_buffer(module, f"{value.name}_order", order, before=following)
    moved = insert_call(
        module, aten.index_select.default, value, axis, index, like=value, before=following
    )
    for edge in consumers:
        edge.redirect(moved)
    return moved


def permute_columns(module: GraphModule, consumer: Node, order: Tensor) -> None:
    """Let the consumer's weight meet ``x[..., order]``; tied readers keep the old weight."""
    edge = Edge(consumer, (1,))
    target = str(edge.source.target)
    replace_tensor(module, edge, attribute(module, target)[:, order], target)
