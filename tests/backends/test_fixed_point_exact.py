# SPDX-License-Identifier: Apache-2.0
"""Every operation of the fixed-point mode against its definition in Python integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qgraph.backends.fixed_point import (
    FRACTION,
    LIMIT,
    ONE,
    ExpTable,
    bilinear,
    divide,
    exp_negative,
    factor,
    from_fixed,
    interpolate,
    mean,
    multiply,
    nearest,
    normalize,
    periodic,
    requantize,
    requantize_fixed,
    rescale_wide,
    resize_weights,
    rounding_shift,
    saturate,
    softmax,
    square_root,
    to_fixed,
)

HALF = Fraction(1, 2)
TABLE = ExpTable.make()
VALUES = st.integers(-LIMIT, LIMIT)
EDGES = [0, 1, -1, ONE, -ONE, LIMIT, -LIMIT, LIMIT - 1, 1 - LIMIT, ONE // 2, 4097 * ONE]
FEW = settings(max_examples=60, deadline=None)


def t(*values: Any) -> Any:
    return torch.tensor(values, dtype=torch.int64)


def half_up(x: Fraction) -> int:
    return math.floor(x + HALF)


def clamped(x: int, low: int = -LIMIT, high: int = LIMIT) -> int:
    return min(max(x, low), high)


def test_the_format_has_24_fractional_bits_and_ends_at_2_to_the_14():
    assert (FRACTION, ONE, LIMIT) == (24, 16777216, 274877906944)
    given_values = [0.0, 1.0, -1.5, 2.0**14, 2.0**14 - 2.0**-10, 2.0**15, -(2.0**20), math.inf]
    got = to_fixed(torch.tensor([*given_values, -math.inf, math.nan], dtype=torch.float64))
    wanted = [clamped(round(v * ONE)) if math.isfinite(v) else LIMIT for v in given_values]
    assert got.tolist() == [*wanted, -LIMIT, 0]
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5], dtype=torch.float64) / ONE
    assert to_fixed(ties).tolist() == [0, 2, 2, 0, -2]
    back = from_fixed(t(*EDGES))
    assert back.dtype == torch.float32
    assert back.tolist() == [float(np.float32(v / ONE)) for v in EDGES]
    assert saturate(t(*EDGES, LIMIT + 1, -LIMIT - 1)).tolist() == [*EDGES, LIMIT, -LIMIT]


@FEW
@given(st.floats(2.0**-45, 2.0**30, exclude_max=True), st.sampled_from([31, 16, 15]))
@example(2.0**-32, 31)
@example(2.0**-33, 31)
@example(2.0**-34, 31)
@example(1 - 2.0**-40, 31)
@example(2.0**29, 31)
def test_a_factor_is_a_mantissa_and_a_shift(real, bits):
    mantissa, exponent = math.frexp(real)
    for sign in (1, -1):
        multiplier, shift = factor(torch.tensor(sign * real, dtype=torch.float64), bits)
        right = bits - exponent
        assert int(shift) == clamped(right, 0, 62)
        assert int(multiplier) == (0 if right > 62 else sign * round(mantissa * 2**bits))


@FEW
@given(st.integers(-(2**61), 2**61), st.integers(0, 62))
@example(3, 1)
@example(-3, 1)
@example(7, 0)
def test_a_shift_rounds_half_up_once(x, shift):
    wanted = half_up(Fraction(x, 2**shift))
    assert int(rounding_shift(t(x), shift)) == wanted
    assert int(rounding_shift(t(x), t(shift))) == wanted


@FEW
@given(
    st.integers(-(2**47), 2**47), st.integers(-(2**31), 2**31), st.integers(0, 62),
    st.integers(-300, 300),
)  # fmt: skip
@example(2**47, 2**31, 16, 0)
@example(-(2**47), 2**31, 17, 5)
@example(2**40, 2**30, 15, 0)
@example(-(2**40), 2**30, 15, 0)
@example(65535, 2**31 - 1, 16, 0)
@example(65536 * 5 + 65535, 2**31 - 1, 20, 0)
def test_wide_values_lose_at_most_the_tail_below_sixteen_bits(x, multiplier, shift, zero):
    if shift < 16:
        wanted = half_up(Fraction(clamped(x, -(2**31), 2**31) * multiplier, 2**shift))
    else:
        kept = clamped((x * multiplier) >> 16, -(2**61), 2**61)
        wanted = half_up(Fraction(kept, 2 ** (shift - 16)))
    given_values = t(x), t(multiplier), t(shift)
    assert int(rescale_wide(*given_values)) == wanted
    codes = requantize_fixed(*given_values, t(zero), t(-128), t(127))
    assert int(codes) == clamped(wanted + zero, -128, 127)
    if abs(x) < 2**31:
        exact = half_up(Fraction(x * multiplier, 2**shift))
        codes = requantize(*given_values, t(zero), t(-8), t(7))
        assert int(codes) == clamped(exact + zero, -8, 7)


@settings(max_examples=150, deadline=None)
@given(VALUES | st.integers(-(2**26), 2**26), VALUES | st.integers(-(2**26), 2**26))
@example(ONE, 8192 * ONE)
@example(8192 * ONE, ONE)
@example(-ONE, 16383 * ONE)
@example(LIMIT, LIMIT)
@example(LIMIT, -LIMIT)
@example(4095, 4095)
@example(ONE + 1, ONE - 1)
def test_products_keep_their_resolution_up_to_the_limit(a, b):
    wanted = clamped(half_up(Fraction((a * b) >> 12, 2**12)))
    assert int(multiply(t(a), t(b))) == wanted


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES | st.integers(-1000, 1000))
@example(0, 0)
@example(5, 0)
@example(-5, 0)
@example(LIMIT, 1)
@example(-7, 2)
@example(7, -2)
@example(1, 3)
def test_quotients_are_rounded_half_up_and_a_zero_divides_like_the_smallest_step(a, b):
    safe = b or 1
    wanted = clamped(math.floor(Fraction((a << 24) + (safe >> 1), safe)))
    assert int(divide(t(a), t(b))) == wanted


@given(st.integers(-(2**38), 2**38))
@FEW
def test_square_roots_are_those_of_python_integers(x):
    assert int(square_root(t(x))) == math.isqrt(max(x, 0) << 24)


def exponential(x: int) -> int:
    """``exp(-x)`` as the tables give it: two factors of 30 bits, rounded at every shift."""
    u = half_up(Fraction(min(x, 64 * ONE) * round(math.log2(math.e) * 2**30), 2**30))
    whole, rest = divmod(u, ONE)
    first, second = round(2 ** (30 - (rest // 4096) / 4096)), round(2 ** (30 - (rest % 4096) / ONE))
    return half_up(Fraction(half_up(Fraction(first * second, 2**30)), 2 ** min(whole, 62)))


@FEW
@given(st.integers(0, 30 * ONE) | st.integers(0, 2**39))
@example(0)
@example(ONE)
@example(1)
@example(11629080)  # about ln 2
def test_exponentials_have_thirty_bits(x):
    got = int(exp_negative(t(x), TABLE.coarse, TABLE.fine))
    assert got == exponential(x)
    assert abs(got / 2**30 - math.exp(-x / ONE)) < 2.0**-24
    assert len(TABLE.coarse) == len(TABLE.fine) == 4096
    assert (int(TABLE.coarse[0]), int(TABLE.fine[0])) == (2**30, 2**30)
    assert int(TABLE.coarse[2048]) == round(2**29.5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-(2**27), 2**27), min_size=6, max_size=6))
@example([0, 0, 0, 0, 0, 0])
@example([5 * ONE, 4 * ONE, 3 * ONE, 0, -ONE, ONE])
def test_a_softmax_divides_exponentials_by_their_sum(values):
    x = t(*values).reshape(2, 3)
    for dim in (0, 1, -1):
        got = softmax(x, dim, TABLE.coarse, TABLE.fine)
        rows = x.T if dim == 0 else x
        found = got.T if dim == 0 else got
        for row, out in zip(rows.tolist(), found.tolist(), strict=True):
            powers = [exponential(max(row) - v) for v in row]
            total = sum(powers)
            assert out == [((p << 24) + total // 2) // total for p in powers]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([2.0**-18, 1e-3, 0.05, 1.0, 300.0, 8000.0]),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-5, 0.5]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_norms_are_those_of_exact_numbers(seed, spread, eps, centred, both):
    generator = torch.Generator().manual_seed(seed)
    x = to_fixed(torch.randn(3, 4, 5, generator=generator) * spread + spread * (seed % 3))
    dims = [1, 2] if both else [-1]
    got = normalize(x, dims, eps, centred=centred)
    exact = x.double().numpy().astype(np.longdouble) / ONE
    axes = (1, 2) if both else (2,)
    middle = exact.mean(axes, keepdims=True) if centred else 0.0
    away = exact - middle
    spreads = np.sqrt((away**2).mean(axes, keepdims=True) + eps)
    wanted = np.divide(away, spreads, out=np.zeros_like(away), where=spreads > 0)
    off = np.abs(got.double().numpy() / ONE - wanted)
    unit = 2.0**-24
    assert float((off / (2 * unit + np.abs(wanted) * 2.0**-20 + unit / 20 / spreads)).max()) < 1


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("steps", [12, 10, 15])
def test_interpolated_functions_are_straight_between_entries(steps, grows):
    width = 24 - steps
    generator = torch.Generator().manual_seed(steps)
    table = torch.randint(-(2**30), 2**30, (2**16 + 1,), generator=generator)
    end = 2 ** (15 + width)
    x = [0, 1, -1, end, end - 1, end + 1, -end, -end - 1, 1 - end, 12345, -54321, 3 * end, -3 * end]
    x += torch.randint(-end, end, (50,), generator=generator).tolist()
    got = interpolate(t(*x).reshape(9, 7), table, steps, grows=grows).flatten().tolist()
    for value, found in zip(x, got, strict=True):
        place = Fraction(clamped(value, -end, end - 1) + end, 2**width)
        at = math.floor(place)
        left, right = int(table[at]), int(table[at + 1])
        wanted = left + half_up((right - left) * (place - at))
        if value >= end:
            wanted = value if grows else int(table[-1])
        assert found == wanted, value


def test_periodic_functions_are_straight_between_entries_of_one_turn():
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-(2**30), 2**30, (2**16 + 1,), generator=generator)
    multiplier, shift = factor(torch.tensor(1 / (2 * math.pi), dtype=torch.float64))
    x = [0, 1, -1, ONE, -ONE, 105414357, 105414358, LIMIT, -LIMIT]
    x += torch.randint(-(2**34), 2**34, (31,), generator=generator).tolist()
    got = periodic(t(*x).reshape(8, 5), table, multiplier, shift).flatten().tolist()
    for value, found in zip(x, got, strict=True):
        turn = half_up(Fraction((value * int(multiplier)) >> 16, 2 ** (int(shift) - 16))) % ONE
        at, rest = divmod(turn, 256)
        left, right = int(table[at]), int(table[at + 1])
        assert found == left + half_up(Fraction((right - left) * rest, 256)), value


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dims", [[-1], [0], [1, 2], [0, 2]])
def test_means_are_rounded_half_up(dims, keepdim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (2, 3, 4), generator=generator)
    got = mean(x, dims, keepdim=keepdim)
    exact = x.numpy().mean(tuple(dims), keepdims=keepdim)
    assert got.shape == exact.shape
    count = math.prod(x.shape[d] for d in dims)
    sums = x.numpy().sum(tuple(dims), keepdims=keepdim).flatten().tolist()
    wanted = [math.floor(Fraction(total + count // 2, count)) for total in sums]
    assert got.flatten().tolist() == wanted


SIZES = [(1, 1), (1, 4), (2, 1), (3, 7), (5, 9), (7, 3), (4, 8), (6, 6)]


def source(d: int, size: int, target: int, *, corners: bool) -> Fraction:
    """Where a pixel of the result lies in the source."""
    if corners:
        return Fraction(d * (size - 1), max(target - 1, 1))
    return max(Fraction((2 * d + 1) * size, 2 * target) - HALF, Fraction(0))


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resizing_weighs_the_two_neighbours(size, target, corners):
    left, right, weight = (v.tolist() for v in resize_weights(size, target, corners=corners))
    for d in range(target):
        place = source(d, size, target, corners=corners)
        at = min(math.floor(place), size - 1)
        assert left[d] == at
        assert right[d] == min(at + 1, size - 1)
        assert weight[d] == half_up((place - at) * 2**20)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("sizes", [(3, 7), (9, 2), (4, 5)])
def test_images_are_interpolated_axis_by_axis(sizes, corners):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**30), 2**30, (2, 3, 4, 5), generator=generator)

    def along(rows: list[list[int]], target: int) -> list[list[int]]:
        found = []
        for d in range(target):
            place = source(d, len(rows), target, corners=corners)
            at = min(math.floor(place), len(rows) - 1)
            share = half_up((place - at) * 2**20)
            first, second = rows[at], rows[min(at + 1, len(rows) - 1)]
            found.append([half_up(Fraction(a * (2**20 - share) + b * share, 2**20))
                          for a, b in zip(first, second, strict=True)])  # fmt: skip
        return found

    got = bilinear(x, sizes, corners=corners)
    close = nearest(x, sizes)
    for b in range(2):
        for c in range(3):
            down = along(x[b, c].tolist(), sizes[0])
            across = along([list(r) for r in zip(*down, strict=True)], sizes[1])
            assert got[b, c].T.tolist() == across
            rows = [x[b, c][i * 4 // sizes[0]].tolist() for i in range(sizes[0])]
            assert close[b, c].tolist() == [
                [row[j * 5 // sizes[1]] for j in range(sizes[1])] for row in rows
            ]
