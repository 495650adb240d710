# SPDX-License-Identifier: Apache-2.0
"""Range choice for affine formats from statistics alone.

The expected squared error of a candidate grid is a closed form: inside a bin the density is taken
as uniform, and the error's square integrates to ``s^3 / 12`` per step. So all candidates cost one
vectorised pass over the bins, whatever the number of values behind them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qgraph.calibration.channel_histogram import ChannelHistogram
from qgraph.calibration.clip_grid import DEFAULT, CodeRange, Schedule, search_clip
from qgraph.calibration.extrema import Range
from qgraph.calibration.histogram import Bins, Histogram
from qgraph.errors import CalibrationError, ConfigError, unknown_name
from qgraph.formats.affine import IntGrid

Source = Histogram | ChannelHistogram | Bins
CELLS = 1 << 18  # candidates x bins that are held at once
MANY = 256  # ends of bins from which on sorting them pays


def error_integral(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """``integral from 0 to x of (Q(t) - t)^2 dt`` for the grid ``scale * Z`` in [bottom, top].

    `x` [E]; `scale`, `bottom`, `top` [K, 1]; all fp64. Returns [K, E]. With ``n = round(x / s)``
    and ``r = x / s - n`` it is ``s^3 (n / 12 + r^3 / 3)``, plus a cube where x is clipped.
    """
    inside = torch.minimum(torch.maximum(x, bottom), top)
    beyond = x - inside
    steps = inside.div_(scale)
    whole = steps.round()
    rest = steps.sub_(whole)
    within = whole.div_(12).add_(rest.pow_(3).div_(3)).mul_(scale**3)
    return within.add_(beyond.pow_(3).div_(3))


def expected_error(bins: Bins, codes: CodeRange, low: Tensor, high: Tensor) -> Tensor:
    """Sum of squared errors, fp64 [K], of K candidate ranges over a density."""
    scale, bottom, top = (v[:, None] for v in codes.grid(low, high))
    density = bins.mass / (bins.right - bins.left)
    ends, weight = torch.cat([bins.left, bins.right]), torch.cat([-density, density])
    if len(ends) > MANY:  # bins touch, so most right ends are left ends too: integrate each once
        ends, place = ends.unique(return_inverse=True)
        weight = torch.zeros_like(ends).scatter_add_(0, place, weight)
    size = max(1, CELLS // max(1, ends.numel()))
    losses = [
        error_integral(ends, *(v[part : part + size] for v in (scale, bottom, top))) @ weight
        for part in range(0, scale.shape[0], size)
    ]
    return torch.cat(losses)


def divergence(bins: Bins, codes: CodeRange, low: Tensor, high: Tensor) -> Tensor:
    """KL divergence, fp64 [K], of the clipped density from its quantized form.

    The quantized density spreads the mass of each level evenly over the occupied bins of that
    level; what is clipped counts in the density's outermost bins only (as in entropy calibration
    of inference engines). Bins must be finer than levels to say anything: use 64 per octave.
    """
    scale, bottom, top = (v[:, None] for v in codes.grid(low, high))
    centre = (bins.left + bins.right) / 2
    inside = (centre >= bottom - scale / 2) & (centre <= top + scale / 2)
    level = ((centre.clamp(bottom, top) - bottom) / scale).round().long()
    width = torch.where(inside, bins.right - bins.left, 0.0)
    mass = torch.where(inside, bins.mass.expand_as(width), 0.0)
    zeros = torch.zeros(level.shape[0], codes.qmax - codes.qmin + 1, dtype=torch.float64)
    level_mass = zeros.scatter_add(1, level, mass).gather(1, level)
    level_width = zeros.scatter_add(1, level, width).gather(1, level)
    quantized = torch.where(inside, level_mass * width / level_width.clamp(min=1e-300), 0.0)
    clipped = torch.where(inside, 0.0, bins.mass.expand_as(width))
    edge_high = torch.where(inside, centre, -torch.inf).argmax(1, keepdim=True)
    edge_low = torch.where(inside, centre, torch.inf).argmin(1, keepdim=True)
    above = torch.where(centre > top, clipped, 0.0).sum(1, keepdim=True)
    below = torch.where(centre < bottom, clipped, 0.0).sum(1, keepdim=True)
    reference = mass.scatter_add(1, edge_high, above).scatter_add(1, edge_low, below)
    p = reference / reference.sum(1, keepdim=True)
    q = quantized / quantized.sum(1, keepdim=True).clamp(min=1e-300)
    terms = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0.0)
    return torch.where(inside.any(1), terms.sum(1), torch.inf)


def percentile_range(bins: Bins, percentile: float) -> tuple[float, float]:
    """The range that leaves ``100 - percentile`` percent of the mass outside, half on each side."""
    tail = bins.total * (100.0 - percentile) / 200.0
    positive, negative = bins.left >= 0, bins.right <= 0
    high = _quantile(bins.right[positive], bins.left[positive], bins.mass[positive], tail)
    low = _quantile(-bins.left[negative], -bins.right[negative], bins.mass[negative], tail)
    return -low, high


def _quantile(far: Tensor, near: Tensor, mass: Tensor, tail: float) -> float:
    """The magnitude beyond which lies a mass of `tail`, linear inside a bin."""
    order = far.argsort(descending=True)
    far, near, mass = far[order], near[order], mass[order]
    total = mass.cumsum(0)
    if not total.numel() or float(total[-1]) <= tail:
        return 0.0
    at = int(torch.searchsorted(total, tail, right=True))
    used = (tail - float(total[at] - mass[at])) / float(mass[at])
    return float(far[at] + (near[at] - far[at]) * used)


def _with_extremes(bins: Bins, low: float, high: float, share: float) -> Bins:
    """The density cut to the exact range, with the mass of one value, `share`, at each end.

    Sampling may miss the largest values; they are known exactly from the range.
    """
    left, right = bins.left.clamp(low, high), bins.right.clamp(low, high)
    width = right - left
    used = width > 0
    ends = [v for v in (low, high) if v]
    point = torch.tensor(ends, dtype=torch.float64)
    span = point.abs() * 2.0**-20
    outer = torch.where(point > 0, point - span, point)
    return Bins(
        torch.cat([left[used], outer]),
        torch.cat([right[used], outer + span]),
        torch.cat([bins.mass[used], torch.full((len(ends),), share, dtype=torch.float64)]),
        bins.zeros,
    )


METHODS: dict[str, Callable[[Bins, CodeRange, Tensor, Tensor], Tensor]] = {
    "mse": expected_error,
    "entropy": divergence,
}


def choose_range(
    source: Source,
    extrema: Range | tuple[float, float],
    *,
    bits: int,
    signed: bool = False,
    symmetric: bool = False,
    method: str = "mse",
    narrow: bool = False,
    percentile: float = 99.99,
    schedule: Schedule = DEFAULT,
) -> tuple[float, float]:
    """Choose the clip range ``(low, high)`` of an affine quantizer; pass it to
    `affine_parameters` with the codes of ``IntGrid(bits, signed, narrow)``.

    Args:
        source: the value's histogram. Not read by ``minmax``.
        extrema: the value's exact range; no choice exceeds it.
        bits, signed, narrow: the codes; symmetric: zero point 0.
        method: ``minmax``, ``percentile``, ``mse`` (smallest expected squared error) or
            ``entropy`` (smallest KL divergence).
        percentile: mass kept by ``percentile``, in percent.
        schedule: how finely ``mse`` and ``entropy`` search.

    0 always lies inside. Of equally good ranges the largest is taken. All-zero values give (0, 0).

    Raises:
        ConfigError: unknown method, percentile outside (0, 100].
        CalibrationError: nothing was observed.
    """
    names = ("minmax", "percentile", *METHODS)
    if method not in names:
        what = "range method"
        raise unknown_name(what, method, names)
    if not 0.0 < percentile <= 100.0:
        msg = f"percentile={percentile}; allowed: above 0, up to 100"
        raise ConfigError(msg)
    low, high = _bounds(extrema)
    if symmetric and not signed:
        low = 0.0
    if method == "minmax" or low == high:
        return low, high
    bins = source if isinstance(source, Bins) else source.bins()
    bins = _with_extremes(bins, low, high, _share(bins, extrema))
    if method == "percentile":
        below, above = percentile_range(bins, percentile)
        return max(low, below), min(high, above)
    grid = IntGrid(bits, signed, narrow)
    codes = CodeRange(grid.qmin, grid.qmax, symmetric)
    objective = functools.partial(METHODS[method], bins, codes)
    return search_clip(objective, low, high, tied=symmetric, schedule=schedule)


def _share(bins: Bins, extrema: Range | tuple[float, float]) -> float:
    """How much of the density's mass one observed value stands for."""
    if isinstance(extrema, Range) and extrema.count is not None and bins.total:
        return min(1.0, bins.total / int(extrema.count))
    return 1.0


def _bounds(extrema: Range | tuple[float, float]) -> tuple[float, float]:
    """The exact range, widened to hold 0."""
    if isinstance(extrema, Range):
        if extrema.count is None or not int(extrema.count):
            msg = "no values were observed, so no range can be chosen (0 samples)"
            raise CalibrationError(msg)
        extrema = extrema.bounds()
    return min(0.0, extrema[0]), max(0.0, extrema[1])


def range_sqnr(source: Source, ends: tuple[float, float], *, bits: int) -> float:
    """dB that values of this histogram keep in an unsigned affine format with these ends."""
    bins = source if isinstance(source, Bins) else source.bins()
    grid = IntGrid(bits, signed=False)
    codes = CodeRange(grid.qmin, grid.qmax, symmetric=False)
    low, high = (torch.tensor([end], dtype=torch.float64) for end in ends)
    noise = float(expected_error(bins, codes, low, high))
    signal = float((bins.mass * (bins.left**2 + bins.left * bins.right + bins.right**2) / 3).sum())
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
