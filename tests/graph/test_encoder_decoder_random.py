# SPDX-License-Identifier: Apache-2.0
"""Structure of randomly drawn networks against the definitions, by sets of ancestors."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.graph.encoder_decoder import Placement, Shape, Side, find_structure
from qgraph.graph.ops import OpKind, kind, product
from qgraph.graph.resolutions import Levels, find_levels
from tests.graph.sketch import Sketch, aten

MERGES = {OpKind.ADD, OpKind.CAT, OpKind.MUL}


def through(draw: random.Random, s: Sketch, x: Node, other: Node) -> Node:
    """Nothing, a function, a sum or a convolution on the way to a gate."""
    between = draw.choice(["", "exp", "add", "conv"])
    if between == "exp":
        return s.call(aten.exp.default, x)
    if between == "add":
        return s.call(aten.add.Tensor, x, other)
    return s.conv(x, 4, name=f"more{len(s.graph.nodes)}") if between == "conv" else x


def random_network(seed: int) -> GraphModule:
    """Convolutions, resizing, gates and merges of values of one size; all leaves are outputs."""
    draw, s = random.Random(seed), Sketch()
    values = [s.conv(s.input(2, 3, 16, 16), 4, name="first")]

    def of_size(like: Node) -> Node:
        size = like.meta["val"].shape
        return draw.choice([v for v in values if v.meta["val"].shape == size])

    for number in range(draw.randint(6, 13)):
        x, name = draw.choice(values[-3:]), f"layer{number}"
        side = x.meta["val"].shape[-1]
        what = draw.choice(
            ["conv", "conv", "down", "up", "grow", "add", "cat", "mul", "gate", "se"]
        )
        if what == "down" and side > 4:
            low = s.call(aten.max_pool2d.default, x, [2, 2])
            values.append(s.conv(low, 4, name=name) if draw.random() < 0.7 else low)
        elif what == "up" and side < 16:
            high = s.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
            values.append(
                s.call(aten.add.Tensor, high, of_size(high)) if draw.random() < 0.6 else high
            )
        elif what == "grow" and side < 16:
            weight = s.stored(torch.ones(4, 4, 2, 2), f"{name}_weight")
            high = s.call(aten.conv_transpose2d.input, x, weight, None, [2, 2])
            values.append(s.call(aten.add.Tensor, of_size(high), high))
        elif what in {"add", "mul"}:
            target = aten.add.Tensor if what == "add" else aten.mul.Tensor
            values.append(s.call(target, x, of_size(x)))
        elif what == "cat":
            values.append(s.conv(s.call(aten.cat.default, [of_size(x), x], 1), 4, name=name))
        elif what == "gate":
            way = through(draw, s, s.conv(x, 4, name=name), of_size(x))
            function = draw.choice([aten.sigmoid.default, aten.sigmoid.default, aten.relu.default])
            values.append(s.call(aten.mul.Tensor, of_size(x), s.call(function, way)))
        elif what == "se":
            point = s.call(aten.adaptive_avg_pool2d.default, x, [1, 1])
            factor = s.call(aten.sigmoid.default, s.conv(point, 4, 1, name=name))
            target = draw.choice([aten.add.Tensor, aten.mul.Tensor])
            values.append(s.call(target, draw.choice(values), factor))
        else:
            values.append(s.call(aten.relu.default, s.conv(x, 4, name=name)))
    return s.returns(*[v for v in values if not v.users])


def reached(node: Node, *, forward: bool) -> set[Node]:
    """All calls and inputs before or behind a node, itself among them."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        at = pending.pop()
        if at not in found and at.op in {"placeholder", "call_function"}:
            found.add(at)
            pending.extend(at.users if forward else at.all_input_nodes)
    return found


