# SPDX-License-Identifier: Apache-2.0
"""Power-of-two base: levels ``2^(-c / tau)``, dense near zero, for probabilities of attention.

    code c = tau * n + r     level = T[r] >> n, rounded     T[r] = round(2^15 * 2^(-r / tau))

So a product with such a level is a table of tau integers and a shift. One code stands for zero:
masked keys stay exactly masked. Codes are found by thresholds in the middle of the *logarithms*,
``2^(-(c + 1/2) / tau)``, so no logarithm is computed (PTQ4SAM, arXiv 2405.03144, section 3.3; the
published code has one output more than b bits can tell apart).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.base import check_bits
from qgraph.formats.levels import LevelEncoding

NAME = "power of two"
FRACTION = 15  # levels are integers in units of scale, the largest is 2^15
EXPONENT_CAP = 16  # what lies below 2^-16 of the largest level is zero
TAUS = (1, 2, 4, 8, 16)
GUARD = 0.25  # thresholds keep this distance from levels, so that levels encode to themselves


@dataclass(frozen=True, slots=True)
class PowerTable:
    """The levels of one width and base.

    Attributes:
        tau: steps per octave.
        levels: int32 [L], ascending, 0 first.
        thresholds: fp32 [L-1], between them.
        codes: int32 [L], packed code of each level: c, and ``2^b - 1`` for zero.
    """

    tau: int
    levels: Tensor
    thresholds: Tensor
    codes: Tensor


def fractions(tau: int) -> Tensor:
    """int64 [tau]: T[r], the levels of the first octave."""
    steps = torch.arange(tau, dtype=torch.float64) / tau
    return torch.round(torch.exp2(FRACTION - steps)).to(torch.int64)


def level_of_code(code: Tensor, tau: int) -> Tensor:
    """int64: table, then rounding shift, as an integer kernel does it."""
    octave = torch.div(code, tau, rounding_mode="floor")
    base = fractions(tau)[code % tau]
    half = torch.where(octave > 0, torch.ones_like(octave) << (octave - 1).clamp(min=0), 0)
    return (base + half) >> octave


def power_table(bits: int, tau: int) -> PowerTable:
    """Levels, thresholds and packed codes of a width and a base.

    Levels that coincide as integers are one level; its packed code is the first of them.

    Raises:
        ConfigError: bits outside 2..16, or a tau that is not one of `TAUS`.
    """
    if tau not in TAUS:
        msg = f"power of two: tau is {tau!r}; allowed: {', '.join(map(str, TAUS))}"
        raise ConfigError(msg)
    last = min((1 << check_bits(bits)) - 2, EXPONENT_CAP * tau)
    codes = torch.arange(last + 1)
    magnitudes = level_of_code(codes, tau)
    codes, magnitudes = codes[magnitudes > 0], magnitudes[magnitudes > 0]
    changes = magnitudes[1:] != magnitudes[:-1]
    starts = torch.cat([torch.tensor([True]), changes])
    ends = torch.cat([changes, torch.tensor([True])])
    middles = torch.exp2(FRACTION - (codes[ends].double() + 0.5) / tau)
    above = magnitudes[ends].double()
    below = torch.cat([above[1:], above.new_zeros(1)])
    cuts = torch.minimum(torch.maximum(middles, below + GUARD), above - GUARD)
    zero = torch.zeros(1, dtype=torch.int64)
    return PowerTable(
        tau,
        torch.cat([zero, magnitudes[starts].flip(0)]).to(torch.int32),
        cuts.flip(0).to(torch.float32),
        torch.cat([zero + (1 << bits) - 1, codes[starts].flip(0)]).to(torch.int32),
    )


def candidate_taus(bits: int) -> tuple[int, ...]:
    """Bases worth trying: at least half of the 2^b codes must name distinct levels."""
    least = 1 << (check_bits(bits) - 1)
    return tuple(tau for tau in TAUS if power_table(bits, tau).levels.numel() >= least)


def power_of_two(
    bits: int, tau: int, top: float | Tensor, *, axis: int | None = None
) -> LevelEncoding:
    """The encoding whose largest level stands for `top`.

    Args:
        bits: of a code.
        tau: steps per octave, one of `TAUS`.
        top: largest value, [] or [C] (per channel of `axis`).
        axis: channel axis of `top`.

    Raises:
        ConfigError: bits, tau or top out of range.
    """
    table = power_table(bits, tau)
    scale = (torch.as_tensor(top, dtype=torch.float64) / 2.0**FRACTION).to(torch.float32)
    return LevelEncoding(
        name=NAME, scale=scale, levels=table.levels, thresholds=table.thresholds,
        storage_bits=bits, axis=axis,
    )  # fmt: skip


def tau_of(encoding: LevelEncoding) -> int:
    """Steps per octave, read back from the table.

    Raises:
        ConfigError: the encoding is no power-of-two one.
    """
    if encoding.name != NAME:
        msg = f"{encoding.describe()} has no power-of-two base"
        raise ConfigError(msg)
    ratio = float(encoding.levels[-1]) / float(encoding.levels[-2])
    return round(1.0 / math.log2(ratio))
