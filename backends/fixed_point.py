# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the fixed-point mode: integers only, shared by all backends.

A value that is not in codes is an int64 with 24 fractional bits, saturated at +-2^14. Real
factors become a 31-bit multiplier and a shift. Rounding is half up, once, at the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION = 24
ONE = 1 << FRACTION
# Real 2^14: far beyond any activation, and a masked logit that still is minus infinity to exp.
LIMIT = 1 << (14 + FRACTION)
MULTIPLIER_BITS = 31
LOG2_E = 1549082005  # round(log2(e) * 2^30)
_EXP_BITS = 12


def to_fixed(values: Tensor) -> Tensor:
    """int64 with 24 fractional bits, nearest, saturated; for inputs and constants only."""
    wide = (values.to(torch.float64) * ONE).nan_to_num(0.0, float(LIMIT), -float(LIMIT))
    return torch.round(wide.clamp(-LIMIT, LIMIT)).to(torch.int64)


def from_fixed(values: Tensor) -> Tensor:
    """float32 of fixed-point values; for outputs only."""
    return (values.to(torch.float64) / ONE).to(torch.float32)


def factor(real: Tensor, bits: int = MULTIPLIER_BITS) -> tuple[Tensor, Tensor]:
    """Multiplier and right shift with ``real ~ multiplier * 2^-shift``, int64.

    Args:
        real: positive or negative factors, below 2^30 in magnitude.
        bits: of the multiplier; its relative error is at most 2^-bits.
    """
    mantissa, exponent = torch.frexp(real.to(torch.float64))
    multiplier = torch.round(mantissa * 2.0**bits).to(torch.int64)
    shift = bits - exponent.to(torch.int64)
    # A factor below 2^-31 gives shifts beyond 62: the product is 0 then.
    multiplier = torch.where(shift > 62, torch.zeros_like(multiplier), multiplier)
    return multiplier, shift.clamp(0, 62)


def rounding_shift(x: Tensor, shift: Tensor | int) -> Tensor:
    """``floor(x / 2^shift + 1/2)``."""
    if isinstance(shift, int):
        return x if shift == 0 else (x + (1 << (shift - 1))) >> shift
    half = (torch.ones_like(shift) << shift) >> 1
    return (x + half) >> shift