class Definition:
    """What the structure of a graph is, said node by node."""

    def __init__(self, module: GraphModule) -> None:
        self.levels: Levels = find_levels(module)
        self.level = self.levels.level
        self.nodes = [n for n in module.graph.nodes if n.op in {"placeholder", "call_function"}]
        self.products = [n for n in self.nodes if product(n)]
        self.before = {n: reached(n, forward=False) for n in self.nodes}
        self.deepest = {n: max(self.level[a] for a in self.before[n]) for n in self.nodes}

    def side(self, node: Node) -> Side:
        if self.deepest[node] > self.level[node]:
            return Side.DECODER
        last = self.levels.num_levels - 1
        return Side.BOTTLENECK if self.level[node] == last else Side.ENCODER

    def gated(self, node: Node) -> Node | None:
        """The product with an image that the op's output becomes a factor of."""
        if node not in self.levels.resolution:
            behind = reached(node, forward=True) & set(self.levels.resolution)
            first = min(behind, key=self.nodes.index)
            return first if kind(first) is OpKind.MUL else None
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.target is aten.sigmoid.default:
            return next((u for u in user.users if kind(u) is OpKind.MUL), None)
        return None if product(user) or kind(user) in MERGES else self.gated(user)

    def placed(self, node: Node) -> tuple[int, Side]:
        behind = reached(node, forward=True) - {node}
        if not behind & set(self.products):
            return self.level[node], Side.HEAD
        if not (self.before[node] - {node}) & set(self.products) and node in self.levels.resolution:
            return self.level[node], Side.STEM
        target = self.gated(node)
        return (self.level[node], self.side(node)) if target is None else (
            self.level[target], Side.GATE
        )  # fmt: skip

    def crosses(self, node: Node) -> bool:
        if product(node):
            return kind(node) is OpKind.CONV_TRANSPOSE
        if kind(node) in MERGES:
            return False
        inputs = node.all_input_nodes
        if any(self.level[i] != self.level[node] for i in inputs):
            return True
        return len(inputs) == 1 and self.crosses(inputs[0])

    def is_skip(self, node: Node) -> bool:
        if kind(node) not in MERGES or node not in self.levels.resolution:
            return False
        level = self.level[node]
        plain = [i for i in node.all_input_nodes if self.level[i] == self.deepest[i] == level]
        return bool(plain) and any(self.deepest[i] > level for i in node.all_input_nodes)

    def is_cut(self, node: Node) -> bool:
        joins = kind(node) in {OpKind.ADD, OpKind.CAT}
        return self.is_skip(node) or (joins and any(map(self.crosses, node.all_input_nodes)))

    def touching(self, node: Node) -> set[Node]:
        """The connected part of one side and level around a node, cut at merges of levels."""

        def alike(a: Node, b: Node) -> bool:
            return (self.side(a), self.level[a]) == (self.side(b), self.level[b])

        found, pending = {node}, [node]
        while pending:
            at = pending.pop()
            near = [] if self.is_cut(at) else [i for i in at.all_input_nodes if i in self.level]
            near += [u for u in at.users if u in self.level and not self.is_cut(u)]
            for other in near:
                if other not in found and alike(at, other):
                    found.add(other)
                    pending.append(other)
        return found

    def placements(self) -> dict[str, Placement]:
        places = {n: self.placed(n) for n in self.products}
        parts: dict[str, list[set[Node]]] = {}
        blocks: dict[Node, str] = {}
        apart = {Side.STEM, Side.HEAD, Side.GATE}
        ladder = [n for n in self.products if places[n][1] not in apart]
        for node in ladder:
            known = parts.setdefault(f"{self.side(node).value[0].upper()}{self.level[node]}", [])
            if not any(node in part for part in known):
                known.append(self.touching(node))
        for name, known in parts.items():
            for number, part in enumerate(known):
                label = f"{name}.{number}" if len(known) > 1 else name
                blocks |= {n: label for n in ladder if n in part}
        return {
            n.name: Placement(level, side, blocks.get(n, str(side)))
            for n, (level, side) in places.items()
        }

    def nearest(self, node: Node, *, forward: bool) -> set[Node]:
        if product(node):
            return {node}
        further = node.users if forward else node.all_input_nodes
        return {p for n in further if n in self.level for p in self.nearest(n, forward=forward)}

    def skips(self) -> list[tuple[int, str, set[str], set[str]]]:
        found = []
        for node in filter(self.is_skip, self.nodes):
            level = self.level[node]
            plain = [i for i in node.all_input_nodes if self.deepest[i] == level]
            behind = {p for i in plain for p in self.nearest(i, forward=False)}
            sources = {p for p in behind if self.level[p] == level} or behind
            sinks = {
                p for u in node.users if u in self.level for p in self.nearest(u, forward=True)
            }
            found.append((level, node.name, {p.name for p in sources}, {p.name for p in sinks}))
        return found


@pytest.mark.parametrize("seed", range(60))
def test_random_networks_are_structured_as_defined(seed):
    module = random_network(seed)
    definition, found = Definition(module), find_structure(module)
    if definition.levels.num_levels < 2:
        assert found.shape is Shape.FLAT
        return
    wanted = definition.placements()
    assert found.placements == wanted
    assert list(found.placements) == [n.name for n in definition.products]
    skips = [(p.level, p.merge, set(p.sources), set(p.sinks)) for p in found.skips]
    assert skips == definition.skips()
    for pair in found.skips:
        assert len(set(pair.sources)) == len(pair.sources)
        assert len(set(pair.sinks)) == len(pair.sinks)
    by_side = {s: {p.level for p in wanted.values() if p.side is s} for s in Side}
    decoder = by_side[Side.DECODER]
    assert found.shape is (Shape.ENCODER_DECODER if decoder else Shape.PLAIN)
    lonely = decoder - by_side[Side.ENCODER] - by_side[Side.STEM]
    assert [n.split(" have")[0] for n in found.notes if "have no encoder" in n] == (
        [f"decoder levels {sorted(level or 0 for level in lonely)}"] if lonely else []
    )
    assert any(n.startswith("no skip") for n in found.notes) is (bool(decoder) and not skips)
    assert found.num_levels == definition.levels.num_levels


@pytest.mark.parametrize("seed", range(12))
def test_pseudo_levels_follow_the_longest_path_of_random_graphs(seed):
    draw, s = random.Random(seed), Sketch()
    values = [s.input(2, 6, 4)]
    for number in range(draw.randint(2, 11)):
        x = draw.choice(values[-2:])
        values.append(
            s.linear(x, 4, name=f"fc{number}") if draw.random() < 0.75
            else s.call(aten.add.Tensor, x, draw.choice(values))
        )  # fmt: skip
    module = s.returns(*[v for v in values if not v.users])
    found = find_structure(module)
    products = [n for n in module.graph.nodes if product(n)]

    def depth(node: Node) -> int:
        inputs = [i for i in node.all_input_nodes if i.op != "get_attr"]
        return int(product(node) is not None) + max(map(depth, inputs), default=0)

    longest = max(map(depth, products), default=1)
    for node in products:
        place = Fraction(depth(node) - 1, max(longest - 1, 1))
        level = int(min(place, 1 - place) * 8)
        near = [reached(node, forward=way) & set(products) - {node} for way in (False, True)]
        side = Side.ENCODER if 2 * place < 1 else Side.DECODER
        side = Side.BOTTLENECK if level == 4 else side
        block = f"{side.value[0].upper()}{level}"
        if not near[0] or not near[1]:
            side = Side.STEM if near[1] else Side.HEAD
            block = str(side)
        assert found.placements[node.name] == Placement(level, side, block)
    assert len(found.placements) == len(products)
