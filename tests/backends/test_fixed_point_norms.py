# SPDX-License-Identifier: Apache-2.0
"""Norms, roots and their constants against Python integers: every size of row, every `eps`."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch

from qgraph.backends.fixed_point import (
    LIMIT,
    LOG2_E,
    ONE,
    ExpTable,
    bit_length,
    exp_negative,
    factor,
    integer_sqrt,
    multiply,
    normalize,
    resize_weights,
    square_root,
)

POWERS = sorted({2**k + d for k in range(62) for d in (-1, 0, 1)} | {0, 5, 77, 2**62 - 1})


def test_bit_lengths_are_right_beside_every_power_of_two() -> None:
    found = bit_length(torch.tensor(POWERS))
    assert found.tolist() == [p.bit_length() for p in POWERS]


def test_roots_are_right_beside_every_square_of_a_power_of_two() -> None:
    squares = {r * r + d for r in POWERS if r < 2**31 for d in (-1, 0, 1)} - {-1}
    asked = [s for s in sorted(squares | set(POWERS)) if s < 2**62]
    assert integer_sqrt(torch.tensor(asked)).tolist() == [math.isqrt(s) for s in asked]
    small = [-5, -1, 0, 1, 2, 3, ONE - 1, ONE, LIMIT - 1]
    assert square_root(torch.tensor(small)).tolist() == [math.isqrt(max(s, 0) << 24) for s in small]


def exact_rows(
    rows: list[list[int]], eps: float, *, centred: bool
) -> list[tuple[list[float], float]]:
    """Normalised rows in units of 2^-24 from rational numbers, and n^2 times the variance."""
    found = []
    for row in rows:
        count = len(row)
        away = [Fraction(v) - (Fraction(sum(row), count) if centred else 0) for v in row]
        variance = sum((a * a for a in away), Fraction()) / count + Fraction(eps) * 2**48
        if variance == 0:
            found.append(([0.0] * count, 1.0))
            continue
        root = Fraction(math.isqrt((variance.numerator << 300) // variance.denominator), 2**150)
        found.append(([float(a * 2**24 / root) for a in away], float(variance * count * count)))
    return found


EPSILONS = [0.0, 2.0**-80, 1e-30, 1e-12, 1e-5, 1e-3, 0.5, 3.0, 1e4, 1e9]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_short_rows_are_normalised_to_the_nearest_unit(
    count: int, eps: float, centred: bool
) -> None:
    generator = torch.Generator().manual_seed(count)
    ends = [2**b for b in (0, 0, 1, 2, 5, 9, 13, 17, 20, 24, 29, 33, 36, 38) for _ in range(3)]
    rows = [torch.randint(-e, e + 1, (count,), generator=generator).tolist() for e in ends]
    rows += [[LIMIT - 3 * i * i for i in range(count)], list(range(count))]
    got = normalize(torch.tensor(rows), [-1], eps, centred=centred).tolist()
    for ours, (theirs, units) in zip(got, exact_rows(rows, eps, centred=centred), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # `eps` is cut to a whole unit of n^2 times the variance
            assert abs(a - b) <= 0.5 + 0.3 + abs(b) * (2.0**-27 + 0.5 / units), (a, b)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("spread", [1, 40, 2**12, 2**24, 2**36])
@pytest.mark.parametrize("count", [300, 2**14, 50_000, 2**17])
def test_long_rows_are_normalised_whatever_outweighs_what(
    count: int, spread: int, eps: float
) -> None:
    """The variance of a feature map can lie far below `eps`, whose square of n then is large."""
    generator = torch.Generator().manual_seed(spread)
    x = torch.randint(-spread, spread + 1, (2, count), generator=generator)
    x[1] += spread // 2
    got = normalize(x, [-1], eps)
    for row, ours in zip(x.double(), got, strict=True):
        away = row - row.mean()
        wanted = away * 2**24 / torch.sqrt((away * away).mean() + eps * 2.0**48)
        bound = 1 + wanted.abs() * 2.0**-20 + 2.0 ** (count.bit_length() - 6)
        assert bool(((ours - wanted).abs() <= bound).all())


def test_the_constant_of_the_exponential_has_thirty_bits() -> None:
    getcontext().prec = 40
    assert round(2**30 / Decimal(2).ln()) == LOG2_E


def test_exponentials_of_both_tables_are_right_and_vanish_beyond() -> None:
    made = ExpTable.make()
    asked = [0, 1, 2, 4095, 4096, 4097, ONE // 2, ONE, ONE + 1, 11629080, 11629081, 20 * ONE,
             21 * ONE, 44 * ONE, 63 * ONE, 64 * ONE, 65 * ONE, LIMIT, 2 * LIMIT]  # fmt: skip
    found = exp_negative(torch.tensor(asked), made.coarse, made.fine)
    for t, got in zip(asked, found.tolist(), strict=True):
        wanted = 2**30 * math.exp(-t / ONE)
        assert abs(got - wanted) <= 0.6 + wanted * 2.0**-23
    assert made.coarse[0] == made.fine[0] == 2**30


def test_factors_have_31_bits_unless_told_otherwise() -> None:
    real = torch.tensor([0.7, 0.5, 1 - 2.0**-33, -0.3, 2.0**-20, 1000.0])
    for ours, theirs in zip(factor(real), factor(real, 31), strict=True):
        assert torch.equal(ours, theirs)
    multiplier, _ = factor(real.double())
    assert int(multiplier.abs().max()) <= 2**31
    assert int(multiplier.abs().min()) >= 2**30


@pytest.mark.parametrize("a", [LIMIT, -LIMIT, LIMIT - 1, 2**37 + 1, -(2**36) - 5, 2**36])
@pytest.mark.parametrize("b", [LIMIT, -LIMIT, 1 - LIMIT, 2**37, 2**36 + 3, -(2**36)])
def test_products_of_the_largest_numbers_saturate_with_their_sign(a: int, b: int) -> None:
    found = int(multiply(torch.tensor(a), torch.tensor(b)))
    assert found == (LIMIT if (a > 0) == (b > 0) else -LIMIT)


def test_both_neighbours_of_every_place_exist_and_weights_are_parts_of_one() -> None:
    for size in (1, 2, 3, 7):
        for target in (1, 2, 3, 5, 13, 14, 15):
            for corners in (True, False):
                left, right, weight = resize_weights(size, target, corners=corners)
                assert left.shape == right.shape == weight.shape == (target,)
                assert 0 <= int(left.min()) <= int(left.max()) <= size - 1
                assert torch.equal(right, (left + 1).clamp(max=size - 1))
                assert 0 <= int(weight.min()) <= int(weight.max()) < 2**20 + 1
