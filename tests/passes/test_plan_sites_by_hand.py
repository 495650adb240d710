# SPDX-License-Identifier: Apache-2.0
"""Plans of graphs written by hand: which operands, as what, at how many bits, along which axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.graph.ignore import Ignore
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Role, Site
from qgraph.graph.verify import Sample
from qgraph.passes import PlanSites, RaisePrecision
from qgraph.passes.plan_sites import end_products
from qgraph.passes.raise_precision import behind_attention
from tests.passes.by_hand import Hand, aten, normal, told

A, W = Role.ACTIVATION, Role.WEIGHT
BITS: dict[str, Any] = {"weight_bits": 3, "activation_bits": 5, "ends_bits": 2}


def planned(hand: Hand, **options: Any) -> list[Site]:
    context = Context(sample=Sample(()), batches=[], ignore=options.pop("ignore", Ignore()))
    PlanSites(**{**BITS, **options}).run(hand.module(), context)
    return context.plan.sites


def told_sites(sites: list[Site]) -> list[tuple[str, int, Role, int, int | None]]:
    return [(s.edge.consumer.name, int(s.edge.path[0]), s.role, s.bits, s.axis) for s in sites]


def conv(hand: Hand, x: Node, *shape: int, target: Any = None, name: str = "conv") -> Any:
    weight = hand.stored(f"{name}_weight", normal(*shape))
    return hand.call(target or aten.conv1d.default, x, weight, name=name)


def test_products_have_their_data_and_their_stored_weight_on_the_plan():
    hand = Hand()
    x = hand.given("x", normal(2, 4, 5))
    a = conv(hand, x, 6, 4, 3, name="a")
    b = conv(hand, a, 6, 2, 3, target=aten.conv_transpose1d.default, name="b")
    hand.linear(b, normal(7, 5), normal(7), name="c")
    assert told_sites(planned(hand)) == [
        ("a", 0, A, 5, 1), ("a", 1, W, 3, 0),
        ("b", 0, A, 5, 1), ("b", 1, W, 3, 1),
        ("c", 0, A, 5, -1), ("c", 1, W, 3, 0),
    ]  # fmt: skip
    assert [s.kind for s in planned(hand)][::2] == [
        OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR,
    ]  # fmt: skip
    assert {s.edge.consumer.name for s in planned(hand, scope=("conv",))} == {"a"}


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        (None, None, [("m", 0, A, 5, -1), ("m", 1, A, 5, -2)]),
        (None, (6, 7), [("m", 0, A, 5, -1), ("m", 1, W, 3, -1)]),
        (None, (2, 6, 7), [("m", 0, A, 5, -1), ("m", 1, W, 3, None)]),
        ((5, 6), None, [("m", 0, W, 3, None), ("m", 1, A, 5, -2)]),
    ],
)
def test_operands_of_matrix_products_are_data_unless_they_are_stored(left, right, wanted):
    hand = Hand()
    first = hand.given("x", normal(2, 5, 6)) if left is None else hand.stored("l", normal(*left))
    second = hand.given("y", normal(2, 6, 7)) if right is None else hand.stored("r", normal(*right))
    hand.call(aten.matmul.default, first, second, name="m")
    assert told_sites(planned(hand)) == wanted


def test_a_computed_constant_is_no_weight_and_numbers_that_are_no_floats_are_left_alone():
    hand = Hand()
    x = hand.given("x", normal(2, 5, 6))
    doubled = hand.call(aten.mul.Tensor, hand.stored("w", normal(6, 7)), 2.0)
    hand.call(aten.matmul.default, x, doubled, name="m")
    assert told_sites(planned(hand)) == [("m", 0, A, 5, -1)]
    hand = Hand()
    x = hand.given("x", torch.ones(2, 5, 6, dtype=torch.int64))
    hand.call(aten.matmul.default, x, hand.stored("w", torch.ones(6, 7, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="nothing to quantize"):
        planned(hand)


@pytest.mark.parametrize(
    ("bits", "asked", "width", "axis"),
    [(3, None, 8, -1), (9, None, 9, -1), (3, 8, 8, -1), (3, 7, 7, 0), (9, 4, 4, 0), (3, 9, 9, -1)],
)
def test_a_table_has_a_scale_per_row_below_eight_bits(bits, asked, width, axis):
    hand = Hand()
    tokens = hand.given("tokens", torch.arange(6).reshape(2, 3))
    table = hand.call(aten.embedding.default, hand.stored("t", normal(9, 4)), tokens, name="e")
    hand.linear(table, normal(5, 4), name="c")
    sites = planned(hand, weight_bits=bits, embedding_bits=asked)
    assert told_sites(sites)[0] == ("e", 0, W, width, axis)
    assert sites[0].kind is OpKind.EMBEDDING
    assert len(sites) == 3
    hand = Hand()
    computed = hand.given("table", normal(9, 4))
    tokens = hand.given("tokens", torch.arange(6).reshape(2, 3))
    read = hand.call(aten.embedding.default, computed, tokens)
    hand.linear(read, normal(5, 4), name="c")
    assert [s.kind for s in planned(hand)] == [OpKind.LINEAR] * 2


def sums(first: Tensor, second: Tensor | float, *, stored: tuple[bool, bool]) -> Hand:
    """A sum in front of a linear."""
    hand = Hand()
    operands = [
        v if isinstance(v, float) else (hand.stored if held else hand.given)(name, v)
        for name, v, held in zip("ab", (first, second), stored, strict=True)
    ]
    total = hand.call(aten.add.Tensor, *operands, name="total")
    hand.linear(total, normal(3, total.meta["val"].shape[-1]), name="c")
    return hand


@pytest.mark.parametrize(
    ("first", "second", "stored", "counts"),
    [
        (normal(2, 5), normal(2, 5), (False, False), True),
        (normal(2, 3, 5), normal(2, 3, 5), (False, False), True),
        (normal(2, 5), normal(1, 5), (False, False), False),
        (normal(2, 5), normal(2, 1), (False, False), False),
        (normal(2, 3, 5), normal(3, 5), (False, False), False),
        (normal(5), normal(5), (False, False), False),
        (normal(2, 5), 1.0, (False, False), False),
        (normal(2, 5), normal(2, 5), (True, False), False),
        (normal(2, 5), normal(2, 5), (False, True), False),
        (normal(2, 5), torch.ones(2, 5, dtype=torch.int64), (False, False), False),
        (torch.ones(2, 5, dtype=torch.int64), normal(2, 5), (False, False), False),
    ],
)
@pytest.mark.parametrize(("bits", "width"), [(5, 8), (8, 8), (9, 9)])
def test_a_sum_counts_where_both_operands_are_values_of_one_shape(
    first, second, stored, counts, bits, width
):
    sites = planned(sums(first, second, stored=stored), activation_bits=bits)
    found = [s for s in told_sites(sites) if s[0] == "total"]
    assert found == ([("total", p, A, width, None) for p in (0, 1)] if counts else [])


def test_what_is_stored_for_a_concatenation_is_planned_where_that_is_asked_for():
    hand = Hand()
    x, tokens = hand.given("x", normal(2, 5)), hand.given("n", torch.ones(2, 5).long())
    y = hand.linear(x, normal(5, 5), name="a")
    joined = hand.call(aten.cat.default, [y, hand.stored("table", normal(2, 5)), x], 1, name="cat")
    hand.call(aten.cat.default, [tokens, tokens], 1, name="other")
    hand.linear(joined, normal(3, 15), name="c")
    sites = planned(hand, scope="stored")
    assert [s.edge.path for s in sites if s.edge.consumer is joined] == [(0, 0), (0, 2)]
    assert {(s.bits, s.role) for s in sites if s.edge.consumer is joined} == {(5, A)}
    assert not any(s.edge.consumer.name == "other" for s in sites)
    assert not any(s.kind is OpKind.CAT for s in planned(hand))


def chain(ends: int = 2) -> tuple[Hand, list[Node]]:
    """Linears a, b, c in a row, d beside them from the input, and a sum behind."""
    hand = Hand()
    x = hand.given("x", normal(2, 5))
    a = hand.linear(x, normal(5, 5), name="a")
    b = hand.linear(hand.call(aten.relu.default, a), normal(5, 5), name="b")
    c = hand.linear(b, normal(5, 5), name="c")
    d = hand.linear(x, normal(5, 5), name="d")
    hand.call(aten.add.Tensor, c, hand.linear(d, normal(5, 5), name="e"))
    return hand, [a, b, c, d]


def test_the_first_and_last_products_of_every_path_get_the_width_of_ends():
    hand, nodes = chain()
    assert {n.name for n in end_products(list(hand.graph.nodes))} == {"a", "c", "d", "e"}
    for ends, wanted in ((8, (8, 8)), (4, (4, 5)), (2, (3, 5))):
        found = {(s.edge.consumer.name, s.role): s.bits for s in planned(hand, ends_bits=ends)}
        for name in "acde":
            assert (found[name, W], found[name, A]) == wanted
        assert (found["b", W], found["b", A]) == (3, 5)
    del nodes[1].meta["val"]
    assert len(end_products(list(hand.graph.nodes))) == 4


def test_ignored_nodes_are_told_and_kept_in_float():
    hand, _ = chain()
    context = Context(sample=Sample(()), batches=[], ignore=Ignore(("b", "relu*")))
    PlanSites().run(hand.module(), context)
    assert {s.edge.consumer.name for s in context.plan if s.kind is OpKind.LINEAR} == set("acde")
    assert [d.site for d in told(context, "plan-sites")] == ["b"]
    with pytest.raises(ConfigError, match="nothing to quantize"):
        planned(hand, ignore=Ignore(("linear", "add")))


@pytest.mark.parametrize(
    ("options", "fine"),
    [
        ({"weight_bits": 2}, True), ({"weight_bits": 1}, False), ({"activation_bits": 16}, True),
        ({"activation_bits": 17}, False), ({"ends_bits": 1}, False), ({"ends_bits": 2}, True),
        ({"embedding_bits": 17}, False), ({"scope": "none"}, False), ({"scope": ("conv",)}, True),
        ({"scope": ("convolution",)}, False), ({"scope": "stored"}, True),
    ],
)  # fmt: skip
def test_widths_and_scopes_are_checked_right_at_their_limits(options, fine):
    if fine:
        PlanSites(**options)
    else:
        with pytest.raises(ConfigError):
            PlanSites(**options)


def transformer() -> tuple[Hand, dict[str, Any]]:
    """Products before, in, between and behind two attentions, and one beside them."""
    hand = Hand()
    x = hand.given("x", normal(2, 5, 6))
    found: dict[str, Any] = {}

    def product(name: str, data: Node) -> Any:
        found[name] = hand.linear(data, normal(6, 6), name=name)
        return found[name]

    def attend(name: str, data: Node) -> Any:
        soft = hand.call(aten.softmax.int, hand.call(
            aten.matmul.default, data, hand.call(aten.transpose.int, data, 1, 2)), -1)  # fmt: skip
        found[name] = hand.call(aten.matmul.default, soft, data, name=name)
        return found[name]

    product("beside", x)
    between = product("between", attend("first", product("before", x)))
    after = product("after", attend("second", between))
    product("last", hand.call(aten.relu.default, after))
    return hand, found


def test_only_what_lies_behind_the_last_attention_is_behind_it():
    hand, found = transformer()
    behind = behind_attention(hand.graph.nodes)
    assert {name for name, node in found.items() if node in behind} == {"after", "last"}
    assert not behind_attention(chain()[0].graph.nodes)


@pytest.mark.parametrize(
    ("options", "raised"),
    [
        ({}, {"after": "behind the last attention", "last": "behind the last attention"}),
        ({"heads": False}, {}),
        ({"heads": False, "high": ("before", "last")},
         {"before": "asked for", "last": "asked for"}),
        ({"heads": False, "high_kinds": ("matmul",)}, {"first": "matmul layers",
                                                       "second": "matmul layers"}),
        ({"high_bits": 4, "heads": False, "high_kinds": ("linear",)}, {}),
        ({"high_bits": 5, "roles": ("activation",)}, {}),
        ({"high_bits": 6, "roles": ("activation",)},
         {"after": "behind the last attention (activation)",
          "last": "behind the last attention (activation)"}),
    ],
)  # fmt: skip
def test_chosen_products_have_at_least_the_bits_of_the_rule(options, raised):
    hand, found = transformer()
    context = Context(sample=Sample(()), batches=[])
    module = hand.module()
    PlanSites(weight_bits=5, activation_bits=5, ends_bits=5).run(module, context)
    products = [s for s in context.plan if s.edge.consumer.name in found]
    RaisePrecision(**options).run(module, context)
    high = options.get("high_bits", 8)
    lines = {d.site: d for d in told(context, "raise-precision") if d.site in found}
    assert {n: d.reason.partition(": ")[2] for n, d in lines.items()} == raised
    assert all(d.numbers["bits"] == high for d in lines.values())
    roles = options.get("roles", ("weight", "activation"))
    for site in products:
        up = site.edge.consumer.name in raised and site.role.value in roles
        assert site.bits == (high if up else 5)


def test_rules_for_more_bits_are_checked():
    for wrong in ({"high_bits": 17}, {"high_kinds": ("convs",)}, {"roles": ("bias",)}):
        with pytest.raises(ConfigError):
            RaisePrecision(**wrong)
    hand, _ = transformer()
    context = Context(sample=Sample(()), batches=[])
    with pytest.raises(ConfigError, match="matches nothing"):
        RaisePrecision(high=("nobody",)).run(hand.module(), context)
