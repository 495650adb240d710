# SPDX-License-Identifier: Apache-2.0
"""Regions of chains and fans drawn at random: blocks, stages, shared weights, wide cuts."""

from __future__ import annotations

import itertools
import operator
import random
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.graph.extract import extract
from qgraph.graph.ops import product
from qgraph.graph.regions import GRANULARITIES, Region, cut_points, find_regions
from tests.graph.sketch import Sketch, aten

WIDTH = 4
SEEDS = range(25)


def calls_of(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "call_function"]


def chain(names: list[str], classes: dict[str, str] | None = None) -> GraphModule:
    """Linears one after the other, each in the module of its name."""
    s = Sketch()
    x = s.input(3, WIDTH, free=1)
    for name in names:
        x = s.linear(x, WIDTH, name=name)
        if classes is not None:
            stack = x.meta["nn_module_stack"]
            x.meta["nn_module_stack"] = {p: (p, classes[p]) for p in stack}
        x = s.call(aten.relu.default, x, within=name)
    return s.returns(x)


def prefixes(name: str) -> list[str]:
    return list(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))


def container(name: str, names: list[str], classes: dict[str, str]) -> str:
    """Innermost numbered module around a layer with two layers or more and a like sibling."""
    known = {p for each in names for p in prefixes(each) if p.split(".")[-1].isdigit()}
    for inner in reversed([p for p in prefixes(name) if p in known]):
        parent = inner.rpartition(".")[0]
        like = [
            p for p in known
            if p != inner and p.rpartition(".")[0] == parent and classes[p] == classes[inner]
        ]  # fmt: skip
        if like and sum(inner in prefixes(each) for each in names) > 1:
            return inner
    return ""


def runs(labels: list[str]) -> list[int]:
    """Lengths of runs of one label; what has none stands alone."""
    keys = [label or str(at) for at, label in enumerate(labels)]
    return [len(list(members)) for _, members in itertools.groupby(keys)]


def sizes(regions: list[Region]) -> list[int]:
    return [len(r.weights) for r in regions]


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_are_runs_of_layers_in_the_innermost_repeated_module(seed):
    draw = random.Random(seed)
    tops, names = draw.choice([["a"], ["a", "b"], ["a", "b.c"]]), []
    for _ in range(draw.randint(4, 9)):
        parts = [draw.choice(tops), draw.choice("01"), *draw.choices(["x", "0", "1"], k=2)]
        names.append(".".join(parts[: draw.randint(2, 4)]))
    names.sort(key=lambda name: (name.split(".")[:2], draw.random()))
    unlike = draw.random() < 0.3
    paths = {p for name in names for p in prefixes(name)}
    classes = {p: draw.choice("AB") if unlike else "A" for p in sorted(paths)}
    labels = [container(name, names, classes) for name in names]
    module = chain(names, classes)
    found = find_regions(module, "block")
    assert sizes(found) == runs(labels)
    stages = [label.rpartition(".")[0] for label in labels]
    assert sizes(find_regions(module, "stage")) == runs(stages)
    assert sizes(find_regions(module, "layer")) == [1] * len(names)
    at = 0
    for region in found:
        inside = [name.split(".") for name in names[at : at + len(region.weights)]]
        at += len(region.weights)
        shared = [p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*inside))]  # noqa: B905
        assert region.name == (".".join(shared) or region.nodes[-1])


