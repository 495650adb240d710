# SPDX-License-Identifier: Apache-2.0
"""Make the channels of keys one-sided by changing signs of rows: same bits out, half the range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import ChannelHistogram, ChannelRange, FusedStatistics
from qgraph.calibration.logit_error import (
    LogitError,
    Operands,
    logit_error,
    observed_values,
    operand_requests,
    operands_of,
    share_saved,
)
from qgraph.calibration.operand_channels import OperandChannels, view_of
from qgraph.context import Context
from qgraph.formats import AffineEncoding
from qgraph.graph.channel_maps import ChannelMaps, MappedAttention, channel_maps
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.row_classes import RowClasses
from qgraph.graph.sign_folding import fold_signs
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class FoldKeySigns(Pass):
    """Change the sign of key channels with a negative mean, in the rows of queries and keys.

    The tensor of keys is then one-sided where every channel was: a range that holds zero shrinks
    to half, about one bit (PTQ4SAM's bimodal integration, arXiv 2405.03144, section 3.2, with the
    benefit measured on statistics of all calibration data in place of a test for two modes).
    Logits keep every bit. Ranges of what changed are decided from the mirrored statistics.

    Attributes:
        min_gain: fold only where the expected squared error of the logits falls by this share.
        key_method: how ranges are chosen (``"mse"``, ``"minmax"``, ``"percentile"``,
            ``"entropy"``); default: as the pipeline's choose-ranges does.
        force_signs: fold wherever it is legal, whatever the benefit.
    """

    name: ClassVar[str] = "fold-key-signs"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    min_gain: float = 0.05
    key_method: str | None = None
    force_signs: bool = False

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        return operand_requests(channel_maps(module), context.plan)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        maps = channel_maps(module)
        for refused in maps.refused:
            context.record(self.name, refused.softmax, "refused", refused.reason)
        flipped: set[int] = set()
        for group in _groups(self._eligible(maps, context), maps.classes):
            flipped |= self._decide(group, maps.classes, context)
        if not flipped:
            return False
        self._transport(maps, context, flipped)
        return fold_signs(module, maps, flipped)

    def _eligible(
        self, maps: ChannelMaps, context: Context
    ) -> Iterator[tuple[MappedAttention, Operands]]:
        for item in maps.sites:
            found = item.refusal or operands_of(item.site, maps, context.plan, context.statistics)
            if isinstance(found, str):
                outcome = "refused" if item.refusal else "kept"
                context.record(self.name, item.site.softmax, outcome, found)  # type: ignore[arg-type]
            else:
                yield item, found

    def _decide(
        self, group: list[tuple[MappedAttention, Operands]], classes: RowClasses, context: Context
    ) -> set[int]:
        """The classes to flip in attentions that share rows; each attention is reported."""
        flipped = negative_classes([found.key for _, found in group], classes)
        method = range_method(context, self.key_method)
        before = [logit_error(found, method) for _, found in group]
        after = [logit_error(folded(found, classes, flipped), method) for _, found in group]
        gain = share_saved(sum(e.total for e in before), sum(e.total for e in after))
        worth = bool(flipped) and (self.force_signs or gain >= self.min_gain)
        reason = _reason(worth, bool(flipped), gain, self.min_gain)
        for (item, found), was, now in zip(group, before, after, strict=True):
            own = torch.isin(classes.roots(found.key.labels), torch.tensor(sorted(flipped)))
            context.record(
                self.name, item.site.softmax, "applied" if worth else "kept", reason,
                flipped=float(own.sum()), channels=float(own.numel()),
                stability=stability(found.key), bits=float(found.key_bits), **_errors(was, now),
            )  # fmt: skip
        return flipped if worth else set()

    def _transport(self, maps: ChannelMaps, context: Context, flipped: set[int]) -> None:
        """Mirror the statistics of all values that change, and decide their sites from them."""
        method = range_method(context, self.key_method)
        chosen = torch.tensor(sorted(flipped))
        done: dict[tuple[Node, int], AffineEncoding] = {}
        mirrored: dict[Node, OperandChannels] = {}
        for value in observed_values(maps, context.plan):
            view = view_of(maps, value)
            if view is None:
                continue
            negative = torch.isin(maps.classes.roots(view.labels), chosen)
            if bool(negative.any()):
                found = OperandChannels.of(view, context.statistics[view.node])
                mirrored[value] = found.mirrored(negative)
        for value, seen in mirrored.items():
            view = view_of(maps, value)
            assert view is not None
            moved = seen.statistics(view)
            context.statistics.pop(value, None)
            if moved is not None:
                context.statistics[value] = moved
            for site in _undecided(context, value):
                if (value, site.bits) not in done:
                    done[value, site.bits] = seen.encoding(site.bits, method)[0]
                site.decide(done[value, site.bits], self.name, f"{method} range, signs folded")
        for source in maps.labels.sources:
            rows = torch.isin(maps.classes.roots(maps.labels.rows_of(source)), chosen)
            if source in context.statistics and source not in mirrored and bool(rows.any()):
                context.statistics[source] = mirrored_rows(context.statistics[source], rows)


def range_method(context: Context, own: str | None) -> str:
    """How ranges are chosen here: as asked for, or as the pipeline's choose-ranges does."""
    if own is None:
        passes = context.pipeline or ()
        own = next((str(getattr(p, "method", "")) for p in passes if p.name == "choose-ranges"), "")
    return own if own in {"mse", "minmax", "percentile", "entropy"} else "mse"


