# SPDX-License-Identifier: Apache-2.0
"""Encoder, bottleneck, decoder, skips, stem and heads of a traced graph, from its shapes alone.

A product is in the encoder while nothing before it was coarser and something after it is, in the
decoder once something before it was coarser, and in the bottleneck at the coarsest level. A skip is
a merge of a value that has never been deeper with one that came up. Networks of one resolution get
pseudo-levels, which rise towards their middle (Li et al., IEEE TGRS 2024, only for symmetric nets;
the rest is ours). Two passes over the graph, O(V + E).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from torch.fx import GraphModule, Node

from qgraph.graph.ops import OpKind, aten, kind, product
from qgraph.graph.resolutions import Levels, find_levels, live_nodes

PSEUDO_LEVELS = 4
_MERGES = frozenset({OpKind.ADD, OpKind.CAT, OpKind.MUL})
_GATES = frozenset({aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default})


class Side(StrEnum):
    """Where a product lies in an encoder-decoder network."""

    STEM = "stem"
    ENCODER = "encoder"
    BOTTLENECK = "bottleneck"
    DECODER = "decoder"
    HEAD = "head"
    GATE = "gate"
    FLAT = "flat"


class Shape(StrEnum):
    """What kind of network it is."""

    ENCODER_DECODER = "encoder-decoder"
    PLAIN = "plain"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one product lies.

    Attributes:
        level: resolution level (pseudo-level in a flat network); None where no image leads to it.
        side: its side.
        block: name of its block, for example E0, B4, D1.0, stem, head.
    """

    level: int | None
    side: Side
    block: str


