# SPDX-License-Identifier: Apache-2.0
"""Rules for a detector's plan, each alone, on a graph whose head is told."""

from __future__ import annotations

from typing import Any

import pytest

from qgraph.errors import ConfigError
from qgraph.passes import PlanHeads, plan_heads
from tests.passes.by_hand import Hand, aten, normal, told


class Told:
    """Stands for the heads that were found."""

    def __init__(self, **found: Any) -> None:
        self.joined, self.last, self.head, self.regression = (
            frozenset(found.get(name, ())) for name in ("joined", "last", "head", "regression")
        )

    def describe(self) -> str:
        return "a head"


def detector() -> tuple[Hand, dict[str, Any]]:
    """backbone -> neck + x -> tower -> last, all operands planned."""
    hand = Hand()
    x = hand.given("x", normal(2, 4))
    backbone = hand.linear(x, normal(4, 4), name="backbone")
    total = hand.call(aten.add.Tensor, backbone, x, name="total")
    tower = hand.linear(total, normal(4, 4), name="tower")
    last = hand.linear(tower, normal(4, 4), name="last")
    ends = hand.call(aten.add.Tensor, last, tower, name="ends")
    for node in (backbone, tower, last):
        hand.data_site(node)
        hand.weight_site(node)
    for node in (total, ends):
        hand.data_site(node, 0)
        hand.data_site(node, 1)
    return hand, {n.name: n for n in (backbone, total, tower, last, ends)}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, {"last": "a last prediction layer"}),
        ({"last": "8"}, {}),
        ({"adds": "float"}, {"last": "a last prediction layer", "total": "an addition",
                             "ends": "an addition"}),
        ({"last": "8", "adds": "float"}, {"total": "an addition", "ends": "an addition"}),
        ({"last": "8", "parts": "backbone and neck"}, {"tower": "in the head",
                                                       "last": "in the head"}),
    ],
)  # fmt: skip
def test_each_rule_takes_its_own_sites_off_the_plan(options, gone, monkeypatch):
    hand, nodes = detector()
    head = {nodes[n] for n in ("tower", "last", "ends")}
    monkeypatch.setattr(
        plan_heads, "find_heads", lambda *_, **__: Told(last={nodes["last"]}, head=head)
    )
    _, context, changed = hand.run(PlanHeads(**options))
    assert changed == [False]
    left = {s.edge.consumer.name for s in context.plan}
    assert left == set(nodes) - set(gone)
    lines = told(context, "plan-heads")
    assert (lines[0].outcome, lines[0].reason) == ("applied", "a head")
    assert {d.site: d.reason for d in lines[1:]} == {n: f"float: {why}" for n, why in gone.items()}
    assert len(lines) == 1 + len(gone), "one line for each product, not for each operand"


def test_a_value_of_boxes_and_scores_is_never_quantized(monkeypatch):
    hand, nodes = detector()
    monkeypatch.setattr(plan_heads, "find_heads", lambda *_, **__: Told(joined={nodes["tower"]}))
    _, context, _ = hand.run(PlanHeads())
    gone = {("last", (0,)), ("ends", (1,))}
    left = {(s.edge.consumer.name, s.edge.path) for s in context.plan}
    assert not left & gone
    assert len(left) == 10 - len(gone)
    assert [d.site for d in told(context, "plan-heads")[1:]] == ["last"]


def test_what_is_no_detector_is_left_as_it_is(monkeypatch):
    hand, _ = detector()
    given: Any = []
    monkeypatch.setattr(
        plan_heads, "find_heads", lambda *_, **options: (given.append(options), "no boxes")[1]
    )
    _, context, _ = hand.run(PlanHeads(boxes=("b",), classes=("c",), head=("h",)))
    assert given == [{"boxes": ("b",), "classes": ("c",), "head": ("h",)}]
    assert len(context.plan) == 10
    assert [(d.outcome, d.reason) for d in told(context, "plan-heads")] == [("refused", "no boxes")]


def test_treatments_are_checked():
    good: Any
    wrong: Any
    for good in ({"last": "8"}, {"adds": "float"}, {"parts": "backbone and neck"}):
        PlanHeads(**good)
    for wrong in ({"last": "4"}, {"adds": "4"}, {"parts": "neck"}):
        with pytest.raises(ConfigError):
            PlanHeads(**wrong)
