# SPDX-License-Identifier: Apache-2.0
"""Results are written over operands exactly where nobody else can see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from qgraph.backends.integer.reuse import IN_PLACE, reuse_buffers

aten = torch.ops.aten
BIG, SMALL = torch.zeros(2, 3), torch.zeros(3)


def chain(
    first: Any, second: Any, *, owned: tuple[bool, bool] = (True, True), readers: int = 1,
    values: tuple[Tensor | None, Tensor | None] = (BIG, BIG), rest: tuple[Any, ...] = (),
    **kwargs: Any,
) -> tuple[int, Any]:  # fmt: skip
    """``second(first(x))``: how many write in place, and what the second became."""
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(first, (x,))
    b = graph.call_function(second, (a, *rest), kwargs)
    others = [graph.call_function(aten.neg.default, (a,)) for _ in range(readers - 1)]
    for node, value in zip((a, b), values, strict=True):
        if value is not None:
            node.meta["val"] = value
    graph.output((b, *others))
    mine = {node for node, own in zip((a, b), owned, strict=True) if own}
    return reuse_buffers(graph, mine), b.target


@pytest.mark.parametrize("op", IN_PLACE, ids=str)
def test_every_elementwise_op_has_a_form_that_writes_over_its_operand(op: Any) -> None:
    assert chain(aten.exp.default, op) == (1, IN_PLACE[op])
    name = str(op).split(".")[1]
    assert str(IN_PLACE[op]) == str(op).replace(name, f"{name}_")


def test_operands_that_somebody_else_reads_are_left_alone() -> None:
    for readers, count in ((1, 1), (2, 0), (3, 0)):
        assert chain(aten.exp.default, aten.round.default, readers=readers)[0] == count


def test_only_fresh_results_are_written_over() -> None:
    assert chain(aten.view.default, aten.round.default)[0] == 0
    assert chain(aten.matmul.default, aten.round.default)[0] == 1
    assert chain(aten.to.dtype, aten.round.default)[0] == 1  # lowering's own conversion copies
    assert chain(aten.to.dtype, aten.round.default, owned=(False, True))[0] == 0
    assert chain(aten.view.default, aten.round.default, owned=(True, True))[0] == 0
    assert chain(aten.exp.default, aten.neg.default)[0] == 0
    assert chain(aten.exp.default, aten.round.default, decimals=1)[0] == 0


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ((BIG, BIG), 1), ((SMALL, BIG), 0), ((BIG, SMALL), 0), ((BIG, BIG.double()), 0),
        ((None, BIG), 0), ((BIG, None), 0), ((BIG, BIG.mT), 0),
    ],
)  # fmt: skip
def test_calls_taken_over_from_the_source_must_fit_the_buffer(
    values: tuple[Tensor | None, Tensor | None], count: int
) -> None:
    found = chain(aten.exp.default, aten.add.Tensor, owned=(True, False), values=values, rest=(1,))
    assert found[0] == count
    assert chain(aten.exp.default, aten.add.Tensor, values=values, rest=(1,))[0] == 1


def test_chains_are_written_in_place_step_by_step() -> None:
    graph = Graph()
    node: Node = graph.call_function(aten.exp.default, (graph.placeholder("x"),))
    steps = [graph.call_function(aten.mul.Tensor, (node, 2))]
    steps.append(graph.call_function(aten.round.default, (steps[-1],)))
    steps.append(graph.call_function(aten.clamp.default, (steps[-1], 0, 9)))
    lone = graph.call_function(aten.mul.Tensor, (3, steps[-1]))
    graph.output((steps[-1], lone))
    assert reuse_buffers(graph, set(steps)) == 3
    assert [str(s.target) for s in steps] == [
        "aten.mul_.Tensor",
        "aten.round_.default",
        "aten.clamp_.default",
    ]
