# SPDX-License-Identifier: Apache-2.0
"""Constants of a graph module, identified by storage: tied weights are one tensor."""

from __future__ import annotations

from itertools import chain

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.errors import PassError
from qgraph.graph.build import attribute

_Identity = tuple[object, ...]


def get_attr_tensor(module: GraphModule, node: Node) -> Tensor:
    """The tensor that a get_attr node reads.

    Raises:
        PassError: the node reads no tensor.
    """
    if node.op == "get_attr":
        value = attribute(module, str(node.target))
        if isinstance(value, Tensor):
            return value
    msg = f"{node.name} is no constant tensor: {node.format_node()}"
    raise PassError(msg, node=node.name)


def stored_operand(module: GraphModule, node: Node, position: int) -> Tensor:
    """The stored tensor that an argument of a node reads, such as a weight.

    Raises:
        PassError: there is no such argument, or it is computed.
    """
    source = node.args[position] if position < len(node.args) else None
    if isinstance(source, Node):
        return get_attr_tensor(module, source)
    msg = f"argument {position} of {node.name} is {source!r}, no stored tensor"
    raise PassError(msg, node=node.name)


def _identity(name: str, tensor: Tensor) -> _Identity:
    pointer = tensor.untyped_storage().data_ptr()
    if pointer == 0:  # empty and fake tensors all sit at 0: only their name tells them apart
        return (name,)
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def weight_keys(module: GraphModule) -> dict[str, str]:
    """Canonical name of every parameter and buffer: the first name of its storage.

    One pass over the module: use this, not `weight_key`, for questions about many nodes.
    """
    first: dict[_Identity, str] = {}
    named = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    return {name: first.setdefault(_identity(name, tensor), name) for name, tensor in named}


def weight_key(module: GraphModule, node: Node) -> str:
    """Canonical name of the tensor that a get_attr node reads, equal for tied weights."""
    return weight_keys(module).get(str(node.target), str(node.target))