def test_stages_of_different_parents_stay_apart() -> None:
    names = [f"{side}.{at}.{leaf}" for side in ("down", "up") for at in (0, 1) for leaf in "pq"]
    found = find_regions(chain(names), "stage")
    assert [(r.name, len(r.weights)) for r in found] == [("down", 4), ("up", 4)]
    assert sizes(find_regions(chain(names), "block")) == [2, 2, 2, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_of_one_weight_are_joined_while_few_weights_lie_between(seed):
    draw = random.Random(seed)
    names = draw.choices(["p", "q", "r", "s", "t", "u", "v"][: draw.randint(3, 7)], k=9)
    limit = draw.randint(1, 5)
    groups = [[name] for name in names]
    for name in dict.fromkeys(names):
        first, last = names.index(name), len(names) - 1 - names[::-1].index(name)
        starts = [sum(map(len, groups[:at])) for at in range(len(groups))]
        inside = [
            at for at, start in enumerate(starts)
            if start <= last and start + len(groups[at]) > first
        ]  # fmt: skip
        joined = [each for at in inside for each in groups[at]]
        if len(set(joined)) <= limit:
            groups[inside[0] : inside[-1] + 1] = [joined]
    found = find_regions(chain(names), max_products=limit)
    assert sizes(found) == [len(group) for group in groups]
    assert sizes(find_regions(chain(names), "block")) == [1] * 9


def fan(seed: int) -> GraphModule:
    """Linears of recent values; what nobody reads is summed at the end."""
    draw, s = random.Random(seed), Sketch()
    values = [s.linear(s.input(3, WIDTH, free=1), WIDTH, name="first")]
    for number in range(draw.randint(6, 14)):
        x = s.linear(draw.choice(values[-draw.randint(1, 6) :]), WIDTH, name=f"layer{number}")
        values.append(s.call(aten.relu.default, x) if draw.random() < 0.3 else x)
    *rest, end = [v for v in values if not v.users]
    for value in rest:
        end = s.call(aten.add.Tensor, end, value)
    return s.returns(s.linear(end, WIDTH, name="last"))


def between(module: GraphModule, cuts: list[str]) -> list[int]:
    """How many weights lie between cuts, where there are any."""
    counts = [0]
    for node in calls_of(module):
        counts[-1] += product(node) is not None
        if node.name in cuts:
            counts.append(0)
    return [count for count in counts if count]


def chunks(counts: list[int]) -> list[int]:
    found: list[int] = []
    for count in counts:
        if found and found[-1] + count <= 4:
            found[-1] += count
        else:
            found.append(count)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_what_holds_too_many_weights_is_cut_where_two_three_or_four_values_are_live(seed):
    module = fan(seed)
    closed = between(module, cut_points(module))
    assert sizes(find_regions(module, "block")) == closed
    for limit in (1, 2, 4, 6):
        wanted: list[int] = []
        at = 0
        weights = [n.name for n in calls_of(module) if product(n)]
        for count in closed:
            members, parts = weights[at : at + count], [count]
            at += count
            for width in (2, 3, 4):
                if count <= limit:
                    break
                cuts, inner = cut_points(module, width=width), [0]
                for node in calls_of(module):
                    inner[-1] += node.name in members
                    if node.name in cuts:
                        inner.append(0)
                parts = chunks([each for each in inner if each])
                if all(part <= limit for part in parts):
                    break
            wanted += parts
        assert sizes(find_regions(module, max_products=limit)) == wanted


def parallel(count: int) -> GraphModule:
    """A linear, and so many that read it, joined."""
    s = Sketch()
    x = s.linear(s.input(3, WIDTH, free=1), WIDTH, name="first")
    values = [s.linear(x, WIDTH, name=f"side{i}") for i in range(count)]
    return s.returns(s.linear(s.call(aten.cat.default, values, 1), WIDTH, name="last"))


def test_up_to_twelve_weights_stay_together_unless_told_otherwise() -> None:
    assert sizes(find_regions(parallel(12))) == [1, 12, 1]
    assert max(sizes(find_regions(parallel(13)))) < 13


def test_inputs_are_named_in_the_order_they_are_made() -> None:
    s = Sketch()
    second, first = s.input(3, WIDTH, name="z"), s.input(3, WIDTH, name="a")
    early = s.call(aten.relu.default, first)
    late = s.call(aten.add.Tensor, early, second)
    mixed = s.call(aten.add.Tensor, s.linear(late, WIDTH, name="fc"), early)
    module = s.returns(s.call(aten.add.Tensor, mixed, first))
    (region,) = find_regions(module, "layer")
    assert region.inputs == ("z", "a")
    for each in find_regions(module, "subblock"):
        order = [n.name for n in module.graph.nodes]
        assert list(each.inputs) == sorted(each.inputs, key=order.index)


def test_constants_times_values_and_tables_are_weights_and_starts_move_what_follows() -> None:
    s = Sketch()
    x = s.call(aten.exp.default, s.input(3, WIDTH))
    left = s.call(aten.matmul.default, s.stored(torch.ones(WIDTH, 3)), x)
    both = s.call(aten.matmul.default, x, left)
    at = s.input(3, name="at", dtype=torch.int64)
    table = s.call(aten.embedding.default, s.stored(torch.ones(9, WIDTH), "table"), at)
    module = s.returns(s.call(aten.add.Tensor, both, table))
    weights = [name for r in find_regions(module) for name in r.weights]
    assert weights == [left.name, table.name]
    moves = {name for r in find_regions(module) for name in r.moving}
    assert x.name not in moves
    assert x.name not in cut_points(module)
    begun = frozenset({x.name})
    assert x.name in cut_points(module, starts=begun)
    layers = find_regions(module, "layer", starts=begun)
    assert x.name in {name for r in find_regions(module, "subblock", starts=begun)
                      for name in (*r.moving, *r.nodes)}  # fmt: skip
    assert [name for r in layers for name in r.weights] == weights


def split_net(seed: int) -> GraphModule:
    """Linears in drawn modules, with parts of values that are taken when they are needed."""
    draw, s = random.Random(seed), Sketch()
    values, tuples = [s.input(3, WIDTH, free=1)], []
    for number in range(draw.randint(5, 11)):
        within, x = draw.choice(["a.0", "b.0", "c"]), draw.choice(values[-2:])
        what = draw.choice(["linear", "linear", "split", "take", "take", "mul"])
        if what == "split":
            wide = s.linear(x, 2 * WIDTH, name=f"{within}.{number}")
            if draw.random() < 0.3:
                wide = s.call(aten.cat.default, [values[0], values[0]], 1)
            tuples.append(s.call(aten.split.Tensor, wide, WIDTH, 1, within=within))
        elif what == "take" and tuples:
            at = draw.randrange(2)
            values.append(s.call(operator.getitem, draw.choice(tuples), at, within=within))
        elif what == "mul":
            values.append(s.call(aten.mul.Tensor, x, draw.choice(values), within=within))
        else:
            values.append(s.linear(x, WIDTH, name=f"{within}.{number}"))
    return s.returns(s.linear(values[-1], 2, name="last"), *[v for v in values if not v.users])


@pytest.mark.parametrize("seed", range(16))
def test_regions_read_inputs_and_what_regions_before_give_and_run_as_the_graph_does(seed):
    module = split_net(seed)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
    wanted = module(x)
    for granularity in GRANULARITIES:
        values = {"x": x}
        for region in find_regions(module, granularity, max_products=2):
            assert set(region.inputs) <= set(values)
            part = extract(module, region.inputs, region.outputs)
            made = part(*(values[name] for name in region.inputs))
            values.update(zip(region.outputs, made, strict=True))
        ends: Any = module.graph.output_node().args[0]
        pairs = [(ends, wanted)] if isinstance(ends, Node) else zip(ends, wanted, strict=True)
        assert all(torch.equal(values[end.name], want) for end, want in pairs)
