# SPDX-License-Identifier: Apache-2.0
"""Formats given by a table: any sorted set of integer levels, with decision thresholds between.

A code is the rank of its level in the table, so quantization is monotone and idempotent by
construction, and a new format is a function that fills the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.base import Encoding, along, check_scale

FEW = 16  # up to so many thresholds, comparing with each is faster than a binary search


def rank_dtype(num_levels: int) -> torch.dtype:
    """uint8 up to 256 levels, else int16."""
    return torch.uint8 if num_levels <= 256 else torch.int16


def midpoints(levels: Tensor) -> Tensor:
    """Decision thresholds of nearest-level encoding, in units of the scale (fp32)."""
    wide = levels.to(torch.float64)
    return ((wide[..., 1:] + wide[..., :-1]) / 2).to(torch.float32)


def levels_encode(x: Tensor, scale: Tensor, thresholds: Tensor, axis: int | None = None) -> Tensor:
    """Rank of each element: how many thresholds lie strictly below ``x / scale``.

    A value exactly on a threshold takes the lower rank.
    """
    units = x.to(torch.float32) / along(scale, axis, x.ndim)
    dtype = rank_dtype(thresholds.shape[-1] + 1)
    if thresholds.ndim == 1 and thresholds.numel() <= FEW:
        return _count_below(units, thresholds)
    if thresholds.ndim == 1:
        return torch.bucketize(units.contiguous(), thresholds).to(dtype)
    assert axis is not None, "thresholds per channel need an axis"
    return ranks_by_channel(units, thresholds, axis).to(dtype)


def ranks_by_channel(x: Tensor, thresholds: Tensor, axis: int) -> Tensor:
    """int64: how many of its channel's thresholds [C, L-1] lie strictly below each element."""
    moved = x.movedim(axis, 0)
    ranks = torch.searchsorted(thresholds, moved.reshape(moved.shape[0], -1).contiguous())
    return ranks.view(moved.shape).movedim(0, axis)


def _count_below(units: Tensor, thresholds: Tensor) -> Tensor:
    """uint8 ranks by one comparison per threshold; NaN gets the last rank, as in bucketize."""
    above = torch.zeros_like(units, dtype=torch.uint8)
    for threshold in thresholds:
        above += units <= threshold
    return above.neg_().add_(thresholds.numel())


def levels_of(ranks: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Level of each rank, int32."""
    if levels.ndim == 1:
        return levels.to(torch.int32)[ranks.to(torch.int64)]
    assert axis is not None, "levels per channel need an axis"
    moved = ranks.to(torch.int64).movedim(axis, 0)
    flat = torch.gather(levels.to(torch.int32), 1, moved.reshape(moved.shape[0], -1))
    return flat.view(moved.shape).movedim(0, axis)


def levels_decode(ranks: Tensor, scale: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Values ``scale * level[rank]`` in fp32."""
    values = levels_of(ranks, levels, axis).to(torch.float32)
    return values * along(scale, axis, ranks.ndim)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LevelEncoding(Encoding):
    """A quantizer given by its levels.

    Attributes:
        name: the format it is an instance of, for reports (``dual region``, ...).
        scale: fp32 [] or [C].
        levels: int32 [L] or [C, L], strictly ascending along the last axis.
        thresholds: fp32 [L-1] or [C, L-1], in units of the scale, between the levels.
        storage_bits: bits that one packed code takes (may exceed log2 L).
        axis: channel axis where anything differs by channel.

    Raises:
        ConfigError: on a bad scale, levels not ascending, or thresholds out of place.
    """

    name: str
    scale: Tensor
    levels: Tensor
    thresholds: Tensor
    storage_bits: int
    axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "levels", self.levels.detach().to(torch.int32))
        object.__setattr__(self, "thresholds", self.thresholds.detach().to(torch.float32))
        if self.levels.shape[-1] < 2 or not bool((self.levels.diff(dim=-1) > 0).all()):
            msg = f"{self.name}: levels must be at least two and strictly ascending"
            raise ConfigError(msg)
        low, high = self.levels[..., :-1], self.levels[..., 1:]
        if self.thresholds.shape != low.shape or not bool(
            ((self.thresholds >= low) & (self.thresholds < high)).all()
        ):
            msg = f"{self.name}: each decision threshold must lie between its two levels"
            raise ConfigError(msg)

    @classmethod
    def nearest(
        cls, name: str, scale: Tensor, levels: Tensor, *, storage_bits: int, axis: int | None = None
    ) -> LevelEncoding:
        """Nearest-level encoding: thresholds midway, a tie takes the lower level."""
        return cls(
            name=name, scale=scale, levels=levels, thresholds=midpoints(levels),
            storage_bits=storage_bits, axis=axis,
        )  # fmt: skip

    @property
    def bits(self) -> int:  # noqa: D102
        return self.storage_bits

    def encode(self, x: Tensor) -> Tensor:  # noqa: D102
        return levels_encode(x, self.scale, self.thresholds, self.axis)

    def level(self, codes: Tensor) -> Tensor:  # noqa: D102
        return levels_of(codes, self.levels, self.axis)

    def table(self) -> Tensor:  # noqa: D102
        return self.levels

    def to(self, device: torch.device | str) -> LevelEncoding:  # noqa: D102
        return LevelEncoding(
            name=self.name, scale=self.scale.to(device), levels=self.levels.to(device),
            thresholds=self.thresholds.to(device), storage_bits=self.storage_bits, axis=self.axis,
        )  # fmt: skip

    def describe(self) -> str:  # noqa: D102
        return f"{self.name} {self.storage_bits}-bit {self.granularity}"


def by_channel(encodings: Sequence[LevelEncoding], axis: int) -> LevelEncoding:
    """One encoding that codes channel c of `axis` as ``encodings[c]`` does, of values >= 0.

    Scales are [C], levels and thresholds [C, ...]. Shorter tables are filled up below zero, where
    no value of theirs is ever coded.

    Raises:
        ConfigError: no encodings, different formats or widths, or levels below zero.
    """
    kinds = {(each.name, each.storage_bits) for each in encodings}
    lowest = [int(each.levels.min()) for each in encodings if each.levels.ndim == 1]
    if len(kinds) != 1 or len(lowest) != len(encodings) or min(lowest) < 0:
        msg = f"{len(encodings)} encodings of {sorted(kinds)} with levels from {lowest} on do not"
        msg += " make one by channel: one format, one width, one table each, levels from 0 on"
        raise ConfigError(msg)
    size = max(each.levels.numel() for each in encodings)
    below = [torch.arange(each.levels.numel() - size, 0) for each in encodings]
    levels = [torch.cat([b, each.levels]) for b, each in zip(below, encodings, strict=True)]
    cuts = [torch.cat([b, each.thresholds]) for b, each in zip(below, encodings, strict=True)]
    (name, bits) = kinds.pop()
    return LevelEncoding(
        name=name, scale=torch.stack([each.scale.reshape(()) for each in encodings]),
        levels=torch.stack(levels), thresholds=torch.stack(cuts), storage_bits=bits, axis=axis,
    )  # fmt: skip
