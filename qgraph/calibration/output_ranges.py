# SPDX-License-Identifier: Apache-2.0
"""Range choice by what the consuming layer's output sees.

A clip that is best for a value can be bad for the layer behind it, since a few large entries meet
large weights. So the loss here is the squared error of the layer's output over sampled rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.calibration.clip_grid import DEFAULT, CodeRange, Schedule, search_clip
from qgraph.errors import CalibrationError, ConfigError
from qgraph.formats.affine import IntGrid

CELLS = 1 << 19  # elements of quantized rows held at once
SEARCH = Schedule(coarse=6, fine=3, rounds=3, smallest=2.0**-2.5)
BRIEF_FROM = 8  # bits; what more would win there: benchmarks/search_effort.py


@dataclass(frozen=True, slots=True)
class Effort:
    """How finely a range is searched.

    Attributes:
        schedule: of the search over both ends by what outputs see.
        histogram: of the search over a histogram.
        projections: outputs are projected to so many random directions, unless the layer has no
            more inputs than that: a root of its Gram matrix says the same; None: exact.
        skip: the first round, which only points to the next, sees every so-manieth row.
    """

    schedule: Schedule = SEARCH
    histogram: Schedule = DEFAULT
    projections: int | None = 64
    skip: int = 1


THOROUGH = Effort()
BRIEF = Effort(histogram=Schedule(coarse=7, rounds=3), projections=16, skip=2)
ROUGH = Effort(Schedule(coarse=4, fine=3, rounds=1, smallest=2.0**-2.25))  # to judge by only


def effort_for(bits: int, brief_from: int = BRIEF_FROM) -> Effort:
    """What a range of so many bits is worth."""
    return BRIEF if bits >= brief_from else THOROUGH


def sketch(weight: Tensor, projections: int, seed: int = 0) -> Tensor:
    """[projections, C]: random signs times the weight [O, C].

    ``|e sketch^T|^2`` estimates ``|e weight^T|^2`` without bias (Johnson-Lindenstrauss); all
    candidates see the same signs, so their order is kept far better than each value.
    """
    if projections >= weight.shape[0]:
        return weight
    signs = _signs(projections, weight.shape[0], seed).to(weight)
    mixed: Tensor = (signs @ weight) / projections**0.5
    return mixed


@functools.lru_cache(maxsize=16)
def _signs(projections: int, outputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (projections, outputs)
    return (torch.randint(0, 2, size, generator=generator, device="cpu") * 2 - 1).to(torch.int8)


def row_importance(rows: Tensor, weight: Tensor, power: float) -> Tensor:
    """fp32 [N]: ``(median / (energy + median)) ** power`` of each row's output energy.

    What follows a layer mostly divides by the size of its output (a normalisation, a softmax, a
    residual sum of like size), so errors count relative to their row. Without this, the few rows
    with massive activations decide alone and all others lose their resolution. Power 1 is the
    plain relative error; 1.5 gave the best text encoder on its own calibration sentences (W8A8,
    18.3 dB against 17.6 at 1 and 18.0 at 2; W6A6 9.8, 8.8, 9.8).
    """
    energy = (rows @ weight.T).square().sum(1)
    middle = energy.median().clamp(min=torch.finfo(torch.float32).tiny)
    return (middle / (energy + middle)) ** power


def output_error(
    rows: Tensor,
    weight: Tensor,
    codes: CodeRange,
    ends: tuple[Tensor, Tensor],
    importance: Tensor | None = None,
) -> Tensor:
    """``sum_n m_n |(Q(x_n) - x_n) W^T|^2`` over rows [N, C] for K ranges `ends`; fp64 [K]."""
    scale, bottom, top = (v.to(rows)[:, None, None] for v in codes.grid(*ends))
    losses = []
    size = max(1, CELLS // max(1, rows.numel()))
    for part in range(0, scale.shape[0], size):
        s, b, t = (v[part : part + size] for v in (scale, bottom, top))
        error = clamped_((rows / s).round_().mul_(s), b, t).sub_(rows)
        energy = (error @ weight.T).square_().sum(2, dtype=torch.float64)
        losses.append(energy.sum(1) if importance is None else energy @ importance.double())
    return torch.cat(losses).cpu()


def clamped_(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x.clamp_(low, high)`` for broadcast bounds, which that op does eight times slower."""
    torch.minimum(x, high, out=x)
    return torch.maximum(x, low, out=x)


def choose_range_for_output(  # noqa: PLR0913 - all options are keyword-only
    rows: Tensor,
    weight: Tensor,
    *,
    low: float,
    high: float,
    bits: int,
    signed: bool = False,
    symmetric: bool = False,
    narrow: bool = False,
    relative: float = 1.5,
    is_gram: bool = False,
    effort: Effort | None = None,
) -> tuple[float, float]:
    """Choose the clip range with the smallest (relative) squared error of a layer's output.

    Args:
        rows: sampled inputs of the layer, fp32 [N, C].
        weight: the layer's weight [O, C] (several consumers: stacked along O), or with `is_gram`
            ``W^T W`` [C, C].
        low, high: the exact range of the inputs; no choice exceeds it.
        relative: power of each row's own output energy that its error is divided by; 0 weighs
            all rows alike. See `row_importance`.
        bits, signed, symmetric, narrow: as in `choose_range`.
        effort: how finely; by default what `effort_for` gives.

    0 always lies inside; of equally good ranges the largest is taken.

    Raises:
        CalibrationError: no rows; ConfigError: shapes that do not fit.
    """
    low, high = min(0.0, low), max(0.0, high)
    if symmetric and not signed:
        low = 0.0
    if rows.ndim != 2 or weight.ndim != 2 or rows.shape[1] != weight.shape[1]:
        msg = f"rows {list(rows.shape)} and weight {list(weight.shape)} need [N, C] and [O, C]"
        raise ConfigError(msg)
    if not rows.shape[0]:
        msg = "no rows were sampled, so no range can be chosen (0 samples)"
        raise CalibrationError(msg)
    if low == high:
        return low, high
    effort = effort_for(bits) if effort is None else effort
    weight = weight.detach().to(rows)
    factor = _fewer(_root(weight) if is_gram else weight, effort.projections)
    grid = IntGrid(bits, signed, narrow)
    codes = CodeRange(grid.qmin, grid.qmax, symmetric)
    importance = row_importance(rows, factor, relative) if relative else None

    def objective(lows: Tensor, highs: Tensor, step: int = 1) -> Tensor:
        counted = None if importance is None else importance[::step]
        return output_error(rows[::step], factor, codes, (lows, highs), counted)

    coarse = functools.partial(objective, step=effort.skip) if effort.skip > 1 else None
    return search_clip(
        objective, low, high, tied=symmetric, schedule=effort.schedule, coarse=coarse
    )


def _fewer(factor: Tensor, projections: int | None) -> Tensor:
    """At most so many rows that see errors as the given ones do, or as many as there are inputs."""
    if projections is None or len(factor) <= projections:
        return factor
    if factor.shape[1] <= projections:  # exactly, as of an image's three channels
        return _root(factor.T @ factor)
    return sketch(factor, projections)


def _root(gram: Tensor) -> Tensor:
    """A matrix R with ``R^T R = gram``."""
    values, vectors = torch.linalg.eigh(gram.double())
    root: Tensor = values.clamp(min=0.0).sqrt()[:, None] * vectors.T
    return root.to(gram.dtype)
