# SPDX-License-Identifier: Apache-2.0
"""Changing the sign of weight rows, bit for bit without changing the function of the graph.

IEEE negation is exact and rounding is symmetric, so a product in which a channel of both factors
changes sign comes out the same to the last bit (PTQ4SAM, arXiv 2405.03144, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.errors import PassError
from qgraph.graph.build import add_buffer, attribute, set_value
from qgraph.graph.channel_maps import ChannelMaps
from qgraph.graph.edges import Edge
from qgraph.graph.metadata import Key

_Cache = dict[tuple[str, tuple[int, ...], tuple[int, ...]], str]  # tensor, shape, negative places
FOLDED_SIGNS: Key[list[object]] = Key("folded_signs", owner="qgraph.graph.sign_folding")


def negated(tensor: Tensor, negative: Tensor) -> Tensor:
    """`tensor` with the sign changed where the (broadcastable) bool `negative` holds."""
    return torch.where(negative.to(tensor.device), -tensor, tensor)


def fold_signs(module: GraphModule, maps: ChannelMaps, flipped: Collection[int]) -> bool:
    """Change the sign of all rows of the classes `flipped`, and of tables that meet them.

    Args:
        module: the mapped graph; rewritten in place, with new tensors.
        maps: its channel maps.
        flipped: representatives of free classes of `maps.classes`.

    Raises:
        PassError: a class is pinned or unknown.
    """
    for root in flipped:
        if maps.classes.find(root) != root or maps.classes.reason(root) is not None:
            msg = f"rows of class {root} must not change sign: {maps.classes.reason(root)}"
            raise PassError(msg)
    chosen = torch.tensor(sorted(flipped), dtype=torch.int64)
    cache: _Cache = {}
    changed = False
    for source in maps.labels.sources:
        rows = torch.isin(maps.classes.roots(maps.labels.rows_of(source)), chosen)
        if not bool(rows.any()):
            continue
        changed = True
        weight = attribute(module, str(Edge(source, (1,)).source.target))
        _negate(module, source, 1, rows.view(-1, *[1] * (weight.ndim - 1)), cache)
        if len(source.args) > 2 and isinstance(source.args[2], Node):
            _negate(module, source, 2, rows, cache)
    for item in maps.compensations:
        negative = torch.isin(maps.classes.roots(item.labels.to(torch.int64)), chosen)
        if bool(negative.any()):
            changed = True
            _negate(module, item.edge.consumer, int(item.edge.path[0]), negative, cache)
    return changed


def unfold_signs(module: GraphModule) -> bool:
    """Undo every `fold_signs` that the graph's metadata tells of; return whether there was one.

    Raises:
        PassError: a folded tensor has been quantized since.
    """
    cache: _Cache = {}
    changed = False
    for node in module.graph.nodes:
        records: list[Any] = FOLDED_SIGNS.get(node) or []
        for argument, shape, flat in reversed(records):
            negative = torch.zeros(math.prod(shape), dtype=torch.bool)
            negative[torch.tensor(flat)] = True
            _negate(module, node, argument, negative.view(*shape), cache)
        if records:
            FOLDED_SIGNS.set(node, [])
            changed = True
    if changed:
        module.recompile()
    return changed


def _negate(
    module: GraphModule, node: Node, argument: int, negative: Tensor,
    cache: _Cache,
) -> None:  # fmt: skip
    """Let one argument read a tensor with changed signs; equal changes share one tensor."""
    edge = Edge(node, (argument,))
    source = edge.source
    if source.op != "get_attr":
        msg = f"{edge} no longer reads a stored float tensor; signs can only change before"
        raise PassError(msg, node=node.name)
    flat = negative.reshape(-1).nonzero().squeeze(1).tolist()
    key = str(source.target), tuple(negative.shape), tuple(flat)
    if key not in cache:
        tensor = attribute(module, str(source.target))
        cache[key] = add_buffer(module, f"{source.target}_signed", negated(tensor, negative))
    with module.graph.inserting_before(node):
        fresh = module.graph.get_attr(cache[key])
    set_value(module, fresh)
    edge.redirect(fresh)
    records = list(FOLDED_SIGNS.get(node) or [])
    FOLDED_SIGNS.set(node, [*records, [argument, list(negative.shape), flat]])
