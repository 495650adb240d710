# SPDX-License-Identifier: Apache-2.0
"""bisect names the pass and the node: where a promise breaks, or where accuracy goes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import qgraph
from qgraph.graph.build import attribute, replace_tensor
from qgraph.graph.edges import Edge


class Net(nn.Module):
    """The middle layer's weight has one huge row, which 3 bits per tensor would not survive."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


MODEL, LOADER = Net().eval(), [torch.randn(16, 8) for _ in range(2)]


@dataclass(frozen=True)
class RuinMiddle(qgraph.Pass):
    name: ClassVar[str] = "ruin-middle"
    strength: float = 0.5

    def run(self, module, context):
        node = next(n for n in module.graph.nodes if "middle" in str(n.meta.get("nn_module_stack")))
        weight = attribute(module, str(node.args[1].target))
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        replace_tensor(module, Edge(node, (1,)), weight + self.strength * noise, "ruined")
        return True


@dataclass(frozen=True)
class RuinInSecret(RuinMiddle):
    name: ClassVar[str] = "ruin-in-secret"
    promise: ClassVar[qgraph.Promise] = qgraph.Promise.EQUIVALENT


def test_the_pass_and_the_node_that_cost_most_are_named():
    pipeline = qgraph.pipeline("int8").insert_before("plan-sites", RuinMiddle())
    found = qgraph.bisect(pipeline, MODEL, LOADER)
    assert (found.pass_name, found.node, found.broken) == ("ruin-middle", "linear_1", False)
    assert found.nodes[0].path == "middle"
    assert "middle" in found.reason
    assert found.passes[0].sqnr == math.inf
    assert sum(p.share for p in found.passes) == pytest.approx(1.0)


def test_of_a_plain_pipeline_the_quantizers_cost_most_and_nodes_are_ranked():
    found = qgraph.bisect("w2a8", MODEL, LOADER)
    assert found.pass_name == "insert-quantizers"
    assert {n.node for n in found.nodes} == {"linear", "linear_1", "linear_2"}
    assert found.nodes[0].node == "linear_1"  # the ends keep 8 bits
    assert found.nodes[0].share > 0.9
    shares = [n.share for n in found.nodes]
    assert shares == sorted(shares, reverse=True)


def test_a_node_charged_alone_costs_what_ignoring_all_others_costs():
    found = qgraph.bisect("w3a8", MODEL, LOADER, ignore=["first", "last"])
    assert [n.node for n in found.nodes] == ["linear_1"]
    last = next(p for p in found.passes if p.name == "insert-quantizers")
    assert found.nodes[0].output == pytest.approx(last.sqnr, abs=1e-3)


def test_a_broken_promise_is_a_finding_and_later_passes_are_not_reached():
    pipeline = qgraph.pipeline("int8").insert_before("plan-sites", RuinInSecret())
    found = qgraph.bisect(pipeline, MODEL, LOADER)
    assert (found.pass_name, found.node, found.broken) == ("ruin-in-secret", "linear_1", True)
    outcomes = {p.name: p.outcome for p in found.passes}
    assert outcomes["fold-batch-norm"] == "held"
    assert outcomes["ruin-in-secret"] == "broken"
    assert outcomes["pack-weights"] == "not reached"


def test_a_pass_that_fails_is_a_finding_too():
    @dataclass(frozen=True)
    class Fail(RuinMiddle):
        name: ClassVar[str] = "fail"

        def run(self, module, context):
            raise ZeroDivisionError("oops")

    found = qgraph.bisect(
        qgraph.pipeline("int8").insert_before("plan-sites", Fail()), MODEL, LOADER
    )
    assert (found.pass_name, found.broken) == ("fail", True)
    assert "ZeroDivisionError: oops" in found.reason


def test_it_prints_within_100_columns_and_as_json():
    found = qgraph.bisect("w2a8", MODEL, LOADER)
    assert all(len(line) <= 100 for line in str(found).splitlines())
    data = json.loads(found.to_json())
    assert data["pass_name"] == "insert-quantizers"
    assert data["passes"][0]["sqnr"] == "inf"


def test_an_order_that_cannot_work_and_bad_data_are_errors_as_in_compile():
    with pytest.raises(qgraph.ConfigError, match="requires the fact"):
        qgraph.bisect(qgraph.pipeline("int8").without("calibrate"), MODEL, LOADER)
    with pytest.raises(qgraph.CalibrationError):
        qgraph.bisect("int8", MODEL, [])
