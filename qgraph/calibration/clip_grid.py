# SPDX-License-Identifier: Apache-2.0
"""The coarse-to-fine search over both ends of a clip range that every range method shares."""

from __future__ import annotations

import itertools
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
Exponents = tuple[float, float]


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
    tried: dict[Exponents, float] = {}
    for turn in range(schedule.rounds + 1):
        if turn:
            powers = torch.linspace(-reach, reach, schedule.fine, dtype=torch.float64)
        losses = objective if turn or coarse is None else coarse
        wanted = [(0.0, 0.0), centre, *_pairs(low, high, centre, powers.tolist(), tied)]
        if fresh := [pair for pair in dict.fromkeys(wanted) if pair not in tried]:
            tried.update(zip(fresh, losses(*_ends(low, high, step, fresh)).tolist(), strict=True))
        lows, highs = _ends(low, high, step, list(tried))
        winner = pick(torch.tensor(list(tried.values()), dtype=torch.float64), highs - lows)
        centre = list(tried)[winner]
        best = float(lows[winner]), float(highs[winner])
        if losses is not objective:
            tried.clear()
        reach, spacing = spacing * (1 - 1 / schedule.fine), 2 * spacing / schedule.fine
    return best


def _ends(low: float, high: float, step: float, pairs: list[Exponents]) -> tuple[Tensor, Tensor]:
    """Both ends, [K] fp64 each, of the candidates with these exponents."""
    lows, highs = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return low * step**lows, high * step**highs


def _pairs(
    low: float, high: float, centre: Exponents, powers: list[float], tied: bool
) -> list[Exponents]:
    """Exponents of the candidates of a round; none above the full range."""
    first, second = ([max(0.0, end + power) for power in powers] for end in centre)
    if tied or low == 0.0 or high == 0.0:
        ends = second if high > 0.0 else first
        return list(zip(ends, ends, strict=True))
    return list(itertools.product(first, second))