@dataclass(frozen=True, slots=True)
class SkipPair:
    """A skip connection.

    Attributes:
        level: level of the merge.
        merge: name of the add, cat or mul.
        sources: products last before the merge on the skip side.
        sinks: products first after the merge.
    """

    level: int
    merge: str
    sources: tuple[str, ...]
    sinks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """The structure of a network.

    Attributes:
        shape: encoder-decoder, plain (only gets coarser) or flat (one resolution).
        num_levels: number of (pseudo-)levels.
        placements: one per product (convolution, linear, matmul), in graph order.
        skips: skip connections in graph order.
        notes: what was not as in a textbook network, in words.
    """

    shape: Shape
    num_levels: int
    placements: dict[str, Placement]
    skips: tuple[SkipPair, ...]
    notes: tuple[str, ...]

    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Names of the products of each block, in graph order."""
        found: dict[str, list[str]] = {}
        for name, placement in self.placements.items():
            found.setdefault(placement.block, []).append(name)
        return {block: tuple(names) for block, names in found.items()}


def find_structure(module: GraphModule) -> Structure:
    """Analyse a traced graph (shapes in ``meta["val"]``); the graph is not changed."""
    live = live_nodes(module)
    products = [node for node in live if product(node)]
    levels = find_levels(module)
    if levels.num_levels < 2:
        return _flat(live, products)
    borders = _borders(live, products)
    sides = {node: _side(node, levels) for node in live if node in levels.level}
    own_class = _own_class(products, levels, borders)
    blocks = _blocks(live, products, levels, sides, own_class=own_class)
    placements = {}
    for node in products:
        side = own_class.get(node, sides.get(node, Side.FLAT))
        level = _gated_level(node, levels) if side is Side.GATE else levels.level.get(node)
        placements[node.name] = Placement(level, side, blocks[node])
    skips = _skips(live, levels)
    has_decoder = any(p.side is Side.DECODER for p in placements.values())
    return Structure(
        Shape.ENCODER_DECODER if has_decoder else Shape.PLAIN,
        levels.num_levels,
        placements,
        skips,
        _notes(placements, skips),
    )


def _side(node: Node, levels: Levels) -> Side:
    level, before = levels.level[node], levels.deepest_before[node]
    if before > level:
        return Side.DECODER
    if level == levels.num_levels - 1:
        return Side.BOTTLENECK
    return Side.ENCODER


def _borders(live: list[Node], products: list[Node]) -> tuple[set[Node], set[Node]]:
    """Products without a product before them, and those without one after them."""
    is_product, members = set(products), set(live)
    has_before: set[Node] = set()
    for node in live:
        if any(i in is_product or i in has_before for i in node.all_input_nodes):
            has_before.add(node)
    has_after: set[Node] = set()
    for node in reversed(live):
        users = [u for u in node.users if u in members]
        if any(u in is_product or u in has_after for u in users):
            has_after.add(node)
    return is_product - has_before, is_product - has_after


def _own_class(
    products: list[Node], levels: Levels, borders: tuple[set[Node], set[Node]]
) -> dict[Node, Side]:
    """Stem, heads and gates: few weights, very sensitive, outside the ladders."""
    stems, heads = borders
    found: dict[Node, Side] = {}
    for node in products:
        if node in heads:
            found[node] = Side.HEAD
        elif node in stems and node in levels.resolution:
            found[node] = Side.STEM
        elif _gated(node, levels) is not None:
            found[node] = Side.GATE
    return found


def _gated(node: Node, levels: Levels) -> Node | None:
    """The product with an image that this op's output gates, or None.

    Either the op has no resolution (behind a global pool) and all that follows is multiplied into
    an image, or its output passes one chain into a sigmoid and then into a mul.
    """
    if node not in levels.resolution:
        return _pooled_gate(node, levels)
    current = node
    while len(current.users) == 1:
        current = next(iter(current.users))
        if current.target in _GATES:
            return next((u for u in current.users if kind(u) is OpKind.MUL), None)
        if product(current) or kind(current) in _MERGES:
            return None
    return None


def _pooled_gate(node: Node, levels: Levels) -> Node | None:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in levels.resolution:
                return user if kind(user) is OpKind.MUL else None
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def _gated_level(node: Node, levels: Levels) -> int | None:
    target = _gated(node, levels)
    return levels.level.get(node if target is None else target)


def _is_level_merge(node: Node, levels: Levels) -> bool:
    """Whether an add or cat joins a value that crosses a resolution change just before it."""
    return kind(node) in {OpKind.ADD, OpKind.CAT} and any(
        _crosses(source, levels) for source in node.all_input_nodes
    )


def _crosses(node: Node, levels: Levels) -> bool:
    """Whether a value changed its resolution since the last product or merge."""
    while node in levels.level and not product(node) and kind(node) not in _MERGES:
        inputs = [i for i in node.all_input_nodes if i in levels.level]
        if any(levels.level[i] != levels.level[node] for i in inputs):
            return True
        if len(inputs) != 1:
            return False
        node = inputs[0]
    return kind(node) is OpKind.CONV_TRANSPOSE


def _is_skip_merge(node: Node, levels: Levels) -> bool:
    """Whether a merge joins a value that has never been deeper with one that came up."""
    if kind(node) not in _MERGES or node not in levels.resolution:
        return False
    level = levels.level[node]
    inputs = [i for i in node.all_input_nodes if i in levels.level]
    before = [levels.deepest_before[i] for i in inputs]
    is_level = any(
        b == level and levels.level[i] == level for i, b in zip(inputs, before, strict=True)
    )
    return is_level and any(b > level for b in before)


def _blocks(
    live: list[Node],
    products: list[Node],
    levels: Levels,
    sides: dict[Node, Side],
    *,
    own_class: dict[Node, Side],
) -> dict[Node, str]:
    """Name the connected parts of equal side and level, cut at merges of levels."""
    root = {node: node for node in live}

    def find(node: Node) -> Node:
        while root[node] is not node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for node in live:
        is_cut = _is_level_merge(node, levels) or _is_skip_merge(node, levels)
        for source in node.all_input_nodes:
            if is_cut or source not in sides or node not in sides:
                continue
            if (sides[source], levels.level[source]) == (sides[node], levels.level[node]):
                root[find(node)] = find(source)
    labels: dict[Node, str] = {}
    parts: dict[str, list[Node]] = {}
    for node in products:
        if node in own_class or node not in sides:
            labels[node] = str(own_class.get(node, Side.FLAT))
            continue
        stem = f"{sides[node].value[0].upper()}{levels.level[node]}"
        parts.setdefault(stem, [])
        if find(node) not in parts[stem]:
            parts[stem].append(find(node))
    for node in products:
        if node not in labels:
            stem = f"{sides[node].value[0].upper()}{levels.level[node]}"
            many = len(parts[stem]) > 1
            labels[node] = f"{stem}.{parts[stem].index(find(node))}" if many else stem
    return labels


def _skips(live: list[Node], levels: Levels) -> tuple[SkipPair, ...]:
    """All skip pairs in graph order."""
    found = []
    for node in live:
        if not _is_skip_merge(node, levels):
            continue
        level = levels.level[node]
        skips = [i for i in node.all_input_nodes if levels.deepest_before.get(i) == level]
        behind = [p for skip in skips for p in _products_from(skip, is_forward=False)]
        sources = [p for p in behind if levels.level.get(p) == level] or behind
        sinks = _products_from(node, is_forward=True)
        found.append(
            SkipPair(
                level,
                node.name,
                tuple(dict.fromkeys(p.name for p in sources)),
                tuple(dict.fromkeys(p.name for p in sinks)),
            )
        )
    return tuple(found)


def _products_from(node: Node, *, is_forward: bool) -> list[Node]:
    """The nearest products behind (including the node) or after it."""
    found, seen = [], {node}
    pending = deque(node.users if is_forward else [node])
    while pending:
        current = pending.popleft()
        if product(current):
            found.append(current)
            continue
        further = current.users if is_forward else current.all_input_nodes
        pending.extend(n for n in further if n not in seen)
        seen.update(further)
    return found


def _notes(placements: dict[str, Placement], skips: tuple[SkipPair, ...]) -> tuple[str, ...]:
    """Say where the network leaves the textbook."""
    notes = []
    by_side = {
        side: {p.level for p in placements.values() if p.side is side and p.level is not None}
        for side in Side
    }
    decoder = by_side[Side.DECODER]
    lonely = sorted(decoder - by_side[Side.ENCODER] - by_side[Side.STEM])
    if lonely:
        notes.append(f"decoder levels {lonely} have no encoder products; tied by level only")
    if decoder and not skips:
        notes.append("no skip connections; decoder and encoder are tied by level only")
    unplaced = Counter(p.side for p in placements.values() if p.level is None)
    if unplaced:
        notes.append(f"{sum(unplaced.values())} products follow no image and have no level")
    return tuple(notes)


def _flat(live: list[Node], products: list[Node]) -> Structure:
    """Give pseudo-levels by position: floor(min(t, 1 - t) * 2D), t the longest-path fraction."""
    depth: dict[Node, int] = {}
    for node in live:
        before = [depth[i] for i in node.all_input_nodes if i in depth]
        depth[node] = max(before, default=-1) + (1 if product(node) else 0)
    last = max((depth[n] for n in products), default=0) or 1
    stems, heads = _borders(live, products)
    placements = {}
    for node in products:
        position = depth[node] / last
        level = int(min(position, 1 - position) * 2 * PSEUDO_LEVELS)
        if node in heads or node in stems:
            side = Side.HEAD if node in heads else Side.STEM
            placements[node.name] = Placement(level, side, str(side))
            continue
        side = Side.ENCODER if position < 0.5 else Side.DECODER
        if level == PSEUDO_LEVELS:
            side = Side.BOTTLENECK
        placements[node.name] = Placement(level, side, f"{side.value[0].upper()}{level}")
    notes = ("one resolution; pseudo-levels rise towards the middle of the network",)
    return Structure(Shape.FLAT, PSEUDO_LEVELS + 1, placements, (), notes)