def rescale(x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """``x * multiplier * 2^-shift``, rounded once, for ``|x| <= 2^31``."""
    return rounding_shift(x.to(torch.int64) * multiplier, shift)


def rescale_wide(x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """The same for ``|x| < 2^47``: split at 16 bits, the low product's tail is dropped.

    So nothing leaves int64. Factors from 2^15 on have shifts below 16: what does not saturate then
    is short enough.
    """
    low = ((x & 0xFFFF) * multiplier) >> 16
    wide = rounding_shift(
        (((x >> 16) * multiplier) + low).clamp(-(2**61), 2**61), (shift - 16).clamp_min(0)
    )
    return torch.where(shift < 16, rescale(x.clamp(-(2**31), 2**31), multiplier, shift), wide)


def saturate(x: Tensor) -> Tensor:
    """Clamp to the range of fixed-point values."""
    return x.clamp(-LIMIT, LIMIT)


def requantize(
    x: Tensor, multiplier: Tensor, shift: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """``clamp(rescale(x) + z, low, high)``: codes of an accumulator (int64)."""
    return torch.minimum(torch.maximum(rescale(x, multiplier, shift) + zero, low), high)


def requantize_fixed(
    x: Tensor, multiplier: Tensor, shift: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The same for a fixed-point value."""
    return torch.minimum(torch.maximum(rescale_wide(x, multiplier, shift) + zero, low), high)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of fixed-point values: 2^-24 resolution kept while ``|a b| < 2^14``.

    The smaller factor is clamped against overflow: beyond 2^12 both are, and the product saturates.
    """
    ordered = a.abs() >= b.abs()
    a, b = torch.where(ordered, a, b), torch.where(ordered, b, a)
    high, low = a >> 12, a & 0xFFF
    return saturate(rounding_shift(high * b.clamp(-(2**36), 2**36) + ((low * b) >> 12), 12))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Quotient of fixed-point values, rounded half up; 0 / 0 is 0."""
    safe = torch.where(b == 0, torch.ones_like(b), b)
    return saturate(torch.div((a << FRACTION) + (safe >> 1), safe, rounding_mode="floor"))


def bit_length(x: Tensor) -> Tensor:
    """Bits of non-negative integers."""
    bits = torch.zeros_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        above = (x >> step) > 0
        bits = bits + above * step
        x = torch.where(above, x >> step, x)
    return bits + (x > 0).to(bits.dtype)


def integer_sqrt(x: Tensor) -> Tensor:
    """``floor(sqrt(x))`` of integers in [0, 2^62), bit by bit."""
    root = torch.zeros_like(x)
    for bit in range(30, -1, -1):
        trial = root | (1 << bit)
        root = torch.where(trial * trial <= x, trial, root)
    return root


def square_root(x: Tensor) -> Tensor:
    """Square root of a fixed-point value (negatives give 0)."""
    return integer_sqrt(x.clamp_min(0) << FRACTION)


@dataclass(frozen=True, slots=True, eq=False)
class ExpTable:
    """``2^-f`` for a fraction of 24 bits, as a product of two tables with 30 bits."""

    coarse: Tensor
    fine: Tensor

    @classmethod
    def make(cls) -> ExpTable:
        """4096 entries each."""
        steps = torch.arange(1 << _EXP_BITS, dtype=torch.float64)
        coarse = torch.round(2.0 ** (30 - steps / 2.0**12)).to(torch.int64)
        fine = torch.round(2.0 ** (30 - steps / 2.0**24)).to(torch.int64)
        return cls(coarse, fine)


def exp_negative(t: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """``exp(-t)`` with 30 fractional bits of fixed-point ``t >= 0``."""
    u = rounding_shift(t.clamp_max(64 << FRACTION) * LOG2_E, 30)
    whole, fraction = u >> FRACTION, u & (ONE - 1)
    first = torch.index_select(coarse, 0, (fraction >> 12).reshape(-1)).view(t.shape)
    second = torch.index_select(fine, 0, (fraction & 0xFFF).reshape(-1)).view(t.shape)
    return rounding_shift(rounding_shift(first * second, 30), whole.clamp_max(62))


def softmax(x: Tensor, dim: int, coarse: Tensor, fine: Tensor) -> Tensor:
    """Softmax of fixed-point logits: exponentials with 30 bits, their sum, one division."""
    powers = exp_negative(x.amax(dim, keepdim=True) - x, coarse, fine)
    total = powers.sum(dim, keepdim=True)
    return torch.div((powers << FRACTION) + (total >> 1), total, rounding_mode="floor")


def normalize(x: Tensor, dims: Sequence[int], eps: float, *, centred: bool = True) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over `dims`, mean, variance and root in integers.

    Works on ``d = n x - sum(x)``, shifted per row to the widest mantissa whose sum of squares
    fits 62 bits, so small rows keep their precision.
    """
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    wanted = (61 - count.bit_length()) // 2
    d = x * count - x.sum(list(dims), keepdim=True) if centred else x * count
    largest = d.abs().amax(list(dims), keepdim=True)
    shift = (bit_length(largest) - wanted).clamp_min(_least_shift(eps, count))
    d = rounding_shift(d, shift)
    variance = torch.div((d * d).sum(list(dims), keepdim=True), count, rounding_mode="floor")
    variance = (variance + _epsilon(eps, count, shift)).clamp_min(1)
    room = (58 - bit_length(variance)).clamp_min(0) >> 1
    root = integer_sqrt(variance << (2 * room))
    return torch.div((d << (FRACTION + room)) + (root >> 1), root, rounding_mode="floor")


def _scaled_epsilon(eps: float, count: int) -> int:
    """``eps n^2 2^80``, a Python integer."""
    return round(eps * 2.0**80) * count * count


def _least_shift(eps: float, count: int) -> int:
    """The shift from which on `eps` in units of the variance stays below 2^60."""
    return max((_scaled_epsilon(eps, count).bit_length() - 91) // 2, 0)


def _epsilon(eps: float, count: int, shift: Tensor) -> Tensor:
    """``eps`` in the units of the shifted variance: ``eps n^2 2^48 / 4^shift``."""
    exact = _scaled_epsilon(eps, count)
    spare = max(exact.bit_length() - 62, 0)
    right = 2 * shift + (32 - spare)
    return torch.full_like(shift, exact >> spare) >> right.clamp_max(62)


def interpolate(x: Tensor, table: Tensor, steps: int, *, grows: bool) -> Tensor:
    """A function from 2^16 segments over [-2^k, 2^k), straight inside each.

    Args:
        x: fixed-point argument.
        table: fixed-point values at the 2^16 + 1 segment ends.
        steps: fractional bits of a segment's width, so that k + 1 + steps is 16.
        grows: beyond the right end the function is the identity, else the last entry.
    """
    width = FRACTION - steps
    low = -(1 << (15 + width))
    inside = x.clamp(low, -low - 1) - low
    index, rest = (inside >> width).reshape(-1), inside & ((1 << width) - 1)
    left = torch.index_select(table, 0, index).view(x.shape)
    right = torch.index_select(table, 0, index + 1).view(x.shape)
    values = left + rounding_shift((right - left) * rest, width)
    beyond = x if grows else table[-1].expand_as(x)
    return torch.where(x >= -low, beyond, values)


def periodic(x: Tensor, table: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """A function of period 2 pi from 2^16 segments of one turn.

    Args:
        x: fixed-point argument in radians.
        table: fixed-point values at the 2^16 + 1 segment ends.
        multiplier, shift: of ``1 / (2 pi)``.
    """
    turn = rescale_wide(x, multiplier, shift) & (ONE - 1)
    index, rest = (turn >> 8).reshape(-1), turn & 0xFF
    left = torch.index_select(table, 0, index).view(x.shape)
    right = torch.index_select(table, 0, index + 1).view(x.shape)
    return left + rounding_shift((right - left) * rest, 8)


def mean(x: Tensor, dims: Sequence[int], *, keepdim: bool) -> Tensor:
    """Mean over `dims`, rounded half up."""
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    total = x.sum(list(dims), keepdim=keepdim)
    return torch.div(total + count // 2, count, rounding_mode="floor")


def resize_weights(size: int, target: int, *, corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right source index, and the right one's weight with 20 bits, per target index."""
    d = torch.arange(target)
    if corners:
        numerator, denominator = d * (size - 1), max(target - 1, 1)
    else:
        numerator, denominator = ((2 * d + 1) * size - target).clamp_min(0), 2 * target
    left = torch.div(numerator, denominator, rounding_mode="floor").clamp_max(size - 1)
    rest = numerator - left * denominator
    weight = torch.div((rest << 20) + denominator // 2, denominator, rounding_mode="floor")
    return left, (left + 1).clamp_max(size - 1), weight


def bilinear(x: Tensor, size: Sequence[int], *, corners: bool) -> Tensor:
    """Bilinear interpolation of [B, C, H, W] with integer weights, rounded once per axis."""
    for axis, target in ((2, int(size[0])), (3, int(size[1]))):
        left, right, weight = resize_weights(x.shape[axis], target, corners=corners)
        shape = [1, 1, 1, 1]
        shape[axis] = target
        weight = weight.view(shape).to(x.device)
        first = x.index_select(axis, left.to(x.device))
        second = x.index_select(axis, right.to(x.device))
        x = rounding_shift(first * ((1 << 20) - weight) + second * weight, 20)
    return x


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest interpolation of [B, C, H, W]."""
    for axis, target in ((2, int(size[0])), (3, int(size[1]))):
        index = torch.arange(target, device=x.device) * x.shape[axis]
        x = x.index_select(axis, torch.div(index, target, rounding_mode="floor"))
    return x