def negative_classes(keys: list[OperandChannels], classes: RowClasses) -> set[int]:
    """Free classes whose channels of the keys have a negative mean, summed over the class."""
    votes: dict[int, float] = {}
    for key in keys:
        free = classes.free(key.labels)
        mean = key.moments()[0]
        for root, value, may in zip(classes.roots(key.labels).tolist(), mean, free, strict=True):
            if may:
                votes[root] = votes.get(root, 0.0) + float(value)
    return {root for root, vote in votes.items() if vote < 0.0}


def folded(found: Operands, classes: RowClasses, flipped: set[int]) -> Operands:
    """Both operands after the signs of these classes changed."""
    chosen = torch.tensor(sorted(flipped), dtype=torch.int64)

    def turned(channels: OperandChannels) -> OperandChannels:
        return channels.mirrored(torch.isin(classes.roots(channels.labels), chosen))

    return dataclasses.replace(found, query=turned(found.query), key=turned(found.key))


def mirrored_rows(seen: FusedStatistics, negative: Tensor) -> FusedStatistics:
    """Statistics of a projection's output after rows changed sign: those that can be known."""
    return FusedStatistics(
        each.mirrored(negative)
        for each in seen.statistics
        if isinstance(each, (ChannelRange, ChannelHistogram)) and each.axis in {-1, 1}
    )


def stability(key: OperandChannels) -> float:
    """Smallest |mean| / std of a channel: near 0 a sign says little."""
    mean, variance = key.moments()
    ratio: Tensor = mean.abs() / variance.sqrt().clamp(min=1e-12)
    return float(ratio.min()) if ratio.numel() else 0.0


def _errors(before: LogitError, after: LogitError) -> dict[str, float]:
    return {
        "key_error_before": before.key, "key_error_after": after.key,
        "logit_error_before": before.total, "logit_error_after": after.total,
    }  # fmt: skip


def _reason(worth: bool, any_negative: bool, gain: float, least: float) -> str:
    if not any_negative:
        return "no free channel of the keys has a negative mean"
    text = f"expected squared error of the logits changes by {-100 * gain:+.1f}%"
    return text if worth else f"not worth it: {text}, asked for {-100 * least:+.1f}%"


def _undecided(context: Context, value: Node) -> list[Site]:
    return [s for s in context.plan.activations() if s.value is value and s.encoding is None]


def _groups(
    items: Iterable[tuple[MappedAttention, Operands]], classes: RowClasses
) -> list[list[tuple[MappedAttention, Operands]]]:
    """Attentions that share a class of rows, together."""
    groups: list[tuple[set[int], list[tuple[MappedAttention, Operands]]]] = []
    for item, found in items:
        roots = set(classes.roots(found.key.labels).tolist())
        together = [(item, found)]
        for other in [g for g in groups if g[0] & roots]:
            groups.remove(other)
            roots |= other[0]
            together = other[1] + together
        groups.append((roots, together))
    return [members for _, members in groups]
