# SPDX-License-Identifier: Apache-2.0
"""Exact rewrites of the quantized graph that let onnxruntime use integer kernels.

Quantizers move up through max pooling, pixel shuffles and concatenation (quantization is
monotone and elementwise, so the codes stay the same), until they sit behind the convolution
that makes the value. Convolutions are rewritten where only another form has an integer kernel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from qgraph.backends.onnx.convolutions import (
    is_open,
    one_per_encoding,
    patches_to_linear,
    transposed_to_phases,
)
from qgraph.backends.semantics import resamples_levels
from qgraph.formats import AffineEncoding
from qgraph.graph import dialect
from qgraph.graph.build import attribute, insert_buffer, insert_call
from qgraph.graph.edges import in_edges

aten = torch.ops.aten
# quantize(f(x)) = f(quantize(x)) for these: they pick or move elements, and order is kept.
_POOLS = frozenset({aten.max_pool2d.default, aten.max_pool1d.default})
_COMMUTING = _POOLS | frozenset({
    aten.pixel_shuffle.default,
    aten.permute.default, aten.reshape.default, aten.view.default, aten.flatten.using_ints,
})  # fmt: skip


def place(module: GraphModule) -> None:
    """Apply the rewrites, in place."""
    for node in list(module.graph.nodes):
        if node.target is aten.conv_transpose2d.input:
            transposed_to_phases(module, node)
        elif resamples_levels(module, node):
            _scale_afterwards(module, node)
    pending = [n for n in module.graph.nodes if n.target is dialect.QUANTIZE]
    while pending:
        pending.extend(_raise(module, pending.pop()))
    module.graph.eliminate_dead_code()
    for node in list(module.graph.nodes):
        if node.target is aten.conv2d.default:
            if is_open(node):
                patches_to_linear(module, node)
            else:
                one_per_encoding(module, node)
    module.graph.eliminate_dead_code()


def _scale_afterwards(module: GraphModule, node: Node) -> None:
    """Interpolate levels and scale the result, as the other backends do."""
    source: Any = node.args[0]
    scale = attribute(module, str(source.args[1].target))
    one = insert_buffer(module, f"{source.name}_one", torch.ones_like(scale), before=node)
    args, interpolate = (source.args[0], one, *source.args[2:]), cast(Any, node.target)
    levels = insert_call(module, source.target, *args, like=source, before=node)
    between = insert_call(module, interpolate, levels, *node.args[1:], like=node, before=node)
    factor = insert_buffer(module, f"{source.name}_scale", scale.reshape(()), before=node)
    scaled = insert_call(module, aten.mul.Tensor, between, factor, like=node, before=node)
    node.replace_all_uses_with(scaled)
    module.graph.erase_node(node)


def _raise(module: GraphModule, node: Node) -> list[Node]:
    """Move one quantizer up one step; returns the quantizers that may move further."""
    if node._erased:  # a twin took its place meanwhile
        return []
    source = node.args[0]
    encoding = dialect.encoding_of(module, node)
    assert isinstance(source, Node)
    assert isinstance(encoding, AffineEncoding)
    if encoding.axis is not None or encoding.zero_point.ndim:
        return []
    zero = int(encoding.zero_point)
    if source.target is aten.relu.default and (encoding.qmin >= 0 or zero == encoding.qmin):
        # quantize(relu(x)) clamps the codes of x at the zero point
        node.args = (source.args[0], *node.args[1:3], zero, *node.args[4:])
        return [node]
    if not _only_this(module, source, node):
        return []
    if source.target in _POOLS and encoding.qmax - encoding.qmin > 255:
        return []  # ONNX pools bytes or floats, not 16-bit codes
    if source.target in _COMMUTING:
        operands = [source.args[0]]
    elif source.target is aten.cat.default:
        operands = [e.source for e in in_edges(source)]
    else:
        return []
    quantized = {o: _quantize_before(module, node, o) for o in dict.fromkeys(operands)}
    first: Any = (
        [quantized[o] for o in operands] if source.target is aten.cat.default
        else quantized[operands[0]]
    )  # fmt: skip
    moved = insert_call(
        module,
        source.target,
        first,
        *source.args[1:],
        like=source,
        before=node,
        **source.kwargs,
    )
    node.replace_all_uses_with(moved)
    module.graph.erase_node(node)
    if not source.users:
        module.graph.erase_node(source)
    return [n for n in quantized.values() if n.target is dialect.QUANTIZE]


def _only_this(module: GraphModule, source: Node, node: Node) -> bool:
    """Whether nothing reads the value in float and no second encoding is asked of it."""
    return all(u is node or _same(module, u, node) for u in source.users)


def _same(module: GraphModule, other: Node, node: Node) -> bool:
    if other.target is not dialect.QUANTIZE:
        return False
    mine, theirs = (dialect.encoding_of(module, n) for n in (node, other))
    assert isinstance(mine, AffineEncoding)
    assert isinstance(theirs, AffineEncoding)
    return (
        mine.axis == theirs.axis and (mine.qmin, mine.qmax) == (theirs.qmin, theirs.qmax)
        and torch.equal(mine.scale, theirs.scale)
        and torch.equal(mine.zero_point, theirs.zero_point)
    )  # fmt: skip


def _quantize_before(module: GraphModule, node: Node, value: Any) -> Node:
    """The quantizer of `value` with the encoding of `node`: one that exists, or a new one."""
    if value.target is dialect.DEQUANTIZE and _same_decode(module, value, node):
        return value.args[0]  # type: ignore[no-any-return]
    for user in value.users:
        if _same(module, user, node) and user < node:
            return user  # type: ignore[no-any-return]
    return insert_call(module, dialect.QUANTIZE, value, *node.args[1:], like=node, before=node)


def _same_decode(module: GraphModule, value: Node, node: Node) -> bool:
    """Whether `value` decodes codes of the very encoding asked for (then codes pass through)."""
    mine, theirs = dialect.encoding_of(module, node), dialect.encoding_of(module, value)
    assert isinstance(mine, AffineEncoding)
    assert isinstance(theirs, AffineEncoding)
    same_codes = (mine.qmin, mine.qmax, mine.axis) == (theirs.qmin, theirs.qmax, theirs.axis)
    return same_codes and torch.equal(mine.scale, theirs.scale) and torch.equal(
        mine.zero_point, theirs.zero_point
    )  # fmt: skip
