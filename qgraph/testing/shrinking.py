# SPDX-License-Identifier: Apache-2.0
"""Cut a graph down to the smallest part that still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.errors import PassError
from qgraph.graph.extract import extract, is_tensor
from qgraph.graph.verify import Sample

Fails = Callable[[GraphModule, Sample], bool]
MAX_TRIALS = 120


def shrink(module: GraphModule, sample: Sample, fails: Fails) -> tuple[GraphModule, Sample]:
    """The smallest part of a graph found for which `fails` still holds.

    First the output moves up to the earliest value at which the failure shows, then the inputs
    move down towards it; values that were computed before become inputs.

    Args:
        module: a traced graph that fails on the sample; not changed.
        sample: its inputs.
        fails: asked about parts of the graph with fitting samples; it must not change them.
    """
    values = _values(module, sample)
    trials = 0
    best = (module, sample)
    for inputs, outputs in _cuts(module, values):
        if trials >= MAX_TRIALS:
            break
        part = _part(module, values, inputs, outputs)
        if part is None or len(part[0].graph.nodes) >= len(best[0].graph.nodes):
            continue
        trials += 1
        if fails(*part):
            best = part
    one = Sample(tuple(_first(item) for item in best[1].args), best[1].kwargs)
    return (best[0], one) if best[0] is not module and fails(best[0], one) else best


def _values(module: GraphModule, sample: Sample) -> dict[str, Any]:
    runner = Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        runner.run(*tree_leaves((sample.args, sample.kwargs)), enable_io_processing=False)
    return {node.name: value for node, value in runner.env.items()}


def _cuts(module: GraphModule, values: dict[str, Any]) -> Iterator[tuple[list[str], list[str]]]:
    """Single nodes first, then growing neighbourhoods, then everything up to a node."""
    nodes = [
        n for n in module.graph.nodes
        if n.op == "call_function" and is_tensor(n) and isinstance(values.get(n.name), Tensor)
    ]  # fmt: skip
    for depth in (1, 2, 3, 4, 6):
        for node in nodes:
            inputs = _frontier(node, depth)
            if inputs:
                yield inputs, [node.name]
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder" and n.users]
    for node in nodes:
        yield holders, [node.name]


def _frontier(node: Node, depth: int) -> list[str]:
    """Tensors from which the node follows in `depth` steps; constants stay inside."""
    inside, edge = {node}, [node]
    for _ in range(depth - 1):
        edge = [i for n in edge for i in n.all_input_nodes if i.op == "call_function"]
        inside.update(edge)
    outside = {i for n in inside for i in n.all_input_nodes if i not in inside}
    return [
        i.name for i in node.graph.nodes if i in outside and is_tensor(i) and i.op != "get_attr"
    ]


def _part(
    module: GraphModule, values: dict[str, Any], inputs: list[str], outputs: list[str]
) -> tuple[GraphModule, Sample] | None:
    try:
        part = extract(module, inputs, outputs)
    except PassError:
        return None
    part.meta.update(module.meta)
    used = [n for n in part.graph.nodes if n.op == "placeholder"]
    return part, Sample(tuple(values[n.name] for n in used))


def _first(item: Any) -> Any:
    return item[:1] if isinstance(item, Tensor) and item.ndim else item
