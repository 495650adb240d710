# SPDX-License-Identifier: Apache-2.0
"""Arguments reach the placeholders of a graph in their order, however they are passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qgraph.backends.calling import flat_inputs, structured_outputs
from qgraph.errors import InputError
from qgraph.graph.trace import trace

A, B, C, D = (torch.full((2, 3), float(i)) for i in range(4))


class Nested(nn.Module):
    def forward(self, first: Tensor, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> Any:
        total = first + 2 * pair[0] + 3 * pair[1] + 5 * named["d"]
        return {"total": total, "parts": [first - pair[1], named["d"] * 2]}


def same(found: list[Any], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((A, (B, C), {"d": D}), {}),
    ((A, (B, C)), {"named": {"d": D}}),
    ((A,), {"pair": (B, C), "named": {"d": D}}),
    ((), {"first": A, "pair": (B, C), "named": {"d": D}}),
]


@pytest.mark.parametrize("traced_as", range(4))
def test_every_way_to_call_gives_the_same_inputs_and_structure(traced_as: int) -> None:
    args, kwargs = CALLS[traced_as]
    module = trace(Nested().eval(), *args, **kwargs)
    for other, named in CALLS:
        assert same(flat_inputs(module, other, named), [A, B, C, D])
    total, first, second = A + 2 * B + 3 * C + 5 * D, A - C, D * 2
    flat = next(n for n in module.graph.nodes if n.op == "output").args[0]
    assert len(flat) == 3
    found = structured_outputs(module, [total, first, second])
    assert found == {"total": total, "parts": [first, second]}
    for args, kwargs in (((A,), {}), ((A, (B, C), {"d": D}, A), {}), (CALLS[0][0], {"odd": A})):
        with pytest.raises(InputError, match="do not fit the model's signature"):
            flat_inputs(module, args, kwargs)


def test_a_graph_without_a_structure_takes_its_placeholders_and_their_defaults() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.placeholder("y", default_value=7)
    graph.output(graph.call_function(torch.add, (x, y)))
    module = GraphModule(nn.Module(), graph)
    assert flat_inputs(module, (A,), {}) == [A, 7]
    assert flat_inputs(module, (), {"y": 3, "x": A}) == [A, 3]
    assert structured_outputs(module, A) is A


@pytest.mark.parametrize("structure", [(0, (0, 0)), (0, (0, 0), 0), [0, [0, 0]], ((0, 0), [0])])
def test_a_structure_of_positional_arguments_alone_is_followed(structure: Any) -> None:
    graph = Graph()
    leaves = pytree.tree_leaves(structure)
    names = [f"x{i}" for i in range(len(structure))]
    taken = [graph.placeholder(f"leaf{i}") for i in range(len(leaves))]
    graph.output((taken[0],))
    spec = pytree.tree_structure(structure)
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(["self", *names], spec, None))
    module = GraphModule(nn.Module(), graph)
    given = pytree.tree_unflatten([A, B, C, D][: len(leaves)], spec)
    assert same(flat_inputs(module, tuple(given), {}), [A, B, C, D][: len(leaves)])
    assert same(
        flat_inputs(module, (given[0],), dict(zip(names[1:], given[1:], strict=True))),
        [A, B, C, D][: len(leaves)],
    )
