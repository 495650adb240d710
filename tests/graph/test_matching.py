# SPDX-License-Identifier: Apache-2.0
"""Patterns find what they describe and nothing else; rewrites say what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import PassError
from qgraph.graph.matching import call, constant, find, literal, matches, value
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pipeline, run_pipeline

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = torch.neg(torch.neg(x))
        z = torch.relu(y) * self.scale
        w = torch.relu(torch.relu(x))
        return (z + z, w.sum(-1), torch.neg(z), x.transpose(1, 2))


X = torch.randn(2, 3, 4)
TRACED = qgraph.trace(Net().eval(), X)


def found(pattern):
    return list(matches(TRACED, pattern))


def test_nested_calls_and_names_are_bound():
    pairs = found(call(aten.neg.default, call(aten.neg.default, value("x"), name="inner")))
    assert len(pairs) == 1
    assert pairs[0]["x"].op == "placeholder"
    assert pairs[0].calls == (pairs[0].root, pairs[0]["inner"])
    assert len(found(call(aten.neg.default, value("x")))) == 3


def test_constants_literals_and_several_targets():
    scaled = found(call(aten.mul.Tensor, value("x"), constant("s")))
    assert [m["s"].op for m in scaled] == ["get_attr"]
    assert not found(call(aten.mul.Tensor, constant("s"), value("x")))
    either = found(call(aten.mul.Tensor, constant("s"), value("x"), commutes=True))
    assert either[0]["s"] is scaled[0]["s"]
    turned = found(call(aten.transpose.int, value("x"), literal("first"), 2))
    assert turned[0].literals == {"first": 1}
    assert not found(call(aten.transpose.int, value("x"), 2, 1))
    assert len(found(call((aten.neg.default, aten.relu.default), value("x")))) == 6


def test_a_name_used_twice_must_stand_for_one_node():
    assert len(found(call(aten.add.Tensor, value("a"), value("a")))) == 1
    assert not found(call(aten.mul.Tensor, value("a"), value("a")))
    node = next(n for n in TRACED.graph.nodes if n.op == "placeholder")
    assert find(call(aten.neg.default, value("x")), node) is None


def test_readers_outside_the_match_are_named():
    match = found(call(aten.neg.default, call(aten.mul.Tensor, value("x"), constant("s"))))[0]
    assert match.read_elsewhere().startswith(f"{match.calls[1].name} is also read by add")


@dataclass(frozen=True)
class Merge(qgraph.Rewrite):
    name: ClassVar[str] = "merge"
    promise: ClassVar[qgraph.Promise] = qgraph.Promise.IDENTICAL
    kind: str = "good"

    def pattern(self):
        return call(aten.relu.default, call(aten.relu.default, value("x"), name="inner"))

    def check(self, match, context):
        return "asked to leave it" if self.kind == "refuse" else match.read_elsewhere()

    def rewrite(self, module, match, context):
        return {"good": match["inner"], "itself": match.root, "nothing": None}[self.kind]


def run(item):
    module = qgraph.trace(Net().eval(), X)
    context = qgraph.Context(sample=Sample((X,)), batches=[], facts=frozenset({"traced"}))
    steps = run_pipeline(Pipeline("test", (item,)), module, context)
    relus = [n for n in module.graph.nodes if n.target is aten.relu.default]
    return steps[0].changed, len(relus), context.decisions


def test_a_rewrite_replaces_and_what_is_no_longer_read_goes():
    changed, relus, decisions = run(Merge())
    assert (changed, relus) == (True, 2)
    assert [(d.by, d.outcome) for d in decisions] == [("merge", "applied")]


def test_a_refused_match_is_left_alone_and_the_reason_recorded():
    changed, relus, decisions = run(Merge("refuse"))
    assert (changed, relus) == (False, 3)
    assert [(d.outcome, d.reason) for d in decisions] == [("refused", "asked to leave it")]


@pytest.mark.parametrize(
    ("kind", "words"), [("itself", "returned relu_2 itself"), ("nothing", "must return the node")]
)  # fmt: skip
def test_a_replacement_that_is_none_is_an_error_with_a_way_out(kind, words):
    with pytest.raises(PassError, match=words) as caught:
        run(Merge(kind))
    assert caught.value.pass_name == "merge"
