# SPDX-License-Identifier: Apache-2.0
"""What the ATen ops of a canonical graph are: kind, operands, axes. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.fx import Node

aten = torch.ops.aten


class OpKind(StrEnum):
    """The kinds of ops that passes and backends tell apart."""

    LINEAR = "linear"
    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    MATMUL = "matmul"
    ADD = "add"
    MUL = "mul"
    CAT = "cat"
    SOFTMAX = "softmax"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    MOVE = "move"
    MAX_POOL = "max_pool"
    POOL = "pool"
    RESIZE = "resize"
    EMBEDDING = "embedding"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Product:
    """Operands of a linear-algebra op.

    Attributes:
        data, weight: argument positions of the two factors.
        bias: position of the bias, or None.
        data_axis: contraction (channel) axis of the data operand.
        weight_axis: output-channel axis of the weight operand.
    """

    data: int
    weight: int
    bias: int | None
    data_axis: int
    weight_axis: int


_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)

PRODUCTS: dict[object, Product] = {
    aten.linear.default: Product(0, 1, 2, -1, 0),
    **dict.fromkeys(_CONVS, Product(0, 1, 2, 1, 0)),
    **dict.fromkeys(_TRANSPOSED, Product(0, 1, 2, 1, 1)),
    **dict.fromkeys(_MATMULS, Product(0, 1, None, -1, -1)),
}

# Monotone or not, each is a function of one element; `where it is monotone` matters to no one
# here, because tables hold any function.
ELEMENTWISE = frozenset({
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default,
    aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.mish.default,
    aten.elu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.relu6.default,
    aten.softplus.default, aten.exp.default, aten.sqrt.default, aten.rsqrt.default,
    aten.erf.default, aten.abs.default, aten.neg.default, aten.log.default,
    aten.reciprocal.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.sin.default, aten.cos.default,
})  # fmt: skip

# Ops that only move elements: every output element is some input element.
MOVES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.roll.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.flip.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.narrow.default, aten.movedim.int,
    aten.movedim.intlist, aten.dropout.default,
})  # fmt: skip

# Ops with several outputs that only move elements; their `getitem` users are moves as well.
SPLITS = frozenset({
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
})  # fmt: skip

_KINDS: dict[object, OpKind] = {
    aten.linear.default: OpKind.LINEAR,
    **dict.fromkeys(_CONVS, OpKind.CONV),
    **dict.fromkeys(_TRANSPOSED, OpKind.CONV_TRANSPOSE),
    **dict.fromkeys(_MATMULS, OpKind.MATMUL),
    aten.add.Tensor: OpKind.ADD,
    aten.sub.Tensor: OpKind.ADD,
    aten.mul.Tensor: OpKind.MUL,
    aten.cat.default: OpKind.CAT,
    aten.softmax.int: OpKind.SOFTMAX,
    aten._softmax.default: OpKind.SOFTMAX,
    aten.layer_norm.default: OpKind.NORM,
    aten.native_layer_norm.default: OpKind.NORM,
    aten.group_norm.default: OpKind.NORM,
    aten.instance_norm.default: OpKind.NORM,
    aten.rms_norm.default: OpKind.NORM,
    aten.embedding.default: OpKind.EMBEDDING,
    aten.max_pool2d.default: OpKind.MAX_POOL,
    aten.max_pool1d.default: OpKind.MAX_POOL,
    aten.avg_pool2d.default: OpKind.POOL,
    aten.adaptive_avg_pool2d.default: OpKind.POOL,
    aten.mean.dim: OpKind.POOL,
    aten.upsample_nearest2d.vec: OpKind.RESIZE,
    aten.upsample_nearest2d.default: OpKind.RESIZE,
    aten.upsample_bilinear2d.vec: OpKind.RESIZE,
    aten.upsample_bilinear2d.default: OpKind.RESIZE,
    aten.upsample_bicubic2d.vec: OpKind.RESIZE,
    **dict.fromkeys(ELEMENTWISE, OpKind.ELEMENTWISE),
    **dict.fromkeys(MOVES | SPLITS, OpKind.MOVE),
}


def kind(node: Node) -> OpKind:
    """The kind of a node; `OTHER` for whatever has no entry."""
    if node.op != "call_function":
        return OpKind.OTHER
    if getattr(node.target, "__name__", "") == "getitem":
        parent = node.args[0]
        return kind(parent) if isinstance(parent, Node) else OpKind.OTHER
    return _KINDS.get(node.target, OpKind.OTHER)


def product(node: Node) -> Product | None:
    """Operand positions if the node is a linear, convolution or matrix product."""
    return PRODUCTS.get(node.target) if node.op == "call_function" else None


def argument(node: Node, position: int) -> object:
    """Positional argument of a node, looked up by schema name when given as a keyword."""
    if position < len(node.args):
        return node.args[position]
    schema = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return None
    declared = schema.arguments[position]
    return node.kwargs.get(declared.name, declared.default_value)


def is_float(node: Node) -> bool:
    """Whether the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def constants(nodes: list[Node]) -> set[Node]:
    """All nodes of a topologically sorted list that depend on no input."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(i in found for i in node.all_input_nodes)
        ):
            found.add(node)
    return found
