# SPDX-License-Identifier: Apache-2.0
"""Who pays for a stored value that several read, and what a unit of several products is called."""

from __future__ import annotations

import random

import pytest
from torch.fx import GraphModule, Node

from qgraph.graph.bit_units import (
    CARRIERS,
    Unit,
    Units,
    carriers,
    find_units,
    owners,
    stored_bytes,
)
from qgraph.graph.edges import Edge
from qgraph.graph.encoder_decoder import find_structure
from qgraph.graph.ops import kind, product
from qgraph.graph.plan import Plan, Role, Site
from tests.graph.sketch import Sketch, aten


def read(plan: Plan, node: Node, bits: int, *path: int) -> None:
    plan.add(Site(edge=Edge(node, path or (0,)), role=Role.ACTIVATION, kind=kind(node), bits=bits))


def layered(plan: Plan, *nodes: Node) -> None:
    for node in nodes:
        read(plan, node, 4)
        weight = Site(edge=Edge(node, (1,)), role=Role.WEIGHT, kind=kind(node), bits=4)
        plan.add(weight)


def units_of(module: GraphModule, plan: Plan) -> tuple[Units, dict[Node, Unit]]:
    units = find_units(module, plan, find_structure(module), (4, 4))
    return units, owners(units.units)


@pytest.mark.parametrize("pooled_first", [True, False])
@pytest.mark.parametrize("by", [1, 2])
def test_a_value_is_charged_to_its_reader_of_the_finest_level_then_to_the_first(pooled_first, by):
    s = Sketch()
    value = s.call(aten.relu.default, s.conv(s.input(2, 3, 8, 8), 4, name="stem"))

    def pooled() -> tuple[Node, Node]:
        pool = s.call(aten.max_pool2d.default, value, [by, by])
        return pool, s.conv(pool, 5, name="behind")

    if pooled_first:
        pool, behind = pooled()
    direct = s.conv(value, 6, name="direct")
    if not pooled_first:
        pool, behind = pooled()
    ends = [s.conv(each, 1, name=f"head{i}") for i, each in enumerate((direct, behind))]
    low = s.conv(s.call(aten.max_pool2d.default, direct, [2, 2]), 1, name="low")
    module, plan = s.returns(*ends, low), Plan()
    layered(plan, *(n for n in module.graph.nodes if product(n)))
    read(plan, pool, 4)
    _, owner = units_of(module, plan)
    pays = by == 1 and pooled_first
    pool_size = (4 * (8 // by) ** 2, 0)
    assert sorted(owner[behind].stored) == sorted([pool_size] + [(4 * 64, 0)] * pays)
    assert [each for each in owner[direct].stored if each == (4 * 64, 0)] == [(4 * 64, 0)] * (
        not pays
    )
    assert owner[direct].level == 0
    assert owner[behind].level == by - 1


@pytest.mark.parametrize(("others", "least"), [((), 0), ((6,), 6), ((6, 3), 6), ((3, 6), 6)])
@pytest.mark.parametrize("read_by_a_product", [True, False])
def test_widths_that_no_unit_decides_are_the_least_that_a_value_takes(
    others, least, read_by_a_product
):
    s = Sketch()
    value = s.conv(s.input(2, 3, 8, 8), 4, name="stem")
    ends = [s.call(aten.max_pool2d.default, value, [2, 2]) for _ in others]
    layer = s.conv(value, 5, name="layer")
    module, plan = s.returns(*ends, layer), Plan()
    if read_by_a_product:
        layered(plan, layer)
    for end, bits in zip(ends, others, strict=True):
        read(plan, end, bits)
    units, owner = units_of(module, plan)
    in_float = sum(4 * 16 * 32 for _ in ends) + 5 * 64 * 32
    if read_by_a_product:
        assert owner[layer].stored == [(4 * 64, least)]
        assert units.rest["activations"] == in_float / 8
        assert owner[layer].costs((4, 5))["activations"] == 4 * 64 * max(5, least) / 8
        assert owner[layer].costs((4, 7))["activations"] == 4 * 64 * 7 / 8
    else:
        assert units.rest["activations"] == (in_float + 4 * 64 * 32) / 8


def test_a_value_that_only_follows_fixed_widths_belongs_to_no_unit() -> None:
    s = Sketch()
    value = s.conv(s.input(2, 3, 8, 8), 4, name="stem")
    pool = s.call(aten.max_pool2d.default, value, [2, 2])
    module, plan = s.returns(pool), Plan()
    read(plan, pool, 6)
    units, _ = units_of(module, plan)
    assert units.units == ()
    assert units.rest["activations"] == (4 * 64 * 6 + 4 * 16 * 32) / 8


@pytest.mark.parametrize("fine_first", [True, False])
def test_a_unit_is_named_and_placed_by_its_first_product_whatever_the_plan_lists_first(fine_first):
    s = Sketch()
    value = s.call(aten.relu.default, s.conv(s.input(2, 3, 8, 8), 4, name="stem"))
    fine = lambda: s.conv(value, 4, name="fine")  # noqa: E731
    coarse = lambda: s.conv(value, 4, stride=2, name="coarse")  # noqa: E731
    first, second = (fine(), coarse()) if fine_first else (coarse(), fine())
    ends = [s.conv(each, 1, name=f"head{i}") for i, each in enumerate((first, second))]
    module, plan = s.returns(*ends), Plan()
    layered(plan, second, first)
    units, owner = units_of(module, plan)
    (unit,) = units.units
    assert owner[first] is owner[second] is unit
    assert unit.products == (first, second)
    assert unit.name == ("fine" if fine_first else "coarse")
    assert unit.level == (0 if fine_first else 1)
    assert unit.block == find_structure(module).placements[first.name].block
    assert unit.side is find_structure(module).placements[first.name].side
    assert unit.index == list(module.graph.nodes).index(first)
    plan = Plan()
    for node, bits in ((first, 4), (second, 5)):
        read(plan, node, bits)
    assert units_of(module, plan)[0].units[0].pinned == (8, 8)


def random_net(seed: int) -> tuple[GraphModule, Plan]:
    """Convolutions, pools, joins and sums, all of them planned at 8 bits where they can be."""
    draw, s = random.Random(seed), Sketch()
    values = [s.conv(s.input(2, 3, 16, 16), 4, name="stem")]
    for number in range(draw.randint(4, 9)):
        x = draw.choice(values[-3:])
        like = [v for v in values if v.meta["val"].shape == x.meta["val"].shape]
        what = draw.choice(["conv", "conv", "pool", "cat", "add", "relu"])
        if what == "pool" and x.meta["val"].shape[-1] > 2:
            values.append(s.call(aten.max_pool2d.default, x, [2, 2]))
        elif what == "cat":
            joined = s.call(aten.cat.default, [x, draw.choice(like)], 1)
            values.append(s.conv(joined, 4, name=f"join{number}") if number % 2 else joined)
        elif what == "add":
            values.append(s.call(aten.add.Tensor, x, draw.choice(like)))
        elif what == "relu":
            values.append(s.call(aten.relu.default, x))
        else:
            values.append(s.conv(x, 4, name=f"layer{number}"))
    module, plan = s.returns(*[v for v in values if not v.users]), Plan()
    for node in module.graph.nodes:
        if product(node) and draw.random() < 0.8:
            layered(plan, node)
        elif kind(node) in CARRIERS and draw.random() < 0.8:
            paths = [(0, 0), (0, 1)] if node.target is aten.cat.default else [(0,)]
            for path in paths:
                read(plan, node, 8, *path)
    return module, plan


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("bits", [8, 11])
def test_at_one_width_units_and_the_rest_cost_what_the_plan_stores(seed, bits):
    module, plan = random_net(seed)
    units, _ = units_of(module, plan)
    for unit in units.units:
        unit.assign((3, bits))
    for sites, readers in carriers(plan, units.units).values():
        for site in sites:
            site.bits = bits if readers else 8
    charged = sum(unit.costs((3, bits))["activations"] for unit in units.units)
    assert charged + units.rest["activations"] == stored_bytes(module, plan)
    sizes = sum(unit.costs((3, bits))["size"] for unit in units.units)
    weights = [n.args[1].meta["val"].numel() for n in module.graph.nodes if product(n)]
    planned = [s.value.meta["val"].numel() for s in plan.weights()]
    assert units.floats["size"] == 4 * sum(weights)
    assert (sizes, units.rest["size"]) == (sum(planned) * 3 / 8, 4 * (sum(weights) - sum(planned)))
    assert [unit.index for unit in units.units] == sorted(unit.index for unit in units.units)
    assert len({unit.name for unit in units.units}) == len(units.units)


@pytest.mark.parametrize("base", [(4, 6), (6, 4), (10, 6), (6, 10)])
@pytest.mark.parametrize("more", [0, 1])
def test_operands_that_are_not_planned_count_as_wide_as_was_asked_for(base, more):
    s = Sketch()
    x = s.input(2, 5, 6)
    first, other = s.linear(x, 5, name="first"), s.linear(x, 5, name="other")
    mixed = s.call(aten.matmul.default, first, other)
    layer = s.linear(mixed, 5, name="layer")
    module, plan = s.returns(s.linear(layer, 3, name="last")), Plan()
    for position in (0, 1):
        read(plan, mixed, base[1] + more, position)
    weight = Site(
        edge=Edge(layer, (1,)), role=Role.WEIGHT, kind=kind(layer), bits=base[0] + more
    )  # fmt: skip
    plan.add(weight)
    owner = owners(find_units(module, plan, find_structure(module), base).units)
    found = owner[mixed].pinned, owner[layer].pinned
    raised = (
        (max(base[0], 8), max(base[1] + 1, 8)), (max(base[0] + 1, 8), max(base[1], 8))
    )  # fmt: skip
    assert found == (raised if more else (None, None))
