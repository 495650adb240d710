# SPDX-License-Identifier: Apache-2.0
"""Which rows of the value projection become which channels of an attention's output.

``softmax(...) V`` keeps the channels of V apart, so a permutation of channels inside each head
can be folded into the rows of the value projection, and nothing is left to do at run time. Data
movement is replayed on row numbers, so fused or oddly laid out heads need no cases of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qgraph.graph.build import attribute, replace_tensor
from qgraph.graph.edges import Edge
from qgraph.graph.ops import MOVES, SPLITS, OpKind, kind
from qgraph.graph.row_labels import concrete
from qgraph.graph.seen_through import producers
from qgraph.graph.sizes import shape_of


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """A value projection whose rows are the channels of a value, one to one.

    Attributes:
        linear: the projection (it may make queries and keys, too).
        rows: int64 [C], the row behind each channel.
        heads: int64 [C], the head of each channel; numbers need not be consecutive.
    """

    linear: Node
    rows: Tensor
    heads: Tensor

    def order(self, group: Tensor) -> Tensor:
        """int64 [C]: inside each head ascending by (group, channel); heads stay where they are."""
        order = torch.arange(len(group))
        for head in self.heads.unique():
            places = (self.heads == head).nonzero().squeeze(1)
            order[places] = places[group[places].argsort(stable=True)]
        return order


def find_value_heads(value: Node, consumers: list[Node]) -> ValueHeads | str:
    """The value projection behind `value`, the input of `consumers`, or why there is none."""
    if extra := [user for user in value.users if user not in consumers]:
        return f"{value.name} is also read by {extra[0].name}"
    after = list(producers(value))[::-1]
    attention = after[0]
    if kind(attention) is not OpKind.MATMUL or not isinstance(attention.args[1], Node):
        return f"{attention.name} is no attention product"
    before = list(producers(attention.args[1]))[::-1]
    linear = before[0]
    if kind(linear) is not OpKind.LINEAR or not _stored(linear):
        return f"the values of {attention.name} come from no stored linear layer"
    shared = [n.name for n in (*before[1:], *after[:-1]) if len(n.users) != 1]
    if shared:
        return f"{shared[0]} has other readers"
    try:
        seeds = torch.arange(concrete(shape_of(linear)[-1]))
        labels = _replayed(before, seeds.expand([concrete(s) for s in shape_of(linear)]))
        heads = labels.select(-2, 0)
        if not bool((labels == heads.unsqueeze(-2)).all()):
            return f"channels of {before[-1].name} differ between keys"
        shape = [concrete(s) for s in shape_of(attention)]
        rows = _replayed(after, heads.unsqueeze(-2).expand(shape)).reshape(-1, shape_of(value)[-1])
    except (RuntimeError, IndexError, TypeError) as error:
        return f"movement around {attention.name} cannot be replayed: {error}"
    return _checked(linear, rows, heads.reshape(-1, heads.shape[-1]))


def _checked(linear: Node, rows: Tensor, heads: Tensor) -> ValueHeads | str:
    first = rows[0]
    if not bool((rows == first).all()):
        return "channels differ between tokens"
    if first.unique().numel() != first.numel():
        return f"rows of {linear.name} serve several heads"
    owner = {row: number for number, members in enumerate(heads.tolist()) for row in members}
    return ValueHeads(linear, first, torch.tensor([owner[row] for row in first.tolist()]))


def apply_value_heads(module: GraphModule, found: ValueHeads, order: Tensor) -> None:
    """Permute the projection's rows so that the value becomes ``x[..., order]``."""
    for position in (1, 2):
        if position < len(found.linear.args) and isinstance(found.linear.args[position], Node):
            edge = Edge(found.linear, (position,))
            target = str(edge.source.target)
            old = attribute(module, target)
            new = old.clone()
            new[found.rows] = old[found.rows[order]]
            replace_tensor(module, edge, new, target)


def _stored(linear: Node) -> bool:
    return all(a.op == "get_attr" for a in linear.args[1:] if isinstance(a, Node))


def _replayed(path: Sequence[Node], labels: Tensor) -> Tensor:
    """Labels of the first node of the path, moved along it."""
    for node in path[1:]:
        source = node.args[0]
        assert isinstance(source, Node)
        if source.target in SPLITS:
            parts: Any = _call(source, labels)
            labels = parts[node.args[1]]
        elif node.target in MOVES:
            labels = _call(node, labels)
    return labels


def _call(node: Node, labels: Tensor) -> Any:
    def value_of(item: Node) -> Any:
        if item is node.args[0]:
            return labels
        value = item.meta.get("val")
        if isinstance(value, Tensor):
            msg = f"{node.name} moves by {item.name}"
            raise TypeError(msg)
        return concrete(value)

    args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    return node.target(*args, **kwargs)  # type: ignore[operator]
