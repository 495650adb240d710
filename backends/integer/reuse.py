# SPDX-License-Identifier: Apache-2.0
"""Write results over operands that nobody reads again: fewer buffers, fewer cache misses."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from qgraph.backends.integer.kernels import CONV_U8, LINEAR_I32, LINEAR_U8

aten = torch.ops.aten

# Elementwise ops and their forms that write over the first operand.
IN_PLACE = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.round.default: aten.round_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.clamp.default: aten.clamp_.default,
    aten.clamp.Tensor: aten.clamp_.Tensor,
    aten.relu.default: aten.relu_.default,
}
# Ops whose result is a new buffer, whatever their operands.
_FRESH = frozenset({
    LINEAR_U8, LINEAR_I32, CONV_U8, aten.matmul.default, aten.bmm.default, aten.mm.default,
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input,
    aten.cat.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default,
    aten.tanh.default, aten.softmax.int, aten.layer_norm.default, aten.embedding.default,
    aten.upsample_bilinear2d.vec, aten.avg_pool2d.default, aten.hardswish.default,
    aten.exp.default, *IN_PLACE, *IN_PLACE.values(),
})  # fmt: skip


def reuse_buffers(graph: Graph, owned: set[Node]) -> int:
    """Turn elementwise ops into in-place ones where nobody can see it.

    Args:
        graph: the lowered graph; calls taken over from the source carry its `meta["val"]`.
        owned: calls that lowering emitted for its own arithmetic, whose result has the shape of
            their first operand and cannot alias anything.

    Returns:
        How many ops write in place.
    """
    count = 0
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target not in IN_PLACE or not isinstance(source, Node) or node.kwargs:
            continue
        fresh = source.target in _FRESH or (source in owned and source.target is aten.to.dtype)
        if fresh and len(source.users) == 1 and (node in owned or _same_shape(node, source)):
            node.target = IN_PLACE[node.target]
            count += 1
    return count


def _same_shape(node: Node, source: Node) -> bool:
    """Whether the result fits the operand's buffer: equal shape and dtype, known from metadata."""
    ours, theirs = node.meta.get("val"), source.meta.get("val")
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return False
    return ours.dtype == theirs.dtype and list(ours.shape) == list(theirs.shape)
