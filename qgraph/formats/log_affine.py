# SPDX-License-Identifier: Apache-2.0
"""Log-affine: an affine grid in the logarithm, dense near the centre, for peaked weights.

    code q = clamp(round(k log2 |w - m| + a), 0, n-1) on each side of m, n = 2^(b-1)
    exact     w^ = m +- 2^((q - a) / k)      neighbours differ by the factor 2^(1/k)
    shift     w^ = +- s 2^q                  a product is a shift, whatever k is

After Reg-PTQ (CVPR 2024, pp. 16174-16184, equation 9); the paper leaves signs, centre and the
decoder open. Levels become integers at most 127, so a decoded weight is an int8 operand and
products run as for any other weight; storage stays b bits and a table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qgraph.errors import ConfigError, unknown_name
from qgraph.formats.base import check_bits
from qgraph.formats.levels import LevelEncoding

NAME = "log affine"
Decoder = Literal["exact", "shift"]
DECODERS: tuple[Decoder, ...] = ("exact", "shift")
SMALL_TOP, LARGE_TOP = 127, (1 << 15) - 1  # largest integer level, up to 5 bits and beyond
GUARD = 0.25  # thresholds keep this distance from levels, so that levels encode to themselves
TINY = 2.0**-126  # distances below are taken as this, so that the logarithm is finite


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LogAffine:
    """The numbers of the format, per channel and side (0: below the centre, 1: above).

    Attributes:
        bits: of a code: one for the side, the others for q.
        slope: k, codes per octave, fp64 [C, 2], positive.
        offset: a, fp64 [C, 2].
        centre: m, fp64 [C].
        decoder: ``exact`` or ``shift``; the latter needs a centre of 0.
        reserve_zero: code 0 of both sides stands for the centre itself.

    Raises:
        ConfigError: bits outside 2..15, a slope that is not positive, numbers not finite, a
            centre with the shift decoder, or more codes than it can shift.
    """

    bits: int
    slope: Tensor
    offset: Tensor
    centre: Tensor
    decoder: Decoder = "exact"
    reserve_zero: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.decoder not in DECODERS:
            raise unknown_name("decoder", self.decoder, DECODERS)
        for name in ("slope", "offset", "centre"):
            values = getattr(self, name).detach().to(torch.float64)
            if not bool(torch.isfinite(values).all()):
                msg = f"log affine: {name} is not finite"
                raise ConfigError(msg)
            object.__setattr__(self, name, values)
        if not bool((self.slope > 0).all()):
            msg = f"log affine: slope must be positive, got {float(self.slope.min()):g}"
            raise ConfigError(msg)
        if self.reserve_zero and self.bits == 2:
            msg = "log affine: with an exact zero, 2 bits leave one level per side; use 3 or more"
            raise ConfigError(msg)
        if self.decoder == "shift" and (bool(self.centre.any()) or self.count > 15):
            msg = "log affine: the shift decoder needs centre 0 and at most 4 bits"
            raise ConfigError(msg)

    @property
    def count(self) -> int:
        """Codes per side, n = 2^(b-1)."""
        return 1 << (self.bits - 1)

    def distances(self) -> Tensor:
        """2^((q - a) / k): fp64 [C, 2, n], what code q of the exact decoder stands for."""
        codes = torch.arange(self.count, dtype=torch.float64, device=self.slope.device)
        exponent = (codes - self.offset.unsqueeze(-1)) / self.slope.unsqueeze(-1)
        return torch.exp2(exponent.clamp(-126.0, 126.0))

    def borders(self) -> Tensor:
        """Distances at which the code changes from q to q + 1: fp64 [C, 2, n-1]."""
        codes = torch.arange(self.count - 1, dtype=torch.float64, device=self.slope.device) + 0.5
        exponent = (codes - self.offset.unsqueeze(-1)) / self.slope.unsqueeze(-1)
        return torch.exp2(exponent.clamp(-126.0, 126.0))


def side_codes(weight: Tensor, parameters: LogAffine) -> tuple[Tensor, Tensor]:
    """(q, side) of a weight [C, N]: int64 codes in [0, n-1] and 0 below the centre, 1 at or above.

    The definition, with a logarithm; encoding itself compares with thresholds.
    """
    away = weight.to(torch.float64) - parameters.centre[:, None]
    side = (away >= 0).to(torch.int64)
    slope, offset = parameters.slope.gather(1, side), parameters.offset.gather(1, side)
    codes = torch.round(slope * away.abs().clamp(min=TINY).log2() + offset)
    return codes.clamp(0, parameters.count - 1).to(torch.int64), side


def log_affine(
    parameters: LogAffine, *, step: Tensor | None = None, top: int | None = None,
    axis: int | None = 0,
) -> LevelEncoding:  # fmt: skip
    """The encoding with these numbers.

    Args:
        parameters: of C channels.
        step: s of the shift decoder, fp32 [C]: see `shift_steps`.
        top: the largest integer level, before levels that coincide are pushed apart; default 127 up
            to 5 bits (an int8 operand), else 2^15 - 1.
        axis: channel axis; None: one table for the tensor, C is 1.

    Integer levels that coincide are pushed apart by one, away from the centre.

    Raises:
        ConfigError: several channels without an axis, or a missing step.
    """
    if axis is None and parameters.slope.shape[0] != 1:
        msg = f"log affine: {parameters.slope.shape[0]} channels need an axis"
        raise ConfigError(msg)
    top = top or (SMALL_TOP if parameters.bits <= 5 else LARGE_TOP)
    if parameters.decoder == "shift":
        if step is None:
            msg = "log affine: the shift decoder needs a step"
            raise ConfigError(msg)
        unit = step.to(torch.float64)
        powers = torch.exp2(torch.arange(parameters.count, dtype=torch.float64, device=unit.device))
        reach = unit[:, None, None] * powers.expand(*parameters.slope.shape, -1)
    else:
        reach = parameters.distances()
        ends = reach[..., -1] + parameters.centre.abs()[:, None]
        unit = ends.amax(1) / top
    levels, borders = _table(parameters, reach, unit)
    if axis is None:
        unit, levels, borders = unit[0], levels[0], borders[0]
    return LevelEncoding(
        name=NAME, scale=unit.to(torch.float32), levels=levels, thresholds=borders,
        storage_bits=parameters.bits, axis=axis,
    )  # fmt: skip


def _table(parameters: LogAffine, reach: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Integer levels int32 [C, L] and thresholds fp32 [C, L-1], in units."""
    middle = torch.round(parameters.centre / unit)
    first = int(parameters.reserve_zero)
    # Neighbours of the centre keep off it, and each level off the one before.
    away = torch.round(reach[..., first:] / unit[:, None, None]).clamp(min=1.0)
    for q in range(1, away.shape[-1]):
        away[..., q] = torch.maximum(away[..., q], away[..., q - 1] + 1)
    below = middle[:, None] - away[:, 0].flip(-1)
    above = middle[:, None] + away[:, 1]
    zero = [middle[:, None]] if parameters.reserve_zero else []
    levels = torch.cat([below, *zero, above], -1)
    cuts = parameters.borders() / unit[:, None, None]
    centre = (parameters.centre / unit)[:, None]
    inner = [] if parameters.reserve_zero else [centre]
    cuts = torch.cat([centre - cuts[:, 0].flip(-1), *inner, centre + cuts[:, 1]], -1)
    low, high = levels[:, :-1] + GUARD, levels[:, 1:] - GUARD
    return levels.to(torch.int32), torch.minimum(torch.maximum(cuts, low), high).float()


