# SPDX-License-Identifier: Apache-2.0
"""Which activations of a graph are stored, how wide, and for how long.

A value is stored once, at the most bits that any of its readers asks for. Moves, concatenations and
quantizers hand values on and store nothing; a result that only one elementwise function reads (a
convolution before its ReLU) never leaves the kernel. The same rules read a plan before it is
written into the graph and the graph afterwards, so both give the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.dialect import is_dequantize, is_quantize
from qgraph.graph.edges import Edge, out_edges
from qgraph.graph.ops import OpKind, constants, kind

Width = Callable[[Edge], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One stored activation.

    Attributes:
        node: its producer.
        elements: for one sample; symbolic sizes as traced.
        bits: its width, or None for float.
        born, last_read: steps of the graph's order; it is alive from one through the other.
        leaves: the edges that read it, seen through what hands it on.
    """

    node: Node
    elements: int
    bits: int | None
    born: int
    last_read: int
    leaves: tuple[Edge, ...]


def hands_on(node: Node) -> bool:
    """Whether a node passes values on without storing them anew."""
    return is_quantize(node) or is_dequantize(node) or kind(node) in {OpKind.MOVE, OpKind.CAT}


def computes(node: Node, fixed: set[Node]) -> bool:
    """Whether a node makes a float tensor out of an input."""
    value = node.meta.get("val")
    if node.op != "call_function" or node in fixed or not isinstance(value, Tensor):
        return False
    return not hands_on(node) and value.is_floating_point()


def leaf_edges(node: Node, width: Width) -> Iterator[Edge]:
    """Edges that read a value, through moves and concatenations, up to the first quantized one."""
    pending = list(out_edges(node))
    seen: set[Node] = {node}
    while pending:
        edge = pending.pop()
        reader = edge.consumer
        if width(edge) is not None or kind(reader) not in {OpKind.MOVE, OpKind.CAT}:
            yield edge
        elif reader not in seen:
            seen.add(reader)
            pending.extend(out_edges(reader))


def stored_tensors(module: GraphModule, width: Width) -> list[Stored]:
    """All stored activations in graph order; `width` tells how many bits an edge reads."""
    nodes = list(module.graph.nodes)
    fixed, steps = constants(nodes), {node: i for i, node in enumerate(nodes)}
    last = _last_reads(nodes, steps)
    found = []
    for node in nodes:
        if not computes(node, fixed):
            continue
        leaves = tuple(
            sorted(leaf_edges(node, width), key=lambda e: (steps[e.consumer], str(e.path)))
        )
        if _is_fused(leaves, width):
            continue
        widths = [width(edge) for edge in leaves]
        bits = None if not widths or None in widths else max(w for w in widths if w is not None)
        found.append(
            Stored(
                node=node, elements=_elements(node), bits=bits, born=steps[node],
                last_read=last.get(node, steps[node]), leaves=leaves,
            )
        )  # fmt: skip
    return found


def _is_fused(leaves: tuple[Edge, ...], width: Width) -> bool:
    """Whether one elementwise function alone reads the value, in float."""
    return len(leaves) == 1 and kind(leaves[0].consumer) is OpKind.ELEMENTWISE and (
        width(leaves[0]) is None
    )  # fmt: skip


def _last_reads(nodes: list[Node], steps: dict[Node, int]) -> dict[Node, int]:
    """The last step that reads each value, through what hands it on."""
    sources: dict[Node, tuple[Node, ...]] = {}
    last: dict[Node, int] = {}
    for node in nodes:
        read = dict.fromkeys(s for i in node.all_input_nodes for s in sources.get(i, (i,)))
        for source in read:
            last[source] = steps[node]
        sources[node] = tuple(read) if node.op == "call_function" and hands_on(node) else (node,)
    return last


def _elements(node: Node) -> int:
    sizes = node.meta["val"].shape[1:]
    return math.prod(int(s) if isinstance(s, int) else int(s.node.hint) for s in sizes)
