# SPDX-License-Identifier: Apache-2.0
"""The coarse-to-fine search over both ends of a clip range that every range method shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.calibration.affine import affine_parameters

TIE = 1e-9  # candidates whose losses differ by less, relatively, count as equal


@dataclass(frozen=True, slots=True)
class CodeRange:
    """The codes a range is chosen for."""

    qmin: int
    qmax: int
    symmetric: bool

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale [K], lowest and highest level times scale [K], all fp64, of K candidates."""
        scale, zero_point = affine_parameters(
            low, high, self.qmin, self.qmax, symmetric=self.symmetric
        )
        wide = scale.double()
        return wide, (self.qmin - zero_point) * wide, (self.qmax - zero_point) * wide


Objective = Callable[[Tensor, Tensor], Tensor]


def pick(loss: Tensor, extent: Tensor) -> int:
    """Index of the smallest loss, ties toward the largest extent."""
    loss = torch.nan_to_num(loss, nan=float("inf"))
    best = loss.min()
    tied = loss <= best + best.abs() * TIE
    return int(torch.where(tied, extent.to(loss), -1.0).argmax())


@dataclass(frozen=True, slots=True)
class Schedule:
    """How finely the ends are searched.

    Attributes:
        coarse: fractions of each end tried first, from 1 down in equal ratios to `smallest`.
        fine: fractions per later round, between the neighbours of the best so far.
        rounds: number of later rounds.
    """

    coarse: int = 13
    fine: int = 5
    rounds: int = 2
    smallest: float = 2.0**-6


DEFAULT = Schedule()


def search_clip(
    objective: Objective,
    low: float,
    high: float,
    *,
    tied: bool = False,
    schedule: Schedule = DEFAULT,
    coarse: Objective | None = None,
) -> tuple[float, float]:
    """Minimise ``objective(lows, highs) -> losses`` over clip ranges inside [low, high].

    `low` <= 0 <= `high`. All pairs of fractions of the two ends are tried at once, then again
    around the best pair. `tied`: one fraction for both ends (symmetric formats). Ties go to the
    largest range; the full range is always a candidate. `coarse`: a cheaper objective for the
    first round, whose best is tried again by the next.
    """
    step = schedule.smallest ** (1.0 / (schedule.coarse - 1))
    powers = torch.arange(schedule.coarse, dtype=torch.float64)
    centre = (0.0, 0.0)  # exponents of `step` for the two ends
    reach, spacing = float(schedule.coarse - 1), 1.0
    best = (low, high)
    for turn in range(schedule.rounds + 1):
        if turn:
            powers = torch.linspace(-reach, reach, schedule.fine, dtype=torch.float64)
        lows, highs = _pairs(low, high, centre, powers, tied)
        lows = torch.cat([lows, torch.tensor([0.0, *([centre[0]] if turn else [])])])
        highs = torch.cat([highs, torch.tensor([0.0, *([centre[1]] if turn else [])])])
        ends = low * step**lows, high * step**highs
        losses = objective if turn or coarse is None else coarse
        winner = pick(losses(*ends), ends[1] - ends[0])
        best = float(ends[0][winner]), float(ends[1][winner])
        centre = float(lows[winner]), float(highs[winner])
        reach, spacing = spacing * (1 - 1 / schedule.fine), 2 * spacing / schedule.fine
    return best


def _pairs(
    low: float, high: float, centre: tuple[float, float], powers: Tensor, tied: bool
) -> tuple[Tensor, Tensor]:
    """Exponents of the candidates of a round, [K] each; none above the full range."""
    first = (centre[0] + powers).clamp(min=0.0)
    second = (centre[1] + powers).clamp(min=0.0)
    if tied or low == 0.0 or high == 0.0:
        return (second, second) if high > 0.0 else (first, first)
    lows, highs = torch.meshgrid(first, second, indexing="ij")
    return lows.reshape(-1), highs.reshape(-1)
