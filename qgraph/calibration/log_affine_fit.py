# SPDX-License-Identifier: Apache-2.0
"""Fit the log-affine format: a grid of slopes and largest levels, and gradients to learn them.

Sides and channels are independent, so one table of errors [candidates, channels, 2] holds the
whole search. The grid does not depend on the width, so more bits never fit worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats import LevelEncoding
from qgraph.formats.log_affine import TINY, Decoder, LogAffine, log_affine, shift_steps

CELLS = 1 << 20  # elements x candidates held at once
SLOPES = tuple(2.0 ** (j / 4) for j in range(-8, 25))  # codes per octave, 0.25 ... 64
# The largest level lies so many octaves below the largest weight.
DROPS = (*(j / 8 for j in range(-4, 9)), *(1 + j / 4 for j in range(1, 13)))


@torch.no_grad()
def fit_log_affine(
    rows: Tensor, bits: int, *, decoder: Decoder = "exact", reserve_zero: bool = False,
    importance: Tensor | None = None, centred: bool = False,
) -> LogAffine:  # fmt: skip
    """The slope and offset of smallest (weighted) squared error, per channel and side.

    Args:
        rows: weights [C, N], one row per channel.
        bits, decoder, reserve_zero: of the format.
        importance: weight of each element's error, [N] or [C, N].
        centred: put the centre at each row's mean instead of 0 (exact decoder only).

    A side without weights takes the other side's numbers.

    Raises:
        ConfigError: weights that are not finite, or options that do not fit.
    """
    rows = rows.detach().to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        msg = f"weight holds {int((~torch.isfinite(rows)).sum())} non-finite values"
        raise ConfigError(msg)
    centre = rows.mean(1) if centred else rows.new_zeros(rows.shape[0])
    away = rows - centre[:, None]
    weights = torch.ones_like(rows) if importance is None else importance.to(rows).expand_as(rows)
    parts = [(away < 0) * weights, (away >= 0) * weights]
    # The shift decoder has one step for both sides, so they share their numbers.
    sides = torch.stack([parts[0] + parts[1]] if decoder == "shift" else parts, 1)
    distance = away.abs()
    peaks = torch.stack([((s > 0) * distance).amax(-1) for s in sides.unbind(1)], 1)
    top = peaks.clamp(min=TINY).log2()
    # The shift decoder's levels double from code to code, so slope 1 assigns the nearest of them.
    slopes = (1.0,) if decoder == "shift" else SLOPES
    slope, level = _search(distance, sides, top, 1 << (bits - 1), zero=reserve_zero, slopes=slopes)
    offset = ((1 << (bits - 1)) - 1) - slope * level
    if decoder == "shift":
        slope, offset, peaks = (v.expand(-1, 2) for v in (slope, offset, peaks))
    empty = peaks <= TINY
    slope = torch.where(empty, slope.flip(1), slope)
    offset = torch.where(empty, offset.flip(1), offset)
    return LogAffine(
        bits=bits, slope=slope, offset=offset, centre=centre, decoder=decoder,
        reserve_zero=reserve_zero,
    )  # fmt: skip


def _search(
    distance: Tensor, sides: Tensor, top: Tensor, count: int, *, zero: bool,
    slopes: tuple[float, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Best slope and logarithm of the largest level, fp64 [C, 2] each."""
    usable = [k for k in slopes if k <= max(1, count - 1) / 0.25]
    grid = torch.cartesian_prod(
        torch.tensor(usable, dtype=torch.float64), torch.tensor(DROPS, dtype=torch.float64)
    )
    best = torch.full_like(top, torch.inf)
    picked = torch.zeros_like(top, dtype=torch.int64)
    logs = distance.clamp(min=TINY).log2().float()
    plain, weights = distance.float(), sides.float()
    size = max(1, CELLS // max(1, 2 * distance.numel()))
    for start in range(0, len(grid), size):
        part = grid[start : start + size].float()
        level = top.float()[None] - part[:, 1, None, None]  # [K, C, 2]
        slope = part[:, 0, None, None, None]
        # Distance from the top code, downwards; the last code takes all that lies below.
        steps = torch.round((level[..., None] - logs[None, :, None]) * slope)
        steps = steps.clamp_(0, count - 1)
        made = torch.exp2(level[..., None] - steps / slope)
        if zero:
            made = torch.where(steps == count - 1, 0.0, made)
        error = (made.sub_(plain[None, :, None])).square_().mul_(weights[None]).sum(-1)
        least, at = error.double().min(0)
        better = least < best
        best = torch.where(better, least, best)
        picked = torch.where(better, at + start, picked)
    chosen = grid.to(top.device)[picked]
    return chosen[..., 0].clone(), top - chosen[..., 1]


@torch.no_grad()
def log_affine_encoding(
    weight: Tensor, bits: int, *, axis: int | None = 0, decoder: Decoder = "exact",
    reserve_zero: bool = False, importance: Tensor | None = None,
) -> LevelEncoding:  # fmt: skip
    """The fitted encoding of a weight, per channel of `axis` or (None) for the whole tensor."""
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    found = fit_log_affine(
        rows, bits, decoder=decoder, reserve_zero=reserve_zero, importance=importance
    )
    step = shift_steps(rows, found) if decoder == "shift" else None
    return log_affine(found, step=step, axis=axis)


def soft_log_affine(
    rows: Tensor, log_slope: Tensor, offset: Tensor, centre: Tensor, count: int
) -> Tensor:
    """``m +- 2^((q - a) / k)`` of weights [C, N] with gradients for ``log k`` and a, [C, 2] each.

    Rounding passes straight through, clipped codes stand still, so with d the distance decoded
    ``dw^/dk = +- d ln2 (z - q) / k^2`` and ``dw^/da = 0`` inside, ``-+ d ln2 (q - a) / k^2`` and
    ``-+ d ln2 / k`` where clipped. Gradients are divided by ``sqrt(N (n - 1))`` as LSQ does.
    """
    away = rows - centre[:, None]
    side = (away >= 0).to(torch.int64)
    factor = (rows.shape[1] * max(1, count - 1)) ** -0.5
    slope = torch.exp(_scaled(log_slope, factor)).gather(1, side)
    shift = _scaled(offset, factor).gather(1, side)
    z = slope * away.abs().clamp(min=TINY).log2() + shift
    q = (z + (torch.round(z) - z).detach()).clamp(0, count - 1)
    made = torch.exp2((q - shift) / slope)
    return centre[:, None] + torch.where(side == 1, made, -made)


def _scaled(value: Tensor, factor: float) -> Tensor:
    """The value, its gradient multiplied by a factor."""
    return value * factor + (value * (1 - factor)).detach()
