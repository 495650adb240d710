# SPDX-License-Identifier: Apache-2.0
"""Log-affine tables, codes and steps against the formulae, number by number in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.levels import LevelEncoding
from qgraph.formats.log_affine import (
    LogAffine,
    log_affine,
    parameters_of,
    shift_steps,
    side_codes,
    with_parameters,
)

laws = settings(max_examples=25, deadline=None)


@st.composite
def parameters(draw: st.DrawFn) -> LogAffine:
    """Three channels; slopes so steep that levels crowd, and so flat that they spread."""
    bits, zero = draw(st.sampled_from([(2, False), (3, False), (3, True), (4, True), (5, False)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    slope = torch.exp2(4 * torch.rand(3, 2, generator=generator) - 1)
    offset = 6 * torch.randn(3, 2, generator=generator)
    centre = draw(st.sampled_from([0.0, 1.0])) * torch.randn(3, generator=generator)
    return LogAffine(bits=bits, slope=slope, offset=offset, centre=centre, reserve_zero=zero)


def table(given_: LogAffine, channel: int, top: int) -> tuple[list[int], list[float], float]:
    """Levels, thresholds and unit of a channel, by the definition."""
    count, first = 1 << (given_.bits - 1), int(given_.reserve_zero)
    centre = float(given_.centre[channel])
    sides, borders = [], []
    for side in (0, 1):
        k, a = float(given_.slope[channel, side]), float(given_.offset[channel, side])
        sides.append([2.0 ** ((q - a) / k) for q in range(count)])
        borders.append([2.0 ** ((q + 0.5 - a) / k) for q in range(count - 1)])
    unit = (max(sides[0][-1], sides[1][-1]) + abs(centre)) / top
    levels = [round(centre / unit)] if first else []
    for sign, distances in zip((-1, 1), sides, strict=True):
        last = 0
        for distance in distances[first:]:
            last = max(round(distance / unit), last + 1)
            levels.append(round(centre / unit) + sign * last)
    levels.sort()
    cuts = [centre / unit - b / unit for b in borders[0]]
    cuts += [centre / unit + b / unit for b in borders[1]]
    cuts = sorted(cuts if first else [*cuts, centre / unit])
    cuts = [
        min(max(cut, low + 0.25), high - 0.25)
        for cut, low, high in zip(cuts, levels[:-1], levels[1:], strict=True)
    ]
    return levels, cuts, unit


@laws
@given(parameters(), st.sampled_from([31, 127, 5000]))
def test_tables_hold_the_distances_rounded_pushed_apart_and_parted_half_way(given_, top):
    encoding = log_affine(given_, top=top)
    for channel in range(3):
        levels, cuts, unit = table(given_, channel, top)
        assert encoding.levels[channel].tolist() == levels
        assert encoding.thresholds[channel].tolist() == pytest.approx(cuts, rel=1e-5, abs=1e-5)
        assert float(encoding.scale[channel]) == pytest.approx(unit, rel=1e-6)
    assert (encoding.bits, encoding.axis) == (given_.bits, 0)


def test_one_table_for_a_tensor_is_that_of_its_only_channel() -> None:
    one = LogAffine(
        bits=4, slope=torch.tensor([[2.0, 0.7]]), offset=torch.tensor([[3.0, 1.0]]),
        centre=torch.tensor([0.5]),
    )  # fmt: skip
    whole, per = log_affine(one, axis=None), log_affine(one, axis=-1)
    assert whole.axis is None
    assert per.axis == -1
    for name in ("scale", "levels", "thresholds"):
        assert torch.equal(getattr(whole, name), getattr(per, name)[0])


@pytest.mark.parametrize(("bits", "top"), [(2, 127), (4, 127), (5, 127), (6, 32767), (8, 32767)])
def test_up_to_five_bits_levels_are_int8_operands_and_then_int16(bits, top):
    count = 1 << (bits - 1)
    slope = torch.full((1, 2), max(1, count - 1) / 4.0)
    made = log_affine(
        LogAffine(bits=bits, slope=slope, offset=torch.zeros(1, 2), centre=torch.zeros(1))
    )
    assert (int(made.levels.min()), int(made.levels.max())) == (-top, top)


@laws
@given(parameters(), st.integers(0, 999))
def test_codes_are_the_rounded_logarithm_of_the_distance(given_, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 30, generator=generator) * torch.exp2(
        4 * torch.randn(3, 30, generator=generator)
    )
    weight[:, 0] = given_.centre.float()
    codes, sides = side_codes(weight, given_)
    assert codes.dtype is sides.dtype is torch.int64
    for c in range(3):
        for i, value in enumerate(weight[c].tolist()):
            away = value - float(given_.centre[c])
            side = int(away >= 0)
            k, a = float(given_.slope[c, side]), float(given_.offset[c, side])
            exact = k * math.log2(max(abs(away), 2.0**-126)) + a
            assert int(sides[c, i]) == side
            wanted = min(max(round(exact), 0), (1 << (given_.bits - 1)) - 1)
            assert int(codes[c, i]) == wanted or abs(exact % 1 - 0.5) < 1e-9


@laws
@given(
    st.integers(2, 4), st.booleans(), st.integers(0, 999),
    st.lists(st.floats(0.01, 2.0), min_size=3, max_size=3),
)  # fmt: skip
def test_shift_levels_are_powers_of_two_of_a_step_of_least_squares(bits, zero, seed, steps):
    zero = zero and bits > 2
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 17, generator=generator)
    given_ = LogAffine(
        bits=bits, slope=1 + torch.rand(3, 2, generator=generator),
        offset=4 * torch.rand(3, 2, generator=generator), centre=torch.zeros(3),
        decoder="shift", reserve_zero=zero,
    )  # fmt: skip
    made = log_affine(given_, step=torch.tensor(steps))
    powers = [1 << q for q in range(int(zero), 1 << (bits - 1))]
    assert made.levels.tolist() == [sorted([*(-p for p in powers), *[0] * zero, *powers])] * 3
    assert torch.equal(made.scale, torch.tensor(steps))
    codes, sides = side_codes(weight, given_)
    for c, step in enumerate(shift_steps(weight, given_).tolist()):
        basis = np.array([
            (2.0**q if side else -(2.0**q)) * (q > 0 or not zero)
            for q, side in zip(codes[c].tolist(), sides[c].tolist(), strict=True)
        ])  # fmt: skip
        if basis.any():
            best = np.linalg.lstsq(basis[:, None], weight[c].double().numpy(), rcond=None)[0]
            assert step == pytest.approx(max(float(best[0]), 2.0**-126), rel=1e-5)


def exact_table(*, zero: bool, centre: float) -> tuple[LogAffine, LevelEncoding]:
    """Distances that are integers: 8 to 64 below, 16 to 1024 above; doubled in channel 1."""
    slope = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    offset = torch.tensor([[-3.0, -2.0], [-4.0, -2.5]])
    given_ = LogAffine(
        bits=3, slope=slope, offset=offset, centre=torch.tensor([1.0, 2.0]) * centre,
        reserve_zero=zero,
    )  # fmt: skip
    return given_, log_affine(given_, top=1024 + int(abs(centre)))


@pytest.mark.parametrize("centre", [0.0, 5.0, -3.0])
@pytest.mark.parametrize("zero", [False, True])
def test_parameters_of_an_exact_table_are_read_back_exactly(zero, centre):
    given_, made = exact_table(zero=zero, centre=centre)
    assert made.scale.tolist() == [1.0, 2.0]
    found = parameters_of(made)
    assert (found.bits, found.reserve_zero, found.decoder) == (3, zero, "exact")
    for name in ("slope", "offset", "centre"):
        torch.testing.assert_close(getattr(found, name), getattr(given_, name))
    torch.testing.assert_close(found.distances(), given_.distances())


def test_parameters_of_a_table_for_a_tensor_are_one_channel() -> None:
    slope, offset = torch.tensor([[1.0, 0.5]]), torch.tensor([[-3.0, -2.0]])
    given_ = LogAffine(bits=3, slope=slope, offset=offset, centre=torch.tensor([4.0]))
    found = parameters_of(log_affine(given_, top=1028, axis=None))
    torch.testing.assert_close(found.slope, given_.slope)
    torch.testing.assert_close(found.centre, given_.centre)
    two = LogAffine(bits=2, slope=slope, offset=offset, centre=torch.zeros(1))
    torch.testing.assert_close(parameters_of(log_affine(two, top=64)).slope, slope.double())


def test_other_slopes_change_nothing_else_and_borders_lie_half_way_in_the_logarithm() -> None:
    first, _ = exact_table(zero=True, centre=2.0)
    slope, offset = torch.rand(2, 2).double() + 1, torch.rand(2, 2).double()
    other = with_parameters(first, slope, offset)
    assert torch.equal(other.slope, slope)
    assert torch.equal(other.offset, offset)
    assert (other.bits, other.reserve_zero) == (first.bits, first.reserve_zero)
    assert torch.equal(other.centre, first.centre)

    def geometric(values: Tensor) -> Tensor:
        return (values[..., 1:] * values[..., :-1]).sqrt()

    torch.testing.assert_close(other.borders(), geometric(other.distances()))
    least = LogAffine(
        bits=3, slope=torch.ones(1, 2), offset=torch.zeros(1, 2), centre=torch.zeros(1),
        reserve_zero=True,
    )  # fmt: skip
    assert least.distances().tolist() == [[[1, 2, 4, 8]] * 2]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"offset": torch.tensor([[1.0, 1.0], [1.0, math.nan]])}, "offset is not finite"),
        ({"centre": torch.tensor([0.0, math.inf])}, "centre is not finite"),
        ({"decoder": "shift", "centre": torch.tensor([0.0, 1.0])}, "needs centre 0"),
    ],
)
def test_one_wrong_number_among_good_ones_is_refused(changed, words):
    whole = {
        "bits": 4, "slope": torch.ones(2, 2), "offset": torch.ones(2, 2), "centre": torch.zeros(2)
    }  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        LogAffine(**{**whole, **changed})
