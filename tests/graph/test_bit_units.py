# SPDX-License-Identifier: Apache-2.0
"""What shares its bits and what each width costs, on small drawn plans, counted by hand."""

from __future__ import annotations

import pytest
from torch.fx import GraphModule, Node

from qgraph.graph.bit_units import (
    Units,
    carriers,
    find_units,
    followers,
    owners,
    stored_bytes,
)
from qgraph.graph.edges import Edge
from qgraph.graph.encoder_decoder import Side, find_structure
from qgraph.graph.ops import kind
from qgraph.graph.plan import Plan, Role, Site
from tests.graph.sketch import Sketch, aten


def site(node: Node, position: int, role: Role, bits: int = 4) -> Site:
    path = (0, position) if node.target is aten.cat.default else (position,)
    return Site(edge=Edge(node, path), role=role, kind=kind(node), bits=bits)


def both(plan: Plan, node: Node, weight: int = 4, activation: int = 4) -> None:
    plan.add(site(node, 0, Role.ACTIVATION, activation))
    plan.add(site(node, 1, Role.WEIGHT, weight))


def image(s: Sketch) -> dict[str, Node]:
    """stem, two readers of one value, their concatenation, a reader of it and the head."""
    n: dict[str, Node] = {}
    n["stem"] = s.conv(s.input(2, 3, 8, 8), 4, name="stem")
    n["relu"] = s.call(aten.relu.default, n["stem"])
    n["left"] = s.conv(n["relu"], 4, name="left")
    n["right"] = s.conv(n["relu"], 6, 1, name="right")
    n["cat"] = s.call(aten.cat.default, [n["left"], n["right"]], 1)
    n["low"] = s.conv(s.call(aten.max_pool2d.default, n["cat"], [2, 2]), 5, name="low")
    n["middle"] = s.conv(s.call(aten.relu.default, n["low"]), 5, name="middle")
    n["head"] = s.conv(s.call(aten.exp.default, n["middle"]), 1, 1, name="head")
    return n


PRODUCTS = ("stem", "left", "right", "low", "middle", "head")


def planned(
    bits: dict[str, tuple[int, int]] | None = None, *, leave: tuple[str, ...] = ()
) -> tuple[GraphModule, dict[str, Node], Plan, Units]:
    s = Sketch()
    n = image(s)
    module = s.returns(n["head"])
    plan = Plan()
    for name in PRODUCTS:
        if name not in leave:
            both(plan, n[name], *(bits or {}).get(name, (4, 4)))
    plan.add(site(n["cat"], 0, Role.ACTIVATION))
    plan.add(site(n["cat"], 1, Role.ACTIVATION))
    return module, n, plan, find_units(module, plan, find_structure(module), (4, 4))


def test_products_that_read_one_value_are_one_unit_and_all_are_in_order() -> None:
    _, n, plan, units = planned()
    assert [u.name for u in units.units] == ["stem", "left", "low", "middle", "head"]
    assert units.units[1].products == (n["left"], n["right"])
    assert [len(u.weights) for u in units.units] == [1, 2, 1, 1, 1]
    assert [len(u.activations) for u in units.units] == [1, 2, 1, 1, 1]
    assert [u.index for u in units.units] == sorted(u.index for u in units.units)
    assert [u.side for u in units.units] == [
        Side.STEM, Side.ENCODER, Side.BOTTLENECK, Side.BOTTLENECK, Side.HEAD,
    ]  # fmt: skip
    assert [u.level for u in units.units] == [0, 0, 1, 1, 1]
    assert [u.block for u in units.units] == ["stem", "E0", "B1", "B1", "head"]
    assert {node.name: unit.name for node, unit in owners(units.units).items()} == {
        n[name].name: "left" if name == "right" else name for name in PRODUCTS
    }
    assert len(plan) == 14


@pytest.mark.parametrize(
    ("name", "bits", "pinned"),
    [
        ("low", (4, 4), None), ("low", (5, 4), (8, 8)), ("low", (4, 6), (8, 8)),
        ("low", (3, 3), None), ("low", (10, 4), (10, 8)), ("low", (4, 12), (8, 12)),
        ("stem", (4, 4), (8, 8)), ("head", (4, 4), (8, 8)), ("head", (9, 4), (9, 8)),
        ("right", (6, 4), (8, 8)), ("right", (4, 6), (8, 8)), ("right", (2, 2), None),
    ],
)  # fmt: skip
def test_what_was_raised_and_the_ends_of_the_network_keep_eight_bits_or_more(name, bits, pinned):
    _, n, _, units = planned({name: bits})
    assert owners(units.units)[n[name]].pinned == pinned


