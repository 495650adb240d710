# SPDX-License-Identifier: Apache-2.0
"""Cut a part out of a graph: a slice from some values back to others, sharing all tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from qgraph.errors import PassError

aten = torch.ops.aten


def is_tensor(node: Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_size(node: Node) -> bool:
    """Whether the node's value is a symbolic or plain number."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int))


def by_name(module: GraphModule) -> dict[str, Node]:
    """The nodes of a graph by name."""
    return {node.name: node for node in module.graph.nodes}


def output_names(module: GraphModule) -> tuple[str, ...]:
    """Names of the tensors that a graph returns, in the order of its flattened output."""
    leaves = tree_leaves(module.graph.output_node().args[0])
    return tuple(dict.fromkeys(n.name for n in leaves if isinstance(n, Node) and is_tensor(n)))


def structured(module: GraphModule, values: Sequence[Tensor]) -> Any:
    """The values of `output_names` in the structure that the module returns."""
    given = dict(zip(output_names(module), values, strict=True))
    flat = tree_map(
        lambda leaf: given.get(leaf.name) if isinstance(leaf, Node) else leaf,
        module.graph.output_node().args[0],
    )
    return module.graph._codegen.process_outputs(flat)


def slice_between(
    module: GraphModule, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[list[Node], list[Node]]:
    """Nodes from `outputs` back to `inputs` in graph order, and sizes read off the inputs.

    A size of a value outside is not followed: it is read off an input of the same symbolic
    size, so that no number of one batch is frozen in.

    Raises:
        PassError: the slice reaches a placeholder that is no input.
    """
    nodes = by_name(module)
    given = {nodes[name] for name in inputs}
    pending = [nodes[name] for name in outputs]
    found: set[Node] = set()
    sizes: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in found or node in given or node in sizes:
            continue
        if is_size(node) and node.all_input_nodes and same_size(node, inputs, nodes) is not None:
            sizes.add(node)
            continue
        if node.op == "placeholder":
            msg = f"{outputs} do not follow from {list(inputs)}: {node.name} is needed too"
            raise PassError(msg, node=node.name)
        found.add(node)
        pending.extend(node.all_input_nodes)
    order = [node for node in module.graph.nodes if node in found]
    return order, [node for node in module.graph.nodes if node in sizes]


def same_size(node: Node, inputs: Sequence[str], nodes: dict[str, Node]) -> tuple[str, int] | None:
    """An input and its axis whose size is the number that `node` computes."""
    wanted = node.meta.get("val")
    if not isinstance(wanted, torch.SymInt):
        return None
    for name in inputs:
        value = nodes[name].meta.get("val")
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and str(size) == str(wanted):
                    return name, axis
    return None


def extract(module: GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> GraphModule:
    """A graph module from `inputs` to the tuple of `outputs`, by node name.

    Tensors are shared with `module`; node names and metadata are kept; the batch stays dynamic.

    Raises:
        PassError: the outputs need more than the inputs.
    """
    nodes = by_name(module)
    inside, sizes = slice_between(module, inputs, outputs)
    graph = Graph()
    twins: dict[Node, Node] = {}
    for name in inputs:
        twins[nodes[name]] = twin = graph.placeholder(name)
        twin.meta = dict(nodes[name].meta)
    for node in sizes:
        place = same_size(node, inputs, nodes)
        assert place is not None, "slice_between found the place"
        source = twins[nodes[place[0]]]
        twins[node] = graph.call_function(aten.sym_size.int, (source, place[1]))
        twins[node].meta = dict(node.meta)
    for node in inside:
        twins[node] = graph.node_copy(node, lambda n: twins[n])
    result: Any = map_arg(tuple(nodes[name] for name in outputs), lambda n: twins[n])
    graph.output(result)
    return GraphModule(module, graph)
