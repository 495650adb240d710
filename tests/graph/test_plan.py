# SPDX-License-Identifier: Apache-2.0
"""The plan finds its sites by edge, consumer, role and value."""

from __future__ import annotations

import torch

from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Plan, Role, Site
from tests.graph.sketch import Sketch, aten


def test_sites_are_found_by_edge_consumer_role_and_value() -> None:
    s = Sketch()
    x = s.input(2, 3)
    w = s.stored(torch.ones(3, 3), "w")
    first, second = (s.call(aten.linear.default, x, w) for _ in range(2))
    add = s.call(aten.add.Tensor, first, x)

    def site(consumer, position, bits, role=Role.ACTIVATION):
        return Site(edge=Edge(consumer, (position,)), role=role, kind=OpKind.LINEAR, bits=bits)

    a, aw = site(first, 0, 8), site(first, 1, 4, Role.WEIGHT)
    b, bw = site(second, 0, 8), site(second, 1, 8, Role.WEIGHT)
    c, d = site(add, 0, 8), site(add, 1, 4)
    plan = Plan()
    assert (len(plan), list(plan)) == (0, [])
    for each in (a, aw, b, bw, c, d):
        plan.add(each)
    assert (len(plan), list(plan)) == (6, [a, aw, b, bw, c, d])
    assert [plan.at(Edge(first, (i,))) for i in (0, 1, 2)] == [a, aw, None]
    assert plan.at(Edge(add, (1,))) == d  # sites are compared by identity
    assert (plan.of(first), plan.of(second), plan.of(add)) == ([a, aw], [b, bw], [c, d])
    assert plan.of(x) == []
    assert plan.weights() == [aw, bw]
    assert plan.activations() == [a, b, c, d]
    assert [each.value for each in (a, aw, c, d)] == [x, w, first, x]
    assert plan.by_value() == {(x, 8): [a, b], (first, 8): [c], (x, 4): [d]}
    encoding = AffineEncoding.per_tensor(0.5, 0, IntGrid(8, signed=True))
    assert (b.encoding, b.decided_by, b.reason) == (None, "", "")
    b.decide(encoding, "choose", "seen")
    assert (b.encoding, b.decided_by, b.reason) == (encoding, "choose", "seen")
    b.decide(encoding, "again")
    assert (b.decided_by, b.reason) == ("again", "")
    assert plan.by_value(undecided_only=True) == {(x, 8): [a], (first, 8): [c], (x, 4): [d]}
    assert plan.by_value(undecided_only=False) == {(x, 8): [a, b], (first, 8): [c], (x, 4): [d]}
    plan.remove(a)
    assert list(plan) == [aw, b, bw, c, d]
    assert plan.at(Edge(first, (0,))) is None
    assert Plan() is not plan
    assert len(Plan()) == 0