@pytest.mark.parametrize(
    ("base", "raised"), [((4, 4), False), ((5, 4), False), ((3, 5), True), ((5, 3), True)]
)
def test_raised_means_more_than_was_asked_for_that_operand(base, raised):
    module, n, plan, _ = planned()
    units = find_units(module, plan, find_structure(module), base)
    assert (owners(units.units)[n["low"]].pinned is not None) is raised


def test_costs_are_counts_times_widths() -> None:
    module, n, plan, units = planned(leave=("middle",))
    by_name = {u.name: u for u in units.units}
    left, low = by_name["left"], by_name["low"]
    parameters = {"stem": 4 * 3 * 9, "left": 4 * 4 * 9, "right": 6 * 4, "low": 5 * 10 * 9,
                  "middle": 5 * 5 * 9, "head": 5}  # fmt: skip
    macs = {name: count * (64 if name in {"stem", "left", "right"} else 16)
            for name, count in parameters.items()}  # fmt: skip
    assert left.parameters == parameters["left"] + parameters["right"]
    assert left.macs == macs["left"] + macs["right"]
    assert low.elements == 10 * 16 + 10 * 64  # the pooled value, and both that were joined
    got = left.costs((3, 5))
    assert got["size"] == left.parameters * 3 / 8
    assert got["bops"] == left.macs * 15
    # relu (4 x 64) is read by the unit itself; no one else's
    assert left.elements == 4 * 64
    assert got["activations"] == 4 * 64 * 5 / 8
    assert units.rest["size"] == parameters["middle"] * 4
    assert units.rest["bops"] == macs["middle"] * 32 * 32
    assert units.floats["size"] == sum(parameters.values()) * 4
    assert units.floats["bops"] == sum(macs.values()) * 1024
    elements = {"relu": 4 * 64, "left": 4 * 64, "right": 6 * 64, "pool": 10 * 16, "after low": 80,
                "after middle": 80, "head": 16}  # fmt: skip
    assert units.floats["activations"] == sum(elements.values()) * 4
    charged = sum(u.elements for u in units.units)
    in_float = elements["after low"] + elements["head"]
    assert units.rest["activations"] == in_float * 4
    assert charged == sum(elements.values()) - in_float
    low.assign((2, 7))
    assert {s.bits for s in low.weights} == {2}
    assert {s.bits for s in low.activations} == {7}
    assert stored_bytes(module, plan) == (
        elements["relu"] * 4 + (elements["left"] + elements["right"]) * 4 + elements["pool"] * 7
        + elements["after middle"] * 4 + in_float * 32
    ) / 8  # fmt: skip
    assert n["middle"] not in owners(units.units)


def test_a_product_of_two_activations_costs_the_square_of_its_width() -> None:
    s = Sketch()
    x, y = s.input(2, 3, 4), s.input(2, 4, 5, name="y")
    made = s.call(aten.matmul.default, x, y)
    module = s.returns(made)
    plan = Plan()
    for position in (0, 1):
        plan.add(site(made, position, Role.ACTIVATION))
    units = find_units(module, plan, find_structure(module), (4, 4))
    (unit,) = units.units
    assert unit.name == made.name
    assert unit.costs((2, 6))["bops"] == 3 * 4 * 5 * 36
    assert unit.costs((2, 6))["size"] == 0
    assert (unit.level, unit.side) == (0, Side.HEAD)


def test_values_that_are_joined_follow_those_who_read_behind() -> None:
    _, n, plan, units = planned()
    owner = owners(units.units)
    low, left = owner[n["low"]], owner[n["left"]]
    assert followers(Edge(n["cat"], (0, 0)), owner) == [low]
    assert followers(Edge(n["left"], (0,)), owner) == [left]
    assert followers(Edge(n["relu"], (0,)), owner) == []
    assert followers(Edge(n["cat"], (0, 1)), {}) == []
    found = carriers(plan, units.units)
    assert set(found) == {n["left"], n["right"]}
    for value, position in ((n["left"], 0), (n["right"], 1)):
        sites, readers = found[value]
        assert [each.edge.path for each in sites] == [(0, position)]
        assert readers == [low]


def test_units_of_one_module_called_twice_have_names_of_their_own() -> None:
    s = Sketch()
    first = s.linear(s.input(2, 4), 4, name="fc")
    second = s.linear(s.call(aten.relu.default, first), 4, name="fc")
    module = s.returns(second)
    plan = Plan()
    both(plan, first)
    both(plan, second)
    units = find_units(module, plan, find_structure(module), (4, 4)).units
    names = [u.name for u in units]
    assert len(set(names)) == 2
    assert first.name in names
