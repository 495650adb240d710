# SPDX-License-Identifier: Apache-2.0
"""Write results over operands that nobody reads again: fewer buffers, fewer cache misses."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from qgraph.backends.integer.kernels import CONV_U8, LINEAR_I32, LINEAR_U8

aten = torch.ops.aten

# Elementwise float32 ops and their forms that write over the first operand.
IN_PLACE = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.round.default: aten.round_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.clamp.default: aten.clamp_.default,
    aten.clamp.Tensor: aten.clamp_.Tensor,
}
# Ops whose result is a new buffer.
_FRESH = frozenset({
    LINEAR_U8, LINEAR_I32, CONV_U8, aten.matmul.default, aten.bmm.default, aten.mm.default,
    aten.to.dtype, aten.div.Tensor, aten.linear.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input,
    *IN_PLACE, *IN_PLACE.values(),
})  # fmt: skip


def reuse_buffers(graph: Graph, owned: set[Node]) -> int:
    """Turn elementwise ops of lowering into in-place ones where that cannot be seen.

    Args:
        graph: the lowered graph.
        owned: calls that lowering emitted for its own arithmetic, all float32 of full shape.

    Returns:
        How many ops write in place.
    """
    count = 0
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node not in owned or node.target not in IN_PLACE or not isinstance(source, Node):
            continue
        if source in owned and len(source.users) == 1 and source.target in _FRESH:
            node.target = IN_PLACE[node.target]
            count += 1
    return count
