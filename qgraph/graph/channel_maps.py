# SPDX-License-Identifier: Apache-2.0
"""Channel maps: for each attention, which weight rows become which channel of Q and of K.

    maps = channel_maps(module)
    for attention in maps.sites:
        attention.query_rows, attention.key_rows     labels [H, D] (0: no row)
        attention.refusal                            why its signs may not change, or ""

Rows are labelled by stored weight, so fused, packed and interleaved projections, repeated
(grouped) heads, tied weights and modules called twice need no cases of their own. `maps.classes`
says which rows must agree (rotary pairs, groups, shared tables) and which may not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.attention_sites import AttentionSite, NoSite, attention_sites
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.row_classes import RowClasses
from qgraph.graph.row_labels import Compensation, RowLabels, is_source, label_rows
from qgraph.graph.verify import where


@dataclass(frozen=True, slots=True)
class MappedAttention:
    """An attention and the rows behind its channels.

    Attributes:
        site: the nodes.
        query_rows, key_rows: int64 [H, D], label of the row that makes channel d of head h;
            grouped heads repeat rows. Empty where the operand comes from no labelled row.
        refusal: why no row of the key may change, or "".
    """

    site: AttentionSite
    query_rows: Tensor
    key_rows: Tensor
    refusal: str


@dataclass(frozen=True)
class ChannelMaps:
    """All attentions of a graph, their rows, and what else those rows reach.

    Attributes:
        sites: attentions in graph order.
        refused: softmax nodes that are no attention as understood here.
        labels: the replay behind it all.
    """

    sites: tuple[MappedAttention, ...]
    refused: tuple[NoSite, ...]
    labels: RowLabels

    @property
    def classes(self) -> RowClasses:
        """Which rows must agree, and which are pinned."""
        return self.labels.classes

    @property
    def compensations(self) -> list[Compensation]:
        """Tables to rewrite along with rows."""
        return self.labels.compensations

    def weight_rows(self, label: int) -> tuple[str, int]:
        """(canonical weight name, row) of a label."""
        below = {name: start for name, start in self.labels.offsets.items() if start < label}
        name = max(below, key=lambda each: below[each])
        return name, label - below[name] - 1

    def channels(self, value: Node) -> tuple[tuple[int, ...], Tensor] | None:
        """(channel axes, labels [C]) of an operand of a product; None if it carries no row.

        The axes are those along which labels vary, counted from the end; labels are flattened
        in their order.
        """
        labels = self.labels.values.get(value)
        if labels is None or not bool(labels.any()):
            return None
        axes = tuple(a - labels.ndim for a in range(labels.ndim) if labels.shape[a] > 1)
        return axes or (-1,), labels.reshape(-1).to(torch.int64)


def projections(operand: Node) -> Iterator[Node]:
    """Linears and convolutions with stored weights that an operand comes from, nearest first."""
    pending, seen = [operand], set()
    while pending:
        node = pending.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_source(node):
            yield node
        elif kind(node) not in {OpKind.MATMUL, OpKind.SOFTMAX}:
            pending.extend(node.all_input_nodes)


def channel_maps(module: GraphModule) -> ChannelMaps:
    """Map the channels of every attention of a canonical graph to weight rows."""
    found = list(attention_sites(module))
    sites = [item for item in found if isinstance(item, AttentionSite)]
    sources = dict.fromkeys(
        source for site in sites for end in (site.query, site.key) for source in projections(end)
    )
    labels = label_rows(module, sources)
    return ChannelMaps(
        tuple(_mapped(site, labels) for site in sites),
        tuple(item for item in found if isinstance(item, NoSite)),
        labels,
    )


def head_channels(labels: Tensor, channel_axis: int) -> Tensor:
    """Labels [H, D] of an operand's compact labels; heads merged into the batch are taken apart."""
    moved = labels.movedim(channel_axis, -1).reshape(-1, labels.shape[channel_axis])
    rows = moved.to(torch.int64)
    period = len(set(map(tuple, rows.tolist())))
    whole = rows.shape[0] % period == 0
    merged = whole and bool((rows.view(-1, period, rows.shape[1]) == rows[:period]).all())
    return rows[:period] if merged else rows


def _mapped(site: AttentionSite, labels: RowLabels) -> MappedAttention:
    empty = torch.zeros(0, 0, dtype=torch.int64)
    query, key = labels.values.get(site.query), labels.values.get(site.key)
    query_rows = empty if query is None else head_channels(query, -1)
    key_rows = empty if key is None else head_channels(key, -2)
    if 1 in {query_rows.shape[0], key_rows.shape[0]} and query_rows.shape[1] == key_rows.shape[1]:
        query_rows, key_rows = torch.broadcast_tensors(query_rows, key_rows)
    return MappedAttention(site, query_rows, key_rows, _refusal(site, labels, query_rows, key_rows))


def _refusal(site: AttentionSite, labels: RowLabels, query: Tensor, key: Tensor) -> str:
    for name, rows, operand in (("key", key, site.key), ("query", query, site.query)):
        if not bool(rows.any()):
            return _unlabelled(name, operand, labels)
    if bool(labels.classes.free(key).any()):
        return ""
    first = next(label for label in key.flatten().tolist() if labels.classes.reason(label))
    return str(labels.classes.reason(first))


def _unlabelled(name: str, operand: Node, labels: RowLabels) -> str:
    for source in projections(operand):
        for label in labels.rows_of(source).tolist():
            reason = labels.classes.reason(label)
            if reason is not None:
                return f"the {name}: {reason}"
    return f"the {name} is not made by a linear layer with stored weights ({where(operand)})"
