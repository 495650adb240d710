# SPDX-License-Identifier: Apache-2.0
"""Graphs printed as programs: the program computes the same, and so does the smallest part."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import qgraph
from qgraph.graph.verify import Sample
from qgraph.testing import graph_as_code, models, shrink

few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def same(a, b):
    first, second = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@few
@given(models())
def test_the_program_of_a_graph_gives_the_same_bits(case):
    module = case.graph()
    scope: dict[str, Any] = {}
    exec(graph_as_code(module, case.inputs()), scope)
    with torch.no_grad():
        assert same(scope["model"](*scope["inputs"]), module(*case.inputs()))


def test_a_quantized_graph_prints_as_a_program_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.randn(2, 3, 6, 6)
    quantized = qgraph.compile(model, [x], "w4a8")
    code = graph_as_code(quantized.graph_module, (x,))
    scope: dict[str, Any] = {}
    exec(code, scope)
    with torch.no_grad():
        assert same(scope["model"](*scope["inputs"]), quantized.graph_module(x))
    assert "import qgraph" in code


def test_a_large_tensor_is_replaced_and_said_to_be():
    module = qgraph.trace(nn.Linear(300, 200).eval(), torch.randn(2, 300))
    code = graph_as_code(module)
    assert "not its values" in code
    assert len(code) < 3000
    exec(code, {})


def test_odd_literals_survive():
    class Odd(nn.Module):
        def forward(self, x):
            y = x.masked_fill(x > 0, float("-inf")).to(torch.float64)
            return {"a": y, "b": [x.reshape(-1, 1), x[:, :1]], "c": x.new_zeros((0, 2))}

    x = torch.randn(2, 3)
    module = qgraph.trace(Odd().eval(), x)
    scope: dict[str, Any] = {}
    exec(graph_as_code(module, (x,)), scope)
    assert same(scope["model"](*scope["inputs"]), module(x))


def test_shrinking_finds_the_one_op_that_fails():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)]
    module = qgraph.trace(nn.Sequential(*layers).eval(), torch.randn(3, 4))

    def fails(part, sample):
        part(*sample.args)
        return any(n.target is torch.ops.aten.sigmoid.default for n in part.graph.nodes)

    small, sample = shrink(module, Sample((torch.randn(3, 4),)), fails)
    assert [n.op for n in small.graph.nodes] == ["placeholder", "call_function", "output"]
    assert sample.args[0].shape == (1, 4)
