# SPDX-License-Identifier: Apache-2.0
"""The parts of a detector: neck outputs, box and class branches, last layers, shared weights.

Two reachability sweeps from the outputs say it all: what only boxes depend on is the regression
branch, what only classes depend on the classification branch, and the last values that both
depend on are the neck's outputs. Weights read at several pyramid levels are one tensor.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from qgraph.graph.ignore import names_of
from qgraph.graph.ops import OpKind, argument, constants, is_float, kind, product
from qgraph.graph.tensors import weight_keys

aten = torch.ops.aten
Globs = tuple[str, ...]
_PROBABILITIES = frozenset({aten.sigmoid.default, aten.softmax.int, aten._softmax.default})
BOX = 4


@dataclass(frozen=True, slots=True)
class DetectionHeads:
    """Where a detector's parts lie; all are sets or lists of nodes of one graph.

    Attributes:
        boxes, classes: values that the model gives as boxes, as class scores; what a single
            concatenation joins is listed apart.
        others: further outputs, such as one quality logit per box.
        regression, classification: nodes that only the one kind of output depends on.
        head: both, and what only `others` depend on.
        necks: the last values that both kinds depend on.
        last: products of the head without a product behind them.
        shared: names of weights -> the calls that read them, for weights with several.
        joined: values that hold boxes and class scores together.
    """

    boxes: tuple[Node, ...]
    classes: tuple[Node, ...]
    others: tuple[Node, ...]
    regression: frozenset[Node]
    classification: frozenset[Node]
    head: frozenset[Node]
    necks: tuple[Node, ...]
    last: tuple[Node, ...]
    shared: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    joined: frozenset[Node] = frozenset()

    def describe(self) -> str:
        """One line for reports."""
        return (
            f"{len(self.necks)} neck outputs, {_products(self.regression)} products for boxes,"
            f" {_products(self.classification)} for classes, {len(self.last)} last layers,"
            f" {len(self.shared)} weights shared over levels"
        )


def find_heads(
    module: GraphModule, *, boxes: Globs = (), classes: Globs = (), head: Globs = ()
) -> DetectionHeads | str:
    """The parts of a detector, or why the graph is none.

    An output is a box output if its last axis (of rows [B, N, 4]) or channel axis (of a map with
    exactly 4) holds four numbers, a class output if it has more than one number and is no box
    output. A row [B, N, 4 + C] made by one concatenation is taken apart.

    Args:
        module: a canonical graph, float or quantized.
        boxes, classes: globs on node names, module paths or parameter names of the values to take
            as outputs instead, where shapes do not tell (4 A channels of a map, say).
        head: globs of the nodes to take as the head instead of the branches found.
    """
    nodes = list(module.graph.nodes)
    parts, joined = _parts(module)
    named = _named(nodes, classes)
    found = _named(nodes, boxes) or [n for n in parts if _is_box(n) and n not in named]
    scores = named or [n for n in parts if n not in found and _width(n) > 1 and not _is_box(n)]
    if not found or not scores:
        missing = "box" if not found else "class"
        return f"no {missing} output among {[n.name for n in parts]}; name it by a glob"
    others = tuple(n for n in parts if n not in found and n not in scores)
    fixed = constants(nodes)
    box, score = (_ancestors(v) - fixed for v in (found, scores))
    either = box & score
    aside = _ancestors(others) - fixed - box - score
    regression, classification = frozenset(box - score), frozenset(score - box)
    members = frozenset(_named(nodes, head)) if head else regression | classification | aside
    necks = [n for n in nodes if n in either and any(u in members for u in n.users)]
    if not head and not any(product(n) for n in regression | classification):
        return "boxes and classes come out of the same layers: there is no head of their own"
    return DetectionHeads(
        boxes=tuple(found), classes=tuple(scores), others=others, regression=regression,
        classification=classification, head=members,
        necks=tuple(n for n in necks if is_float(n)), last=last_products(nodes, members),
        shared=shared_weights(module, nodes), joined=frozenset(_behind(joined)),
    )  # fmt: skip


def last_products(nodes: Iterable[Node], members: frozenset[Node]) -> tuple[Node, ...]:
    """Products among `members` with no product behind them on any path."""
    order = list(nodes)
    behind: dict[Node, bool] = {}
    for node in reversed(order):
        behind[node] = any(behind[u] or product(u) is not None for u in node.users)
    return tuple(n for n in order if n in members and product(n) is not None and not behind[n])


def shared_weights(module: GraphModule, nodes: Iterable[Node]) -> dict[str, tuple[Node, ...]]:
    """Weights that several products read, by canonical name, with these products in order."""
    keys = weight_keys(module)
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        what = product(node)
        source = None if what is None else node.args[what.weight]
        if isinstance(source, Node) and source.op == "get_attr":
            readers.setdefault(keys.get(str(source.target), str(source.target)), []).append(node)
    return {name: tuple(calls) for name, calls in readers.items() if len(calls) > 1}


def _parts(module: GraphModule) -> tuple[list[Node], list[Node]]:
    """Output values, rows of boxes and scores taken apart, and the concatenations that did it."""
    found: list[Node] = []
    joined: list[Node] = []
    for leaf in tree_leaves(module.graph.output_node().args[0]):
        if not isinstance(leaf, Node) or not is_float(leaf):
            continue
        inputs = _joined_inputs(leaf)
        if inputs:
            joined.append(inputs[0])
            found += inputs[1:]
        else:
            found.append(leaf)
    return list(dict.fromkeys(found)), joined


def _joined_inputs(leaf: Node) -> list[Node]:
    """A concatenation behind `leaf` that joins four numbers with others, and its inputs.

    Concatenations over levels, arithmetic and movement between are looked through.
    """
    pending, seen = [leaf], set()
    while pending:
        node = pending.pop()
        if node in seen or product(node) is not None:
            continue
        seen.add(node)
        if kind(node) is OpKind.CAT:
            values = node.all_input_nodes
            axis: Any = argument(node, 1)
            rank = node.meta["val"].ndim
            wide = axis % rank == (rank - 1 if rank == 3 else 1)
            sizes = [v.meta["val"].shape[axis] for v in values]
            if wide and rank > 2 and BOX in sizes and any(s != BOX for s in sizes):
                return [node, *values]
        pending.extend(i for i in node.all_input_nodes if is_float(i))
    return []


def _behind(starts: list[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node not in found and node.op != "output":
            found.add(node)
            pending.extend(node.users)
    return found


def _ancestors(values: Iterable[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = list(values)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _named(nodes: Iterable[Node], globs: Globs) -> list[Node]:
    if not globs:
        return []
    return [
        n for n in nodes if n.op == "call_function" and any(
            fnmatch.fnmatchcase(name, g) or fnmatch.fnmatchcase(name, f"{g}.*")
            for name in names_of(n) if name for g in globs
        )
    ]  # fmt: skip


def _width(node: Node) -> int:
    """Numbers per row or location: the last axis of rows, the channels of a map; 1 if unknown."""
    shape = node.meta["val"].shape
    size = shape[1] if len(shape) == 4 else shape[-1] if len(shape) else None
    return size if isinstance(size, int) else 1


def _is_box(node: Node) -> bool:
    return _width(node) == BOX and node.target not in _PROBABILITIES


def _products(nodes: Iterable[Node]) -> int:
    return sum(product(n) is not None for n in nodes)
