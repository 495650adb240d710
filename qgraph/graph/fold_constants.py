# SPDX-License-Identifier: Apache-2.0
"""Folding what depends on no input into buffers: masks, position tables, derived weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qgraph.graph.build import attribute, insert_buffer

# Larger results are only folded when their inputs are as large: a folded `expand` must not turn
# a few numbers into gigabytes.
_MAX_ELEMENTS = 1 << 22


def fold_constants(module: GraphModule) -> bool:
    """Replace calls whose inputs are all constant by a buffer that holds their value."""
    values = _constant_values(module)
    fold: list[Node] = []
    # backwards: a constant is worth a buffer where something that stays reads it
    stays = {node for node in module.graph.nodes if node not in values}
    for node in reversed(list(module.graph.nodes)):
        if node not in values or node.op == "get_attr" or not any(u in stays for u in node.users):
            continue
        if _is_foldable(node, values):
            fold.append(node)
        else:
            stays.add(node)
    for node in reversed(fold):
        value = values[node].detach().clone(memory_format=torch.contiguous_format)
        constant = insert_buffer(module, node.name, value, before=node)
        constant.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    if fold:
        _drop_dead(module, values)
    return bool(fold)


def _constant_values(module: GraphModule) -> dict[Node, Any]:
    """Values of all nodes that depend on no input and always come out the same."""
    written = {
        str(source.target)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in written:
                value = attribute(module, str(node.target))
                if isinstance(value, Tensor):
                    values[node] = value
            elif _is_pure_call(node) and all(i in values for i in node.all_input_nodes):
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _is_pure_call(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _is_foldable(node: Node, values: dict[Node, Any]) -> bool:
    value = values[node]
    # a returned constant is made anew by every call, so that callers may write to it
    if not isinstance(value, Tensor) or any(user.op == "output" for user in node.users):
        return False
    inputs = [values[i] for i in node.all_input_nodes]
    largest = max((v.numel() for v in inputs if isinstance(v, Tensor)), default=0)
    return value.numel() <= max(_MAX_ELEMENTS, largest)


def _drop_dead(module: GraphModule, values: dict[Node, Any]) -> None:
    for node in reversed(list(module.graph.nodes)):
        if node in values and not node.users:
            module.graph.erase_node(node)
