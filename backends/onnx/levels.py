# SPDX-License-Identifier: Apache-2.0
"""Formats given by a table, in standard ops: a binary search over thresholds, a Gather.

Any sorted table works, and the comparisons are the ones of the simulator, in fp32, so the
decisions agree bit for bit. The price is one Gather, Greater, Where and Add per bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnx import ops
from qgraph.formats import LevelEncoding
from qgraph.formats.base import along
from qgraph.graph import dialect
from qgraph.graph.build import insert_buffer, insert_call


def lower_level_nodes(module: GraphModule) -> None:
    """Replace quantize_levels and dequantize_levels by rank search and table lookup."""
    for node in list(module.graph.nodes):
        if node.target is dialect.QUANTIZE_LEVELS:
            _lower_rank(module, node)
        elif node.target is dialect.DEQUANTIZE_LEVELS:
            _lower_lookup(module, node)


def _encoding(module: GraphModule, node: Node) -> LevelEncoding:
    encoding = dialect.encoding_of(module, node)
    assert isinstance(encoding, LevelEncoding)
    return encoding


def _lower_rank(module: GraphModule, node: Node) -> None:
    encoding = _encoding(module, node)
    ndim = node.meta["val"].ndim
    thresholds, steps = padded(encoding.thresholds)
    offsets = _offsets(module, node, thresholds, encoding, ndim)
    scale = insert_buffer(
        module, f"{node.name}_scale", along(encoding.scale, encoding.axis, ndim), before=node
    )
    table = insert_buffer(module, f"{node.name}_thresholds", thresholds.flatten(), before=node)
    ranks = insert_call(
        module, ops.RANK, node.args[0], scale, table, offsets, steps, like=node, before=node
    )
    node.replace_all_uses_with(ranks)
    module.graph.erase_node(node)


def _lower_lookup(module: GraphModule, node: Node) -> None:
    encoding = _encoding(module, node)
    ndim = node.meta["val"].ndim
    values = encoding.levels.to(torch.float32)
    if encoding.scale.ndim and values.ndim == 1:
        values = values.unsqueeze(0).expand(encoding.scale.shape[0], -1)
    values = values * (encoding.scale.unsqueeze(-1) if encoding.scale.ndim else encoding.scale)
    offsets = _offsets(module, node, values, encoding, ndim)
    table = insert_buffer(module, f"{node.name}_values", values.flatten(), before=node)
    source = node.args[0]
    assert isinstance(source, Node)
    if source.op == "get_attr" or source.meta["val"].dtype is not torch.int32:
        source = insert_call(
            module, torch.ops.aten._to_copy.default, source, like=node, before=node,
            dtype=torch.int32,
        )  # fmt: skip
    new = insert_call(module, ops.LOOKUP, source, table, offsets, like=node, before=node)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def padded(thresholds: Tensor) -> tuple[Tensor, int]:
    """Thresholds padded with +inf to ``2**steps - 1`` per row, and `steps`."""
    count = thresholds.shape[-1]
    steps = (count + 1 - 1).bit_length()
    missing = (1 << steps) - 1 - count
    return torch.nn.functional.pad(thresholds, (0, missing), value=float("inf")), steps


def _offsets(
    module: GraphModule, node: Node, table: Tensor, encoding: LevelEncoding, ndim: int
) -> Node | None:
    """Where the row of each channel starts in the flattened table."""
    if table.ndim == 1:
        return None
    rows = torch.arange(table.shape[0], dtype=torch.int32) * table.shape[1]
    starts = along(rows, encoding.axis, ndim)
    return insert_buffer(module, f"{node.name}_rows", starts, before=node)
