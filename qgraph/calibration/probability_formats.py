# SPDX-License-Identifier: Apache-2.0
"""Formats of attention probabilities, searched by the error of A V over sampled rows.

Power-of-two bases, a uniform format and a dual-region one, each on a fixed log grid of scales:
the error is not unimodal in the scale (PTQ4SAM, arXiv 2405.03144, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgraph.calibration.histogram import Bins
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from qgraph.formats.levels import by_channel, midpoints
from qgraph.formats.power_of_two import candidate_taus, power_of_two

CELLS = 1 << 22  # elements of values that the sample of one site may hold, and of a chunk
COARSE, REACH = 4, 6  # steps per octave of the first round; octaves below the largest value
FINE = 16
FAMILIES = ("uniform", "power_of_two", "dual_region")


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate and its error on the sampled rows."""

    error: float
    family: str
    encoding: Encoding
    detail: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What the search for one format looks at.

    Attributes:
        rows: of A, [n, S].
        values: their V, [n, S, D].
        peak: the largest probability known; grids of scales start there.
        everywhere: histogram of all probabilities; None: the rows are all there is.
    """

    rows: Tensor
    values: Tensor
    peak: float
    everywhere: Bins | None = None

    @classmethod
    def of(cls, rows: Tensor, values: Tensor) -> Sample:
        """Rows and values that are all there is."""
        return cls(rows, values, float(rows.max()))

    def unseen(self, tops: Tensor) -> Tensor:
        """fp64 [K]: what clipping at `tops` costs beyond what it costs in the sampled rows.

        A few rows rarely hold the largest probabilities, and a clip looks free where it is not.
        Error of entry j of a row: ``(A_j - top)^2 |V_j|^2``, the cross terms left out.
        """
        if self.everywhere is None:
            return torch.zeros_like(tops)
        bins, norms = self.everywhere, self.values.double().square().sum(-1)
        rows, tops = self.rows.double(), tops.to(self.rows.device).unsqueeze(-1)
        typical = (rows.square() * norms).sum() / rows.square().sum()
        high = rows > tops.min()
        sampled = ((rows[high] - tops).clamp_(min=0.0).square_() * norms[high]).sum(1)
        middle = ((bins.left + bins.right) / 2).to(tops.device)
        mass = bins.mass.to(tops.device) * (rows.numel() / bins.total)
        known = ((middle - tops).clamp_(min=0.0).square_() * mass).sum(1) * typical
        return (known - sampled).clamp_(min=0.0).cpu()


def best_by_family(
    sample: Sample, bits: int, formats: tuple[str, ...] = FAMILIES
) -> dict[str, Choice]:
    """The best candidate of each family; a family without one is left out."""
    search = {"uniform": _uniform, "power_of_two": _powers, "dual_region": _regions}
    found = {family: search[family](sample, bits) for family in formats}
    return {family: choice for family, choice in found.items() if choice is not None}


def best_by_head(
    samples: Sequence[Sample], bits: int, formats: tuple[str, ...] = FAMILIES, *, axis: int
) -> dict[str, Choice]:
    """The best candidate of each family with numbers of its own for every head.

    Args:
        samples: of each head along `axis` of the probabilities.
        bits, formats: as in `best_by_family`.
        axis: of the heads.
    """
    heads = [best_by_family(sample, bits, formats) for sample in samples]
    return {
        family: _joined([head[family] for head in heads], axis)
        for family in formats
        if all(family in head for head in heads)
    }


def _joined(choices: list[Choice], axis: int) -> Choice:
    first, encodings = choices[0], [each.encoding for each in choices]
    tables = [each for each in encodings if isinstance(each, LevelEncoding)]
    joined: Encoding
    if tables:
        joined = by_channel(tables, axis)
    else:
        assert isinstance(first.encoding, AffineEncoding)
        scale = torch.stack([each.scale for each in encodings])
        zero = torch.zeros_like(scale, dtype=torch.int32)
        joined = replace(first.encoding, scale=scale, zero_point=zero, axis=axis)
    details = dict.fromkeys(each.detail for each in choices)
    text = next(iter(details)) if len(details) == 1 else f"per head: {'; '.join(details)}"
    return Choice(sum(each.error for each in choices), first.family, joined, text)


def attention_errors(
    rows: Tensor, values: Tensor, scales: Tensor, levels: Tensor, thresholds: Tensor | None
) -> Tensor:
    """Sum of squared errors of A V, fp64 [K], for one table of levels at K scales.

    `thresholds` None: levels are all integers from 0 on, the affine rounding.
    """
    errors = []
    size = max(1, CELLS // max(1, rows.numel()))
    for part in scales.float().split(size):
        step = part.view(1, -1, 1)
        units = rows.unsqueeze(1) / step
        if thresholds is None:
            level = units.round_().clamp_(max=float(levels[-1]))
        else:
            level = levels.float()[torch.bucketize(units, thresholds)]
        moved = torch.bmm(level.mul_(step).sub_(rows.unsqueeze(1)), values)
        errors.append(moved.double().square().sum(dim=(0, 2)))
    return torch.cat(errors).cpu()


def _search(sample: Sample, levels: Tensor, thresholds: Tensor | None) -> tuple[float, float]:
    """(smallest error, top): a log grid of the largest value's level, refined around the best."""
    peak, top_level = sample.peak, float(levels[-1])
    grid = torch.arange(-2, COARSE * REACH + 1, dtype=torch.float64) / COARSE
    best = (math.inf, peak)
    for turn in range(2):
        tops = peak * torch.exp2(-grid)
        errors = attention_errors(sample.rows, sample.values, tops / top_level, levels, thresholds)
        errors = errors + sample.unseen(tops)
        at = int(errors.argmin())
        best = min(best, (float(errors[at]), float(tops[at])))
        if turn == 0:
            near = torch.arange(1 - FINE // COARSE, FINE // COARSE, dtype=torch.float64)
            grid = grid[at] + near / FINE
    return best


def _uniform(sample: Sample, bits: int) -> Choice:
    grid = IntGrid(bits, signed=False)
    levels = torch.arange(grid.qmax + 1, device=sample.rows.device)
    error, top = _search(sample, levels, None)
    scale = torch.tensor(top / grid.qmax, dtype=torch.float32)
    zero = torch.zeros((), dtype=torch.int32)
    encoding = AffineEncoding(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax)
    return Choice(error, "uniform", encoding, f"uniform up to {top:.3g}")


def _powers(sample: Sample, bits: int) -> Choice | None:
    found = []
    for tau in candidate_taus(bits):
        encoding = power_of_two(bits, tau, 1.0).to(sample.rows.device)
        error, top = _search(sample, encoding.levels, encoding.thresholds)
        found.append((error, tau, top))
    if not found:
        return None
    error, tau, top = min(found)
    chosen = power_of_two(bits, tau, top)
    return Choice(error, "power_of_two", chosen, f"base 2^(-1/{tau}) from {top:.3g} down")


def _regions(sample: Sample, bits: int) -> Choice:
    found = []
    for shift in range(1, bits):
        levels = dual_region(bits, shift).levels.to(sample.rows.device)
        error, top = _search(sample, levels, midpoints(levels))
        found.append((error, shift, top))
    error, shift, top = min(found)
    chosen: LevelEncoding = dual_region(bits, shift, high=top)
    return Choice(error, "dual_region", chosen, f"regions 2^{shift} apart up to {top:.3g}")
