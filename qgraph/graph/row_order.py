# SPDX-License-Identifier: Apache-2.0
"""Whose rows a value holds: which values can be stored sample by sample.

A value can where its first axis is the batch, or a multiple of it that keeps a sample's rows
together (windows of an image). Attention that puts tokens first makes [tokens * batch, channels],
sorted by token: dealt out in equal parts, the samples' rows would be mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.graph.extract import is_size
from qgraph.graph.ops import aten

_RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints})


def first_size(node: Node) -> object | None:
    """First size of a value, as an expression, where it grows with the batch."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.ndim and isinstance(value.shape[0], torch.SymInt):
        return value.shape[0].node.expr
    return None


def batch_sizes(nodes: Iterable[Node]) -> frozenset[object]:
    """The batch, as first sizes of a graph's inputs: other free sizes may come first too."""
    sizes = (first_size(node) for node in nodes if node.op == "placeholder")
    return frozenset(size for size in sizes if size is not None)


def rows_by_sample(nodes: Sequence[Node], batch: frozenset[object]) -> set[Node]:
    """Those of a graph's values (in order) that can be stored sample by sample or are shared.

    Tuples are found where what they were made of is, so that their parts can be judged.
    """
    found: set[Node] = set()
    for node in nodes:
        if not is_size(node) and _is_by_sample(node, batch, found):
            found.add(node)
    return found


def _is_by_sample(node: Node, batch: frozenset[object], found: set[Node]) -> bool:
    """A multiple of the batch is one as long as each step kept the rows where they were."""
    value, first = node.meta.get("val"), first_size(node)
    if isinstance(value, Tensor):
        if not any(isinstance(size, torch.SymInt) for size in value.shape):
            return True
        if first is None or first in batch:
            return first is not None
    keeps = node.target in _RESHAPES or not isinstance(value, Tensor)
    return all(
        source in found and (keeps or first_size(source) in (None, first))
        for source in node.all_input_nodes
        if not is_size(source)
    )
