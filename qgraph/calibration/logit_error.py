# SPDX-License-Identifier: Apache-2.0
"""What quantizing queries and keys costs the logits, from statistics by channel alone.

With errors e_q, e_k that are independent of the values, logits move by e_q k + q e_k. What is the
same for all keys does not reach the softmax, so only the spread of k around its mean counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.operand_channels import OperandChannels, View, view_of
from qgraph.formats import AffineEncoding
from qgraph.graph.attention_sites import AttentionSite
from qgraph.graph.channel_maps import ChannelMaps
from qgraph.graph.edges import Edge
from qgraph.graph.plan import Plan
from qgraph.graph.requests import Request


@dataclass(frozen=True, slots=True)
class LogitError:
    """Expected squared error of one logit, per channel.

    Attributes:
        total: of the logit.
        key: of a key's element.
        key_encoding: the format behind it.
    """

    total: float
    key: float
    key_encoding: AffineEncoding


@dataclass(frozen=True, slots=True)
class Operands:
    """The two operands of the logits of one attention, as observed."""

    query: OperandChannels
    key: OperandChannels
    query_view: View
    key_view: View
    query_bits: int | None
    key_bits: int


def operands_of(
    site: AttentionSite, maps: ChannelMaps, plan: Plan, statistics: Mapping[Any, FusedStatistics]
) -> Operands | str:
    """What was observed at an attention, or why nothing can be said."""
    key_site = plan.at(Edge(site.logits, (1,)))
    query_site = plan.at(Edge(site.logits, (0,)))
    if key_site is None:
        return "the keys stay in float"
    if key_site.encoding is not None:
        return f"{key_site.decided_by} has handled the keys"
    seen = []
    for operand in (site.query, site.key):
        view = view_of(maps, operand)
        if view is None:
            return "the channels of the operands cannot be observed one by one"
        seen.append((view, OperandChannels.of(view, statistics[view.node])))
    (query_view, query), (key_view, key) = seen
    bits = None if query_site is None else query_site.bits
    return Operands(query, key, query_view, key_view, bits, key_site.bits)


def logit_error(found: Operands, method: str) -> LogitError:
    """Expected error with affine formats per tensor, each range chosen by `method`."""
    key_encoding, key_error = found.key.encoding(found.key_bits, method)
    mean, variance = found.query.moments()
    energy = float((variance + mean.square()).mean())
    total = key_error * energy
    if found.query_bits is not None:
        _, query_error = found.query.encoding(found.query_bits, method)
        total += query_error * float(found.key.moments()[1].mean())
    return LogitError(total, key_error, key_encoding)


def share_saved(before: float, after: float) -> float:
    """The share of an error that goes: 1 all of it, 0 none, negative where it grows.

    Where there was none, nothing is saved.
    """
    if before == 0.0:
        return 0.0 if after == 0.0 else -math.inf
    return 1.0 - after / before


def observed_values(maps: ChannelMaps, plan: Plan) -> list[Node]:
    """Planned activations that carry rows of queries or keys of a mappable attention."""
    values = dict.fromkeys(site.value for site in plan.activations())
    for item in maps.sites:
        values |= dict.fromkeys((item.site.query, item.site.key))
    return [value for value in values if maps.channels(value) is not None]


def operand_requests(maps: ChannelMaps, plan: Plan) -> Iterator[Request]:
    """Statistics by channel of all queries and keys, what `operands_of` reads."""
    views = (view_of(maps, value) for value in observed_values(maps, plan))
    for view in filter(None, views):
        yield from view.requests()
