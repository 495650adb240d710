# SPDX-License-Identifier: Apache-2.0
"""Edges reach into arguments of any depth and change exactly one of them."""

from __future__ import annotations

from typing import Any

import pytest
from torch.fx import Graph, Node

from qgraph.graph.edges import Edge, in_edges, out_edges


def nothing(*args: object, **kwargs: object) -> None:
    """What calls in these graphs stand for."""


def drawn() -> tuple[Graph, Node, Node, Node, Node]:
    graph = Graph()
    x, y, new = (graph.placeholder(name) for name in ("x", "y", "new"))
    args: Any = (3, [x, (y, [None, x]), "z"], (y, 1.0), x)
    call = graph.call_function(nothing, args, {"first": [y, (x, y)], "last": x, "other": None})
    return graph, x, y, new, call


PATHS = [
    (1, 0), (1, 1, 0), (1, 1, 1, 1), (2, 0), (3,), ("first", 0), ("first", 1, 0), ("first", 1, 1),
    ("last",),
]  # fmt: skip
SOURCES = "xyxyxyxyx"


def test_all_edges_are_found_in_the_order_of_arguments() -> None:
    graph, x, y, new, call = drawn()
    edges = list(in_edges(call))
    assert [e.path for e in edges] == PATHS
    assert [e.consumer for e in edges] == [call] * 9
    assert "".join(e.source.name for e in edges) == SOURCES
    later = graph.call_function(nothing, (y, x))
    assert [e.path for e in out_edges(x)] == [
        p for p, source in zip(PATHS, SOURCES, strict=True) if source == "x"
    ] + [(1,)]
    assert list(out_edges(y))[-1] == Edge(later, (0,))
    assert list(out_edges(new)) == []
    assert list(in_edges(x)) == []


@pytest.mark.parametrize("at", range(9))
def test_one_edge_changes_and_all_others_and_the_kinds_of_containers_stay(at):
    _, _, _, new, call = drawn()
    Edge(call, PATHS[at]).redirect(new)
    wanted = [*SOURCES]
    wanted[at] = "new"
    edges = list(in_edges(call))
    assert [e.path for e in edges] == PATHS
    assert [e.source.name for e in edges] == wanted
    args: Any = call.args
    kwargs: Any = call.kwargs
    assert args[0] == 3
    assert isinstance(args[1], list)
    assert isinstance(args[1][1], tuple)
    assert isinstance(args[1][1][1], list)
    assert (args[1][1][1][0], args[1][2], args[2][1]) == (None, "z", 1.0)
    assert isinstance(args[2], tuple)
    assert isinstance(kwargs["first"], list)
    assert isinstance(kwargs["first"][1], tuple)
    assert list(kwargs) == ["first", "last", "other"]
    assert new in call.all_input_nodes


def test_edges_are_equal_by_place_and_print_it() -> None:
    _, x, _, _, call = drawn()
    assert Edge(call, (1, 0)) == Edge(call, (1, 0)) != Edge(call, (1, 1, 0))
    assert Edge(call, (3,)) != Edge(x, (3,))
    assert str(Edge(call, ("first", 1, 0))) == "nothing[first.1.0]"
    with pytest.raises(AssertionError, match="not a node"):
        _ = Edge(call, (0,)).source
