# SPDX-License-Identifier: Apache-2.0
"""Subtract the mean of each key channel through the bias: softmax over keys does not see it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import FusedStatistics
from qgraph.calibration.logit_error import (
    Operands,
    logit_error,
    operand_requests,
    operands_of,
    share_saved,
)
from qgraph.calibration.operand_channels import (
    OperandChannels,
    path_to_projection,
    step_up,
    view_of,
)
from qgraph.context import Context
from qgraph.graph.attention_sites import AttentionSite, shift_obstacle
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.channel_maps import ChannelMaps, MappedAttention, channel_maps
from qgraph.graph.requests import Request
from qgraph.graph.verify import where
from qgraph.passes.fold_key_signs import folded, negative_classes, range_method
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class CenterKeys(Pass):
    """Subtract the calibration mean of each key channel from the bias of the key projection.

    ``q (k - c) = q k - q c``, and ``q c`` is the same for all keys of a query, so the softmax is
    unchanged (up to rounding). Refused under rotary positions, norms of keys, soft caps, and
    where keys are read by anything else. Where `fold-key-signs` comes later in the pipeline and
    promises a smaller error, the keys are left to it.

    Attributes:
        min_gain: centre only where the expected squared error of the logits falls by this share.
        key_method: how ranges are chosen; default: as the pipeline's choose-ranges does.
        force_centring: centre wherever it is legal, whatever the benefit.
    """

    name: ClassVar[str] = "center-keys"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    tolerance: ClassVar[float] = 1e-4
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    min_gain: float = 0.05
    key_method: str | None = None
    force_centring: bool = False

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        return operand_requests(channel_maps(module), context.plan)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        maps = channel_maps(module)
        changed = False
        for refused in maps.refused:
            context.record(self.name, refused.softmax, "refused", refused.reason)
        for item in maps.sites:
            obstacle = centring_obstacle(item.site, maps)
            if obstacle:
                context.record(self.name, item.site.softmax, "refused", obstacle)
                continue
            found = operands_of(item.site, maps, context.plan, context.statistics)
            if isinstance(found, str):
                context.record(self.name, item.site.softmax, "kept", found)
            else:
                changed |= self._decide(module, context, maps, item, found)
        return changed

    def _decide(
        self, module: GraphModule, context: Context, maps: ChannelMaps, item: MappedAttention,
        found: Operands,
    ) -> bool:  # fmt: skip
        method = range_method(context, self.key_method)
        centred = with_key(found, found.key.shifted(centring_shift(found.key)))
        before, after = logit_error(found, method), logit_error(centred, method)
        rival = math.inf
        if not self.force_centring and not item.refusal and self._signs_follow(context):
            flipped = negative_classes([found.key], maps.classes)
            rival = logit_error(folded(found, maps.classes, flipped), method).total
        gain = share_saved(before.total, after.total)
        worth = self.force_centring or (gain >= self.min_gain and after.total <= rival)
        text = f"expected squared error of the logits changes by {-100 * gain:+.1f}%"
        if not worth:
            better = gain >= self.min_gain
            text = f"{'left to fold-key-signs' if better else 'not worth it'}: {text}"
        numbers = {
            "key_error_before": before.key, "key_error_after": after.key,
            "logit_error_before": before.total, "logit_error_after": after.total,
            "bits": float(found.key_bits),
        }  # fmt: skip
        if rival < math.inf:
            numbers["logit_error_signs"] = rival
        context.record(
            self.name, item.site.softmax, "applied" if worth else "kept", text, **numbers
        )
        if worth:
            self._apply(module, context, maps, item.site, centred.key)
        return worth

    def _signs_follow(self, context: Context) -> bool:
        names = [item.name for item in (context.pipeline or ())]
        return "fold-key-signs" in names[names.index(self.name) :] if self.name in names else False

    def _apply(
        self, module: GraphModule, context: Context, maps: ChannelMaps, site: AttentionSite,
        key: OperandChannels,
    ) -> None:  # fmt: skip
        path = path_to_projection(site.key)
        assert path is not None
        assert key.shift is not None
        source, factor, passed = path
        rows = maps.labels.rows_of(source)
        shift = torch.zeros(rows.numel(), dtype=torch.float64)
        shift[key.labels - rows[0]] = key.shift / factor
        add_to_bias(module, source, shift)
        view = view_of(maps, site.key)
        assert view is not None
        for value in (source, *passed):
            context.statistics.pop(value, None)
        if view.node is site.key:
            context.statistics[site.key] = FusedStatistics([key.extrema])
        method = range_method(context, self.key_method)
        for each in context.plan.activations():
            if each.value is site.key and each.encoding is None:
                encoding = key.encoding(each.bits, method)[0]
                each.decide(encoding, self.name, f"{method} range, keys centred")


def with_key(found: Operands, key: OperandChannels) -> Operands:
    """The same attention with other keys."""
    return Operands(
        found.query, key, found.query_view, found.key_view, found.query_bits, found.key_bits
    )


def centring_shift(key: OperandChannels) -> Tensor:
    """Minus the mean of each channel, fp64 [C]; channels made by one row share their mean."""
    mean = key.moments()[0]
    distinct, inverse = torch.unique(key.labels, return_inverse=True)
    total = torch.zeros(distinct.numel(), dtype=torch.float64).index_add_(0, inverse, mean)
    count = torch.bincount(inverse, minlength=distinct.numel())
    return -(total / count)[inverse]


def centring_obstacle(site: AttentionSite, maps: ChannelMaps) -> str:
    """Why keys of an attention cannot be centred, or ""."""
    capped = shift_obstacle(site)
    if capped is not None:
        return f"softmax would see a shift of the logits after {where(capped)}"
    found = maps.channels(site.key)
    path = path_to_projection(site.key)
    if found is None or path is None:
        return f"more than movement lies between key projection and logits: {_first_op(site.key)}"
    labels = found[1]
    own = maps.channels(site.query)
    if own is not None and bool(torch.isin(own[1], labels).any()):
        return "queries and keys are the same value"
    for node, seen in maps.labels.events:
        if node is not site.logits and bool(torch.isin(seen, labels.to(seen.dtype)).any()):
            return f"the key projection is also read by {where(node)}"
    return ""


def _first_op(operand: Node) -> str:
    """The first op above an operand that is neither movement nor scaling."""
    node = operand
    while (step := step_up(node)) is not None:
        node = step[0]
    return where(node)


def add_to_bias(module: GraphModule, source: Node, shift: Tensor) -> None:
    """Let a linear or convolution read its bias (or 0) plus `shift`, fp64 [C_out]."""
    weight, bias = source.args[1], source.args[2] if len(source.args) > 2 else None
    assert isinstance(weight, Node)
    stored = attribute(module, str(weight.target))
    name = f"{weight.target}_centred"
    if isinstance(bias, Node):
        stored, name = attribute(module, str(bias.target)), f"{bias.target}_centred"
        moved = (stored.double() + shift.to(stored.device)).to(stored.dtype)
    else:
        moved = shift.to(stored)
    fresh = insert_buffer(module, name, moved, before=source)
    source.args = (*source.args[:2], fresh, *source.args[3:])
