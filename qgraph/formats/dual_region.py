# SPDX-License-Identifier: Apache-2.0
"""Dual-region formats: a fine grid near zero, a coarse one beyond, scales tied by ``2^m``.

After a softmax most values are tiny and a few are near 1; after a GELU the negative side ends at
a small floor and the positive one is long. One region bit picks the grid, so products still run
on integers: the coarse region's codes are shifted left by m (PTQ4RIS; PTQ4ViT's twin uniform).

    non-negative   levels {c} u {c << m}, c in 0 ... L-1           L = 2^(b-1)
    signed         levels {-(c << n)} u {c << p}, min(n, p) = 0    c in 0 ... L and 0 ... L-1

Regions are selected, not added, and a value takes the nearest level of either: encoding is
monotone for every m and the error is at most half a coarse step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.base import check_bits
from qgraph.formats.levels import LevelEncoding

# Shifted codes must fit 16-bit operands, so that an int16 product is one way to run them.
OPERAND_BITS = 15
NON_NEGATIVE, SIGNED = "dual region", "dual region signed"


def region_size(bits: int) -> int:
    """L, the codes of one region: ``2^(b-1)``."""
    return 1 << (check_bits(bits) - 1)


def check_shift(bits: int, shift: int) -> int:
    """Return the shift if shifted codes fit int16.

    Raises:
        ConfigError: a negative shift, or ``bits - 1 + shift`` above 15.
    """
    if shift < 0 or bits - 1 + shift > OPERAND_BITS:
        top = OPERAND_BITS - bits + 1
        msg = f"dual region: shift is {shift}; allowed at {bits} bits: 0 to {top}"
        raise ConfigError(msg)
    return shift


def non_negative_levels(bits: int, shift: int) -> Tensor:
    """int32 [<= 2^b], ascending and distinct: {c} u {c << shift}."""
    codes = torch.arange(region_size(bits), dtype=torch.int32)
    levels: Tensor = torch.cat([codes, codes << check_shift(bits, shift)]).unique()
    return levels


def signed_levels(bits: int, shift: int) -> Tensor:
    """int32 [2^b], ascending: the sign picks the region.

    `shift` >= 0 makes the positive side coarse, below 0 the negative one.
    """
    size = region_size(bits)
    below, above = max(-shift, 0), max(shift, 0)
    negative = -(torch.arange(size, 0, -1, dtype=torch.int32) << check_shift(bits, below))
    positive = torch.arange(size, dtype=torch.int32) << check_shift(bits, above)
    return torch.cat([negative, positive])


def dual_region(bits: int, shift: int, *, high: float = 1.0) -> LevelEncoding:
    """The encoding of values in [0, high], such as softmax outputs.

    The fine step is ``high / ((L-1) << shift)``, so `high` itself is a level (1.0 decodes to
    exactly 1.0) and so is 0.

    Raises:
        ConfigError: bits outside 2..15, or a shift whose codes exceed int16.
    """
    levels = non_negative_levels(bits, shift)
    scale = torch.tensor(high / int(levels[-1]), dtype=torch.float64).to(torch.float32)
    return LevelEncoding.nearest(NON_NEGATIVE, scale, levels, storage_bits=bits)


def signed_dual_region(
    bits: int, shift: int, scale: Tensor, *, axis: int | None = None
) -> LevelEncoding:
    """The encoding of values of both signs, such as GELU outputs.

    Args:
        bits: of a code; the code is two's complement, its sign the region.
        shift: the positive step is ``scale << shift``; below 0 the negative one is coarse.
        scale: the fine step, fp32 [] or [C].
        axis: channel axis of the scale.

    Raises:
        ConfigError: bits outside 2..16, or a shift whose codes exceed int16.
    """
    return LevelEncoding.nearest(
        SIGNED, scale, signed_levels(bits, shift), storage_bits=bits, axis=axis
    )


def packed_codes(levels: Tensor, bits: int, shift: int) -> Tensor:
    """Rank -> packed code of a non-negative table: ``region << (b-1) | c``, int32 [ranks].

    A level that both regions hold is packed as fine. For signed tables the packed code is the
    two's complement c itself, see `packed_signed_codes`.
    """
    size = region_size(bits)
    fine = levels < size
    coarse = torch.div(levels, 1 << shift, rounding_mode="floor") | size
    return torch.where(fine, levels, coarse).to(torch.int32)


def packed_signed_codes(levels: Tensor, shift: int) -> Tensor:
    """Rank -> packed code of a signed table: two's complement c in [-L, L-1], int32 [ranks]."""
    below, above = max(-shift, 0), max(shift, 0)
    return torch.where(levels < 0, -((-levels) >> below), levels >> above).to(torch.int32)


def rank_table(bits: int, shift: int) -> Tensor:
    """Packed code -> rank of the non-negative format, int32 [2^b]; both zeros have rank 0."""
    codes = torch.arange(1 << check_bits(bits), dtype=torch.int32)
    size = region_size(bits)
    region, c = codes >= size, codes % size
    meant = torch.where(region, c << shift, c)
    return torch.searchsorted(non_negative_levels(bits, shift), meant).to(torch.int32)


def duplicate_codes(encoding: LevelEncoding) -> int:
    """How many of the 2^b packed codes name a level that another code names too."""
    return (1 << encoding.storage_bits) - int(encoding.levels.shape[-1])


def shift_of(encoding: LevelEncoding) -> int:
    """The shift between the regions, read back from the table.

    Raises:
        ConfigError: the encoding is no dual-region one.
    """
    low, high = int(encoding.levels[0]), int(encoding.levels[-1])
    size = region_size(encoding.storage_bits)
    if encoding.name == NON_NEGATIVE:
        return (high // (size - 1)).bit_length() - 1
    if encoding.name == SIGNED:
        below, above = (-low // size).bit_length() - 1, (high // (size - 1)).bit_length() - 1
        return above - below
    msg = f"{encoding.describe()} has no regions"
    raise ConfigError(msg)
