# SPDX-License-Identifier: Apache-2.0
"""Finding what computed a value, through the data movement between producer and consumer.

A per-tensor format chosen for a softmax or an activation function holds for every value that
only moves its elements: views, permutations, window partitions, slices, padding by zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from qgraph.graph.ops import MOVES, SPLITS, OpKind, argument, is_float, kind

aten = torch.ops.aten

SOFTMAX = frozenset({
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default,
})  # fmt: skip
# Activation functions with a small negative floor; the lower ends are what they reach.
FLOORED = frozenset({
    aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.mish.default,
    aten.elu.default,
})  # fmt: skip
RECTIFIED = frozenset({aten.relu.default, aten.relu6.default})
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout})
_PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})
_FILLS = frozenset({aten.masked_fill.Scalar})


def moved_source(node: Node) -> Node | None:
    """The value whose elements `node` hands on, or None where it computes something."""
    if node.op != "call_function" or not node.args:
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        parent = node.args[0]
        split = isinstance(parent, Node) and parent.target in SPLITS
        return parent.args[0] if split and isinstance(parent, Node) else None  # type: ignore[return-value]
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if node.target in MOVES or (node.target in _CASTS and is_float(node) and is_float(source)):
        return source
    if node.target in _PADS and _pads_with_zero(node):
        return source
    if node.target in _FILLS and argument(node, 2) == 0:  # rows without any key become 0
        return source
    return None


def _pads_with_zero(node: Node) -> bool:
    if node.target is aten.pad.default:
        mode, value = argument(node, 2), argument(node, 3)
        return mode != "constant" or value in {None, 0}
    return argument(node, 2) in {None, 0}


def producers(node: Node) -> Iterator[Node]:
    """`node` and the values it stems from by movement alone, nearest first."""
    current: Node | None = node
    while current is not None:
        yield current
        current = moved_source(current)


def producer(node: Node) -> Node:
    """The node that computed what `node` moves."""
    *_, last = producers(node)
    return last


def softmax_behind(node: Node) -> Node | None:
    """The softmax whose values `node` moves, or None."""
    source = producer(node)
    return source if source.target in SOFTMAX else None


def activation_behind(node: Node) -> Node | None:
    """The GELU-like function whose values `node` moves, or None.

    ``x * sigmoid(k x)`` counts; an activation that is multiplied by something else (GEGLU,
    SwiGLU) does not: the product has another distribution.
    """
    source = producer(node)
    if source.target in FLOORED or (source.target is aten.mul.Tensor and _is_swish(source)):
        return source
    return None


def rectified_behind(node: Node) -> Node | None:
    """The ReLU whose values `node` moves (max pooling is movement), or None."""
    source = producer(node)
    while kind(source) is OpKind.MAX_POOL and isinstance(source.args[0], Node):
        source = producer(source.args[0])
    return source if source.target in RECTIFIED else None


def _is_swish(node: Node) -> bool:
    """``x * sigmoid(x)`` or ``x * sigmoid(k * x)``, in either order."""
    first, second = node.args[:2]
    for x, gate in ((first, second), (second, first)):
        if not isinstance(gate, Node) or gate.target is not aten.sigmoid.default:
            continue
        inner = gate.args[0]
        if inner is x:
            return True
        scaled = isinstance(inner, Node) and inner.target is aten.mul.Tensor
        if scaled and isinstance(inner, Node) and x in inner.args:
            other = inner.args[1] if inner.args[0] is x else inner.args[0]
            return not isinstance(other, Node) or other.op == "get_attr"
    return False


def is_normalised_after(node: Node) -> bool:
    """Whether all that reads the value, movement and sums aside, are norms over its channels.

    So it is behind the sums of post-norm transformers, where an error counts relative to the size
    of its row. In a pre-norm stream, or a decoder, the value itself lives on: it counts as it is.
    """
    pending, seen = list(node.users), set()
    found = False
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if kind(user) is OpKind.NORM:
            found = True
        elif kind(user) is OpKind.ADD or moved_source(user) is not None:
            pending.extend(user.users)
        else:
            return False
    return found
