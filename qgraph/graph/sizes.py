# SPDX-License-Identifier: Apache-2.0
"""Sizes of values in a graph: integers where known, `sym_size` nodes where symbolic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int, statically_known_true

from qgraph.graph.build import insert_call


def shape_of(node: Node) -> tuple[Any, ...]:
    """The (possibly symbolic) shape of a tensor node; () for what has no tensor value."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def rank_of(node: Node) -> int:
    """Number of dimensions."""
    return len(shape_of(node))


def same_shape(first: Node, second: Node) -> bool:
    """Whether both shapes are known to be equal, for every value of the symbols."""
    a, b = shape_of(first), shape_of(second)
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def size_of(module: GraphModule, node: Node, axis: int, *, before: Node) -> int | Node:
    """The size along an axis: an int, or a new node that reads it at run time."""
    size = shape_of(node)[axis]
    if is_concrete_int(size):
        return int(size)
    target = torch.ops.aten.sym_size.int
    axis %= rank_of(node)
    return insert_call(module, target, node, axis, like=node, before=before)
