# SPDX-License-Identifier: Apache-2.0
"""The lines of a graph that an error shows: around the node, never past either end."""

import pytest
from torch.fx import Graph, GraphModule
from torch.nn import Module

from qgraph.graph.verify import excerpt


@pytest.mark.parametrize(("at", "before", "after"), [(0, 0, 2), (1, 1, 2), (5, 2, 2), (9, 2, 0)])
def test_lines_around_a_node_are_shown_and_it_is_marked(at, before, after):
    graph = Graph()
    value = graph.placeholder("x")
    for _ in range(8):
        value = graph.call_method("relu", (value,))
    graph.output(value)
    nodes = list(graph.nodes)
    lines = excerpt(GraphModule(Module(), graph), nodes[at], context=2).splitlines()
    names = [node.format_node() for node in nodes[at - before : at + after + 1]]
    assert [line[4:] for line in lines] == names
    assert [line.startswith(">>> ") for line in lines] == [i == before for i in range(len(lines))]
