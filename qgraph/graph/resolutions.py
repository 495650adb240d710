# SPDX-License-Identifier: Apache-2.0
"""Resolution levels of a graph: 0 is the finest resolution that a product computes at.

Levels are ranks and not logarithms of the resolution, so strides of 3 or 4 and odd sizes need no
case; resolutions closer than `SAME_LEVEL` are one level, because odd sizes round (125 against 126).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.ops import OpKind, constants, kind, product

aten = torch.ops.aten
Size = tuple[int, int]
SAME_LEVEL = 1.3

_SPATIAL = frozenset({
    OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.MAX_POOL, OpKind.POOL, OpKind.RESIZE,
})  # fmt: skip
# Their last two axes need not be rows and columns any more: tokens, heads, attention maps.
_SCRAMBLES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.movedim.int, aten.movedim.intlist,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels of all nodes that depend on an input.

    Attributes:
        level: own level; nodes without a resolution (tokens, pooled gates) take their deepest
            input's. A node behind no resolution at all is missing.
        deepest_before, deepest_after: deepest level among ancestors, descendants and the node.
        resolution: rows and columns of the nodes that have them.
        num_levels: number of levels.
    """

    level: dict[Node, int]
    deepest_before: dict[Node, int]
    deepest_after: dict[Node, int]
    resolution: dict[Node, Size]
    num_levels: int


def live_nodes(module: GraphModule) -> list[Node]:
    """Placeholders and calls that depend on an input, in graph order."""
    nodes = list(module.graph.nodes)
    fixed = constants(nodes)
    return [n for n in nodes if n.op in {"placeholder", "call_function"} and n not in fixed]


def _rows_and_columns(node: Node) -> Size | None:
    """The last two sizes of a 4-D value (the traced ones where symbolic)."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((v for v in value if isinstance(v, Tensor)), None)
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return None
    rows, columns = (
        int(size) if isinstance(size, int) else int(size.node.hint) for size in value.shape[-2:]
    )
    return rows, columns


def _resolution(node: Node, known: dict[Node, Size]) -> Size | None:
    """Rows and columns of a node, or None where its axes are not an image."""
    size = _rows_and_columns(node)
    if size is None or node.op == "placeholder":
        return size
    what, has_image = kind(node), any(i in known for i in node.all_input_nodes)
    if what in _SPATIAL:
        is_point = size == (1, 1)
        is_gate = is_point and (what is OpKind.POOL or not has_image)
        return None if is_gate else size
    if what in {OpKind.LINEAR, OpKind.MATMUL, OpKind.SOFTMAX} or node.target in _SCRAMBLES:
        return None
    return size if has_image else None


def _ranks(sizes: Iterable[Size]) -> list[float]:
    """One representative side length per level, finest first."""
    sides = sorted({math.sqrt(rows * columns) for rows, columns in sizes}, reverse=True)
    levels: list[float] = []
    for side in sides:
        if not levels or levels[-1] / side >= SAME_LEVEL:
            levels.append(side)
    return levels


def _nearest(levels: list[float], size: Size) -> int:
    side = math.sqrt(size[0] * size[1])
    return min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / side)))


def _deepest(
    nodes: list[Node], level: dict[Node, int], neighbours: Callable[[Node], list[Node]]
) -> dict[Node, int]:
    """The running maximum of levels along the graph, for nodes sorted along it."""
    found: dict[Node, int] = {}
    for node in nodes:
        values = [found[other] for other in neighbours(node) if other in found]
        if node in level:
            values.append(level[node])
        if values:
            found[node] = max(values)
    return found


def find_levels(module: GraphModule) -> Levels:
    """Find the levels of every live node in O(V + E); `num_levels` < 2 means a flat network.

    Shapes come from ``meta["val"]``, so the graph must be traced, not only symbolically scripted.
    """
    live = live_nodes(module)
    resolution: dict[Node, Size] = {}
    for node in live:
        size = _resolution(node, resolution)
        if size is not None:
            resolution[node] = size
    ranks = _ranks(resolution[n] for n in live if product(n) and n in resolution)
    level: dict[Node, int] = {}
    for node in live:
        if node in resolution and ranks:
            level[node] = _nearest(ranks, resolution[node])
        else:
            inherited = [level[i] for i in node.all_input_nodes if i in level]
            if inherited:
                level[node] = max(inherited)
    members = set(live)
    return Levels(
        level=level,
        deepest_before=_deepest(live, level, lambda n: list(n.all_input_nodes)),
        deepest_after=_deepest(live[::-1], level, lambda n: [u for u in n.users if u in members]),
        resolution=resolution,
        num_levels=len(ranks),
    )
