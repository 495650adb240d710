# SPDX-License-Identifier: Apache-2.0
"""Attention in drawn graphs: what may lie before, between and behind, and what may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.attention_sites import AttentionSite, NoSite, attention_sites, shift_obstacle
from tests.graph.sketch import Sketch, aten

T, S, D = 3, 5, 4
Change = Callable[[Sketch, Node], Node]


def same(_: Sketch, x: Node) -> Node:
    return x


def drawn(between: Change = same, after: Change = same, axis: int = -1) -> list[object]:
    s = Sketch()
    q, k, v = s.input(2, T, D), s.input(2, D, S, name="k"), s.input(2, S, D, name="v")
    logits = s.call(aten.matmul.default, q, k)
    soft = s.call(aten.softmax.int, between(s, logits), axis)
    context = s.call(aten.matmul.default, after(s, soft), v)
    return list(attention_sites(s.returns(context)))


def op(target: object, *args: object) -> Change:
    return lambda s, x: s.call(target, x, *args)


def with_stored(target: object, *shape: int, first: bool = False) -> Change:
    def change(s: Sketch, x: Node) -> Node:
        table = s.stored(torch.rand(shape) + 0.5, "table")
        return s.call(target, table, x) if first else s.call(target, x, table)

    return change


def masked(s: Sketch, x: Node) -> Node:
    return s.call(aten.masked_fill.Scalar, x, s.stored(torch.ones(T, S) > 0, "mask"), -1e9)


def where(s: Sketch, x: Node) -> Node:
    keep = s.stored(torch.ones(T, S) > 0, "mask")
    return s.call(aten.where.self, keep, x, s.stored(torch.tensor(-1e9), "low"))


# what stands between, and whether a constant per query is known to pass it
BETWEEN: dict[str, tuple[Change, bool]] = {
    "nothing": (same, True), "half": (op(aten.mul.Tensor, 0.5), True),
    "half as number": (op(aten.mul.Scalar, 0.5), True),
    "divided": (op(aten.div.Tensor, 2.0), True), "one more": (op(aten.add.Tensor, 1.0), True),
    "mask": (masked, True), "where": (where, False), "cap": (op(aten.tanh.default), False),
    "negative": (op(aten.neg.default), False), "clamp": (op(aten.clamp_min.default, 0.0), False),
    "a table": (with_stored(aten.add.Tensor, T, S), True),
    "a factor for all": (with_stored(aten.mul.Tensor), True),
    "a factor per query": (with_stored(aten.mul.Tensor, T, 1), True),
    "a factor per key": (with_stored(aten.mul.Tensor, S), False),
    "a factor per key first": (with_stored(aten.mul.Tensor, T, S, first=True), False),
    "a divisor per query": (with_stored(aten.div.Tensor, T, 1), True),
    "a divisor per key": (with_stored(aten.div.Tensor, 1, S), False),
    "a reciprocal": (with_stored(aten.div.Tensor, T, 1, first=True), False),
    "a cast": (op(aten.clone.default), True), "a view": (op(aten.view.default, [2, 1, T, S]), True),
    "turned": (op(aten.flip.default, [-1]), False),
    "windows": (op(aten.view.default, [2, T * S]), False),
    "itself twice": (lambda s, x: s.call(aten.add.Tensor, x, x), True),
    "itself and its cap": (
        lambda s, x: s.call(aten.add.Tensor, x, s.call(aten.tanh.default, x)), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in BETWEEN if n not in {"a view", "windows"}])
def test_a_constant_per_query_passes_what_treats_all_keys_alike(name):
    change, passes = BETWEEN[name]
    (site,) = drawn(change)
    assert isinstance(site, AttentionSite)
    assert (site.query.name, site.key.name, site.values.name) == ("x", "k", "v")
    assert site.probabilities is site.softmax
    obstacle = shift_obstacle(site)
    assert (obstacle is None) is passes
    assert obstacle is None or obstacle in site.between
    nodes = list(site.softmax.graph.nodes)
    inside = nodes[nodes.index(site.logits) + 1 : nodes.index(site.softmax)]
    assert list(site.between) == [n for n in inside if n.op != "get_attr"]


@pytest.mark.parametrize("name", ["a view", "windows"])
def test_views_that_keep_the_keys_last_hand_a_shift_on(name):
    change, passes = BETWEEN[name]
    s = Sketch()
    q, k = s.input(2, T, D), s.input(2, D, S, name="k")
    moved = change(s, s.call(aten.matmul.default, q, k))
    soft = s.call(aten.softmax.int, moved, -1)
    values = s.input(int(soft.meta["val"].shape[-1]), D, name="v")
    (site,) = attention_sites(s.returns(s.call(aten.matmul.default, soft, values)))
    assert isinstance(site, AttentionSite)
    assert (shift_obstacle(site) is None) is passes


AFTER: dict[str, tuple[Change, bool]] = {
    "a copy": (op(aten.clone.default), True), "dead rows": (masked, True), "where": (where, True),
    "a view": (op(aten.view.default, [2, T, S]), True),
    "dropout": (op(aten.dropout.default, 0.5, False), True),
    "a factor": (op(aten.mul.Tensor, 2.0), False), "a function": (op(aten.exp.default), False),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_probabilities_meet_values_through_copies_masks_and_moves_alone(name):
    change, passes = AFTER[name]
    found = drawn(after=change)
    assert len(found) == passes
    for site in found:
        assert isinstance(site, AttentionSite)
        assert site.context.args[0] is site.probabilities
        assert site.context.args[1] is site.values


@pytest.mark.parametrize("axis", [-1, 2, -2, 1, 0])
def test_softmax_is_over_the_last_axis_however_it_is_counted(axis):
    (site,) = drawn(axis=axis)
    if axis in {-1, 2}:
        assert isinstance(site, AttentionSite)
    else:
        assert isinstance(site, NoSite)
        assert site.reason == "softmax is not over the last axis"


def test_products_with_stored_tables_are_no_logits_and_sums_of_two_are_refused() -> None:
    s = Sketch()
    q, k, v = s.input(2, T, D), s.input(2, D, S, name="k"), s.input(2, S, D, name="v")
    logits = s.call(aten.matmul.default, q, k)
    positions = s.call(aten.matmul.default, q, s.stored(torch.randn(D, S)))
    summed = s.call(aten.add.Tensor, logits, positions)
    two = s.call(aten.add.Tensor, summed, s.call(aten.matmul.default, q, k))
    ends: list[Node] = []
    for value in (summed, two, positions, q):
        soft = s.call(aten.softmax.int, value, -1)
        shape = [2, int(soft.meta["val"].shape[-1]), D]
        table = s.stored(torch.randn(shape), f"v{len(ends)}")
        ends.append(s.call(aten.matmul.default, soft, table))
    turned = s.call(aten.matmul.default, v, s.call(aten.softmax.int, k, -1))
    sites = list(attention_sites(s.returns(*ends, turned)))
    assert isinstance(sites[0], AttentionSite)
    assert sites[0].logits is logits
    assert [site.reason for site in sites[1:] if isinstance(site, NoSite)] == [
        "logits are a sum of 2 products", "logits hold no product of two activations",
        "logits hold no product of two activations",
    ]  # fmt: skip
    assert len(sites) == 4


def test_constant_softmaxes_and_unused_ones_are_passed_over() -> None:
    s = Sketch()
    x = s.input(2, S, D)
    fixed = s.call(aten.softmax.int, s.stored(torch.randn(2, T, S)), -1)
    s.call(aten.softmax.int, x, -1)
    assert not list(attention_sites(s.returns(s.call(aten.matmul.default, fixed, x))))