def shift_steps(weight: Tensor, parameters: LogAffine) -> Tensor:
    """s of the shift decoder per channel, fp32 [C]: least squares of w against +- 2^q.

    The paper takes the mean of the ratios instead, which a single small weight can decide.
    """
    codes, side = side_codes(weight, parameters)
    powers = torch.exp2(codes.to(torch.float64)) * (2 * side - 1)
    if parameters.reserve_zero:
        powers = powers * (codes > 0)
    values = weight.to(torch.float64)
    step = (values * powers).sum(1) / powers.square().sum(1).clamp(min=TINY)
    return step.clamp(min=TINY).to(torch.float32)


def parameters_of(encoding: LevelEncoding) -> LogAffine:
    """Slope, offset and centre read back from a table, by least squares in the logarithm.

    Exact up to the rounding of the integer levels.

    Raises:
        ConfigError: the encoding is no log-affine one.
    """
    if encoding.name != NAME:
        msg = f"{encoding.describe()} is no log-affine format"
        raise ConfigError(msg)
    levels = encoding.levels.reshape(-1, encoding.levels.shape[-1]).to(torch.float64)
    count = 1 << (encoding.storage_bits - 1)
    zero = levels.shape[-1] == 2 * count - 1
    inner = count - int(zero)
    cuts = encoding.thresholds.reshape(len(levels), -1).to(torch.float64)
    middle = levels[:, inner] if zero else cuts[:, inner - 1]
    sides = torch.stack([
        middle[:, None] - levels[:, :inner].flip(-1), levels[:, -inner:] - middle[:, None]
    ], 1)  # fmt: skip
    unit = encoding.scale.reshape(-1, 1, 1).to(torch.float64)
    logs = (sides * unit).clamp(min=TINY).log2()
    codes = torch.arange(int(zero), count, dtype=torch.float64, device=levels.device)
    spread = codes - codes.mean()
    rise = (logs * spread).sum(-1) / spread.square().sum().clamp(min=TINY)
    slope = 1.0 / rise.clamp(min=1e-6)
    offset = codes.mean() - slope * logs.mean(-1)
    return LogAffine(
        bits=encoding.storage_bits, slope=slope, offset=offset,
        centre=(middle * unit.reshape(-1)).expand(slope.shape[0]), reserve_zero=zero,
    )  # fmt: skip


def with_parameters(parameters: LogAffine, slope: Tensor, offset: Tensor) -> LogAffine:
    """The same format with other slopes and offsets [C, 2]."""
    return replace(parameters, slope=slope, offset=offset)
