# SPDX-License-Identifier: Apache-2.0
"""A signed histogram in bins per octave, filled by one shift of the float's own bits.

The exponent and the top mantissa bits of an fp32 number *are* its bin: bins are linear inside an
octave, their edges are exact floats, and no search or logarithm is needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qgraph.calibration.statistics import Observation, Statistic, count_indices
from qgraph.errors import ConfigError

LOW_EXPONENT, HIGH_EXPONENT = -24, 24  # bins cover 2^-24 <= |x| < 2^24
BIAS = 127  # of the fp32 exponent
HOST = torch.device("cpu")  # cached borders must not follow a default device
EXPONENTS = 256


@dataclass(frozen=True, slots=True)
class Bins:
    """A density on the real line: mass spread evenly over intervals, and mass at exact zero.

    Attributes:
        left, right: fp64 [K], ascending, left < right; only intervals with mass.
        mass: fp64 [K]; zeros: mass at zero.
    """

    left: Tensor
    right: Tensor
    mass: Tensor
    zeros: float

    @property
    def total(self) -> float:
        """Total mass."""
        return float(self.mass.sum()) + self.zeros


class Histogram(Statistic):
    """Signed log histogram of a tensor's values.

    Args:
        bins_per_octave: a power of two from 1 to 1024. 16 locates a clip to about 3%; use 64
            where thresholds are read off the histogram.
        rate: about one in `rate` values is looked at (1: all), at fixed positions of a sample.
        cap: at most so many values per sample.

    Attributes:
        counts: int64 [2, 48, bins_per_octave]: [0] for x > 0, [1] for x < 0, ascending |x|,
            from 2^-24 on. None before the first update.
        octaves: int64 [2, 256] by fp32 exponent; [:, 0] zeros and subnormals, [:, 255]
            non-finite values. Tells what lies outside the bins.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("bins_per_octave", "rate", "cap")
    FIELDS: ClassVar[tuple[str, ...]] = ("counts", "octaves")
    counts: Tensor | None
    octaves: Tensor | None

    def __init__(self, bins_per_octave: int = 16, rate: int = 16, cap: int = 1 << 16) -> None:
        bits = bins_per_octave.bit_length() - 1
        if bins_per_octave != 1 << bits or not 1 <= bins_per_octave <= 1024 or rate < 1:
            msg = (
                f"bins_per_octave={bins_per_octave} (a power of two up to 1024), rate={rate} (>= 1)"
            )
            raise ConfigError(msg)
        self.bins_per_octave = bins_per_octave
        self.rate = rate
        self.cap = cap
        self.counts = self.octaves = None

    def observe(self, seen: Observation) -> None:  # noqa: D102
        values, keep = seen.sample(self.rate, cap=self.cap if self.rate > 1 else 1 << 62)
        shift = 24 - self.bins_per_octave.bit_length()
        raw = values.view(torch.int32)
        room = seen.room(tuple(raw.shape)).view(torch.int32)
        seen.put_off(self._count, torch.bitwise_right_shift(raw, shift, out=room), keep)

    def _count(self, index: Tensor, keep: Tensor | None) -> None:
        size = 2 * EXPONENTS * self.bins_per_octave
        # the sign bit lands on top, so masking turns negative numbers into the second half
        index.bitwise_and_(size - 1)
        if keep is not None:
            index = torch.where(keep, index, size)
        table = count_indices(index, size + (keep is not None))[:size]
        table = table.view(2, EXPONENTS, self.bins_per_octave)
        self._add(table[:, LOW_EXPONENT + BIAS : HIGH_EXPONENT + BIAS], table.sum(2))

    def _add(self, counts: Tensor, octaves: Tensor) -> None:
        if self.counts is None or self.octaves is None:
            self.counts, self.octaves = counts.contiguous(), octaves
        else:
            self.counts += counts
            self.octaves += octaves

    def _combine(self, other: Self) -> None:
        fields = other.fields()
        self._add(fields["counts"], fields["octaves"])

    def fields(self) -> dict[str, Tensor]:
        """The tensors; -0.0 counts as 0.0."""
        found = super().fields()
        if self.octaves is not None:
            octaves = self.octaves.clone()
            octaves[0, 0] += octaves[1, 0]
            octaves[1, 0] = 0
            found["octaves"] = octaves
        return found

    @property
    def zeros(self) -> int:
        """Sampled values that were zero (or subnormal)."""
        return 0 if self.octaves is None else int(self.octaves[:, 0].sum())

    @property
    def total(self) -> int:
        """Sampled values that were finite."""
        return 0 if self.octaves is None else int(self.octaves[:, : EXPONENTS - 1].sum())

    def mirrored(self) -> Histogram:
        """The histogram of ``-x``, exactly."""
        turned = Histogram(**self.options())  # type: ignore[arg-type]
        if self.counts is not None and self.octaves is not None:
            turned._load({"counts": self.counts.flip(0), "octaves": self.octaves.flip(0)})
        return turned

    def edges(self) -> Tensor:
        """fp64 [48 * bins_per_octave + 1], ascending edges of the positive bins."""
        return _edges(self.bins_per_octave)

    def bins(self) -> Bins:
        """The density, bins outside 2^-24..2^24 one octave wide."""
        if self.counts is None or self.octaves is None:
            empty = torch.zeros(0, dtype=torch.float64)
            return Bins(empty, empty, empty, 0.0)
        lefts, rights = _borders(self.bins_per_octave)
        low, high = LOW_EXPONENT + BIAS, HIGH_EXPONENT + BIAS
        octaves, counts = self.octaves.cpu().double(), self.counts.cpu().double().flatten(1)
        mass = torch.cat([octaves[:, 1:low], counts, octaves[:, high : EXPONENTS - 1]], dim=1)
        masses = torch.cat([mass[1].flip(0), mass[0]])
        used = masses > 0
        return Bins(lefts[used], rights[used], masses[used], float(self.zeros))


def _edges(bins_per_octave: int) -> Tensor:
    octave = torch.arange(LOW_EXPONENT, HIGH_EXPONENT, dtype=torch.float64, device=HOST).exp2()
    inside = torch.arange(bins_per_octave, dtype=torch.float64, device=HOST) / bins_per_octave
    top = torch.tensor([2.0**HIGH_EXPONENT], dtype=torch.float64, device=HOST)
    return torch.cat([(octave[:, None] * (1.0 + inside)).reshape(-1), top])


@functools.cache
def _borders(bins_per_octave: int) -> tuple[Tensor, Tensor]:
    """Left and right ends of all bins, negative ones first; read only."""
    edges = _edges(bins_per_octave)
    low, high = LOW_EXPONENT + BIAS, HIGH_EXPONENT + BIAS
    octave = torch.arange(EXPONENTS, dtype=torch.float64, device=HOST).sub_(BIAS).exp2()
    left = torch.cat([octave[1:low], edges[:-1], octave[high : EXPONENTS - 1]])
    right = torch.cat([octave[2 : low + 1], edges[1:], octave[high + 1 :]])
    return torch.cat([-right.flip(0), left]), torch.cat([-left.flip(0), right])
