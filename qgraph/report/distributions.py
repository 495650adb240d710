# SPDX-License-Identifier: Apache-2.0
"""What quantized operands look like: range and histogram before and after, with the levels.

Measured on the sample that verification replays. Values with one scale per channel are counted in
units of their scales, so that one picture holds all channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.affine import expand
from qgraph.formats.base import along
from qgraph.graph.edges import Edge, Path
from qgraph.graph.plan import Plan, Site
from qgraph.report.plain import number, plain

BINS, MARGIN = 48, 0.12
KEPT = 1 << 13  # values per operand that are looked at, at a fixed stride
MAX_LEVELS = 64


@dataclass(frozen=True, slots=True)
class Distribution:
    """One operand.

    Attributes:
        low, high: of the float values.
        first, last: ends of the histogram's bins; what lies beyond is counted in the end bins.
        before, after: counts of float and of quantized values.
        levels: positions of the levels, empty if there are more than 64.
        num_levels: how many there are.
        clipped: share of the float values beyond the outermost levels.
        in_scales: whether positions are in units of each channel's scale.
    """

    low: float
    high: float
    first: float
    last: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    levels: tuple[float, ...]
    num_levels: int
    clipped: float
    in_scales: bool

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        data = plain(asdict(self))
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Distribution:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        return cls(
            **{key: number(data[key]) for key in ("low", "high", "first", "last", "clipped")},
            before=tuple(map(int, data["before"])),
            after=tuple(map(int, data["after"])),
            levels=tuple(map(number, data["levels"])),
            num_levels=int(data["num_levels"]),
            in_scales=bool(data["in_scales"]),
        )


class Taps:
    """Keeps some values of chosen nodes while a graph runs.

    Attributes:
        kept: flat samples by node name, at the same places for equal shapes.
    """

    def __init__(self, wanted: Mapping[str, Encoding]) -> None:
        self.wanted = wanted
        self.kept: dict[str, tuple[Tensor, torch.Size]] = {}
        # one block: small copies between large values that come and go would hold on to these
        self._room = torch.empty(len(wanted), KEPT)

    def __call__(self, node: Node, value: Tensor) -> None:
        """Look at a value."""
        encoding = self.wanted.get(node.name)
        if encoding is None or not value.is_floating_point() or value.numel() == 0:
            return
        units = value.detach().float() if encoding.scale.ndim == 0 else _units(value, encoding)
        if units is not None:
            flat = units.reshape(-1)
            picked = flat[:: -(-flat.numel() // KEPT)]
            kept = self._room[len(self.kept), : len(picked)].copy_(picked)
            self.kept[node.name] = kept, value.shape


def _units(value: Tensor, encoding: Encoding) -> Tensor | None:
    """Values over the scale of their channel; None if the encoding does not fit the shape."""
    value = value.detach().float()
    try:
        if isinstance(encoding, AffineEncoding):
            return value / expand(encoding.scale, encoding.axis, encoding.block, value.shape)
        return value / along(encoding.scale, encoding.axis, value.ndim)
    except (RuntimeError, IndexError):
        return None


class Operands:
    """The quantized edges of a plan in the float graph and in the quantized one."""

    def __init__(self, plan: Plan, reference: GraphModule) -> None:
        self.sites = [site for site in plan if site.encoding is not None]
        named = {node.name: node for node in reference.graph.nodes}
        self.sources = [(_source(named, s), s.edge.source.name) for s in self.sites]
        encodings = [site.encoding for site in self.sites]
        pairs = list(zip(self.sources, encodings, strict=True))
        self.before = Taps({a: e for (a, _), e in pairs if a and e is not None})
        self.after = Taps({b: e for (_, b), e in pairs if e is not None})

    def distributions(self) -> dict[tuple[str, Path], Distribution]:
        """By consumer and argument path, once both graphs ran."""
        found = {}
        for site, (old, new) in zip(self.sites, self.sources, strict=True):
            was, now = self.before.kept.get(old), self.after.kept.get(new)
            if was is None or now is None or was[1] != now[1] or site.encoding is None:
                continue
            found[site.edge.consumer.name, site.edge.path] = distribution_of(
                was[0], now[0], site.encoding
            )
        return found


def _source(named: Mapping[str, Node], site: Site) -> str:
    """Name of the value in the float graph, "" if the op is not there as it was."""
    twin = named.get(site.edge.consumer.name)
    if twin is None:
        return ""
    try:
        return Edge(twin, site.edge.path).source.name
    except (KeyError, IndexError, TypeError, AssertionError):
        return ""


def distribution_of(before: Tensor, after: Tensor, encoding: Encoding) -> Distribution:
    """What flat samples look like; in units of the scale where there is one per channel."""
    in_scales = encoding.scale.ndim > 0
    levels = encoding.table().double()
    unit = 1.0 if in_scales else float(encoding.scale)
    lowest, highest = float(levels.min()) * unit, float(levels.max()) * unit
    before, after = before.double(), after.double()
    before = before[before.isfinite()]
    after = after[after.isfinite()]
    room = MARGIN * (highest - lowest)
    low = float(before.min()) if before.numel() else 0.0
    high = float(before.max()) if before.numel() else 0.0
    first = max(lowest - room, min(low, lowest)) if low < lowest else min(lowest, 0.0)
    last = min(highest + room, max(high, highest)) if high > highest else highest
    edges = (first, last if last > first else first + 1.0)
    rows = levels.reshape(-1, levels.shape[-1])
    same = rows.shape[-1] <= MAX_LEVELS and bool((rows == rows[0]).all())
    shown = (rows[0] * unit).tolist() if same else []
    half = unit * 0.5
    beyond = ((before < lowest - half) | (before > highest + half)).double()
    return Distribution(
        low=_short(low), high=_short(high), first=_short(edges[0]), last=_short(edges[1]),
        before=_counts(before, edges), after=_counts(after, edges),
        levels=tuple(_short(v) for v in shown), num_levels=int(levels.shape[-1]),
        clipped=_short(float(beyond.mean())) if before.numel() else 0.0, in_scales=in_scales,
    )  # fmt: skip


def _counts(values: Tensor, edges: tuple[float, float]) -> tuple[int, ...]:
    inside = values.clamp(*edges)
    return tuple(int(n) for n in torch.histc(inside, BINS, *edges).tolist())


def _short(value: float) -> float:
    return float(f"{value:.4g}")
