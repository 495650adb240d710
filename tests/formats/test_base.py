# SPDX-License-Identifier: Apache-2.0
"""What every format checks and shares: widths, scales, broadcasting, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.affine import AffineEncoding, IntGrid, code_dtype, expand
from qgraph.formats.base import along, check_bits, check_scale
from qgraph.formats.dual_region import (
    check_shift,
    dual_region,
    duplicate_codes,
    non_negative_levels,
    packed_codes,
    packed_signed_codes,
    rank_table,
    shift_of,
    signed_dual_region,
    signed_levels,
)
from qgraph.formats.levels import LevelEncoding, by_channel, levels_encode, ranks_by_channel

laws = settings(max_examples=30, deadline=None)


@pytest.mark.parametrize("bits", range(2, 17))
def test_widths_from_two_to_sixteen_span_their_codes(bits):
    assert check_bits(bits) == bits
    for signed in (False, True):
        for narrow in (False, True):
            grid = IntGrid(bits, signed=signed, narrow=narrow)
            lowest = -(2 ** (bits - 1)) + narrow if signed else 0
            assert (grid.qmin, grid.qmax) == (lowest, 2 ** (bits - signed) - 1)
    made = AffineEncoding.per_tensor(1.0, 0, IntGrid(bits, signed=True))
    assert made.bits == bits
    assert made.table().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("bits", [-2, 0, 1, 17, 18, 32, True, 2.0, "4"])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="allowed: integers from 2 to 16"):
        check_bits(bits)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_one_bad_scale_among_good_ones_is_refused(bad):
    for scale in ([bad], [1.0, bad], [bad, 2.0]):
        with pytest.raises(ConfigError, match="finite and positive"):
            check_scale(torch.tensor(scale))
    assert check_scale(torch.tensor([0.5, 3.0], dtype=torch.float64)).dtype is torch.float32


@laws
@given(st.integers(0, 2), st.booleans(), st.integers(1, 4), st.integers(0, 99))
def test_scales_lie_along_their_axis_counted_from_either_end(axis, from_end, block, seed):
    shape = [3, 5, 4]
    counts = list(shape)
    counts[axis] = -(-shape[axis] // block)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(counts[axis], generator=generator)
    named = axis - 3 if from_end else axis
    x = torch.rand(shape, generator=generator)
    if block == 1:
        assert torch.equal(expand(values, named, None, x.shape), along(values, named, 3))
        for index in range(shape[axis]):
            part = (x * along(values, named, 3)).select(axis, index)
            assert torch.equal(part, x.select(axis, index) * values[index])
    blocked = torch.rand(counts, generator=generator)
    wide = expand(blocked, named, block, x.shape)
    assert wide.shape == x.shape
    for index in range(shape[axis]):
        assert torch.equal(wide.select(axis, index), blocked.select(axis, index // block))
    scalar = torch.tensor(2.0)
    assert along(scalar, named, 3) is scalar
    assert along(values, None, 3) is values


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-1, 127, torch.int8), (0, 127, torch.int8), (0, 128, torch.uint8), (1, 255, torch.uint8),
        (-1, 128, torch.int16), (-1, 255, torch.int16), (-(2**15) - 1, 5, torch.int32),
        (-1, 2**15, torch.int32), (0, 2**15 - 1, torch.int16), (-(2**15), 300, torch.int16),
    ],
)  # fmt: skip
def test_types_of_codes_change_right_at_their_limits(qmin, qmax, dtype):
    assert code_dtype(qmin, qmax) is dtype


def affine(scale: Tensor, zero: Tensor, qmin: int, qmax: int, **axes: int) -> AffineEncoding:
    return AffineEncoding(scale=scale, zero_point=zero, qmin=qmin, qmax=qmax, **axes)


def test_zero_points_may_be_the_first_and_the_last_code_and_none_beyond() -> None:
    one, two = torch.tensor(1.0), torch.ones(2)
    for zero in (-8, 7):
        assert not affine(one, torch.tensor(zero), -8, 7).is_symmetric
    for wrong in ([-9, 0], [0, -9], [0, 8], [8, 0]):
        with pytest.raises(ConfigError, match="outside the codes"):
            affine(two, torch.tensor(wrong), -8, 7, axis=0)
    with pytest.raises(ConfigError, match="empty code range"):
        affine(one, torch.tensor(7), 7, 7)
    assert affine(one, torch.tensor(7), 6, 7).bits == 1
    assert not affine(two, torch.tensor([0, 1]), -8, 7, axis=0).is_symmetric
    assert affine(two, torch.tensor([0, 0]), -8, 7, axis=0).is_symmetric


def test_code_ranges_wider_than_fp32_counts_end_where_they_say() -> None:
    for qmax in (2**24 - 1, 2**24 + 1, 2**25 - 1):
        made = affine(torch.tensor(1.0), torch.tensor(0), -5, qmax)
        assert made.encode(torch.tensor([1e9, 3.0, -1e9])).tolist() == [qmax, 3, -5]
    for qmax in (2**24, 2**24 + 1, 2**30):  # one below -2^24 is no fp32 number
        made = affine(torch.tensor(1.0), torch.tensor(-1), -(2**25), qmax)
        assert made.encode(torch.tensor([-(2.0**24), 5.0])).tolist() == [-(2**24) - 1, 4]


def test_tables_and_levels_per_channel_are_codes_less_zero_points() -> None:
    made = affine(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0, 3, -2]), -2, 3, axis=1)
    assert made.table().tolist() == [[c - z for c in range(-2, 4)] for z in (0, 3, -2)]
    codes = torch.tensor([[-2, 3, 0], [1, 1, 1]])
    assert made.level(codes).tolist() == [[-2, 0, 2], [1, -2, 3]]
    assert made.decode(codes).tolist() == [[-1.0, 0.0, 2.0], [0.5, -4.0, 3.0]]
    assert made.describe() == "int3 per channel"
    assert affine(torch.tensor(1.0), torch.tensor(1), 0, 15).describe() == "uint4 per tensor"
    assert affine(torch.tensor(1.0), torch.tensor(1), -1, 14).describe() == "int4 per tensor"
    one = made.to("cpu")
    assert (one.axis, one.block, one.qmin, one.qmax) == (1, None, -2, 3)


@pytest.mark.parametrize(("count", "dtype"), [(255, torch.uint8), (256, torch.uint8),
                                              (257, torch.int16)])  # fmt: skip
def test_ranks_take_a_byte_up_to_256_levels(count, dtype):
    thresholds = torch.arange(count - 1) + 0.5
    x = torch.tensor([[-3.0, 1.0, 1e4], [0.5, 0.6, 200.0]])
    wanted = [[0, 1, count - 1], [0, 1, 200]]
    one = torch.tensor(1.0)
    for got in (
        levels_encode(x, one, thresholds),
        levels_encode(x, one, thresholds.expand(3, -1).contiguous(), 1),
        levels_encode(x, one, thresholds.expand(2, -1).contiguous(), 0),
    ):
        assert got.dtype is dtype
        assert got.tolist() == wanted


def test_each_channel_of_any_axis_is_ranked_by_its_own_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator)
    for axis in (0, 1, 2, -1, -2, -3):
        thresholds = torch.randn(x.shape[axis], 5, generator=generator).sort(1).values
        ranks = ranks_by_channel(x, thresholds, axis)
        for c in range(x.shape[axis]):
            below = (thresholds[c] < x.select(axis, c)[..., None]).sum(-1)
            assert torch.equal(ranks.select(axis, c), below)


def table(levels: list[int], thresholds: list[float], scale: float = 1.0) -> LevelEncoding:
    return LevelEncoding(
        name="t", scale=torch.tensor(scale), levels=torch.tensor(levels),
        thresholds=torch.tensor(thresholds), storage_bits=3,
    )  # fmt: skip


def test_a_threshold_may_be_its_lower_level_and_not_its_upper_one() -> None:
    assert table([0, 2, 5], [0.0, 2.0]).encode(torch.tensor([0.0, 0.1, 2.0, 2.1])).tolist() == [
        0, 1, 1, 2,
    ]  # fmt: skip
    for cuts in ([2.0, 3.0], [1.0, 5.0], [-0.1, 3.0], [1.0, 1.9], [1.0], [1.0, 3.0, 6.0]):
        with pytest.raises(ConfigError, match="must lie between"):
            table([0, 2, 5], cuts)
    with pytest.raises(ConfigError, match="at least two"):
        table([0, 5, 4, 9], [1.0, 4.5, 6.0])


def test_tables_from_zero_on_are_joined_and_say_what_they_are() -> None:
    short, wide = table([0, 4], [1.0], 2.0), table([1, 3, 9, 11], [2.0, 5.0, 10.0])
    joined = by_channel([short, wide], -1)
    assert (joined.name, joined.bits, joined.axis) == ("t", 3, -1)
    assert joined.levels.tolist() == [[-2, -1, 0, 4], [1, 3, 9, 11]]
    assert joined.thresholds.tolist() == [[-2.0, -1.0, 1.0], [2.0, 5.0, 10.0]]
    assert joined.scale.tolist() == [2.0, 1.0]
    assert joined.describe() == "t 3-bit per channel"
    assert joined.table() is joined.levels
    for wrong in ([table([-1, 0], [-0.5]), short], [short, joined]):
        with pytest.raises(ConfigError, match="do not make one"):
            by_channel(wrong, 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_shifts_are_read_back_from_tables_of_either_sign(bits):
    for shift in range(16 - bits + 1):
        assert check_shift(bits, shift) == shift
        size = 1 << (bits - 1)
        levels = sorted({*range(size), *(c << shift for c in range(size))})
        assert non_negative_levels(bits, shift).tolist() == levels
        made = dual_region(bits, shift, high=3.0)
        assert shift_of(made) == shift
        assert float(made.decode(torch.tensor(len(levels) - 1))) == pytest.approx(3.0, rel=1e-6)
        assert duplicate_codes(made) == (1 << bits) - len(levels)
        coarse = [(v >> shift) + size for v in levels]
        wanted = [v if v < size else c for v, c in zip(levels, coarse, strict=True)]
        assert packed_codes(made.levels, bits, shift).tolist() == wanted
        meant = [*range(size), *(c << shift for c in range(size))]
        assert rank_table(bits, shift).tolist() == [levels.index(v) for v in meant]
        for sided in {shift, -shift}:
            above, below = max(sided, 0), max(-sided, 0)
            both = [-(c << below) for c in range(size, 0, -1)] + [c << above for c in range(size)]
            assert signed_levels(bits, sided).tolist() == both
            signed = signed_dual_region(bits, sided, torch.tensor(0.5))
            assert shift_of(signed) == sided
            packed = packed_signed_codes(signed.levels, sided)
            assert packed.tolist() == list(range(-size, size))
    for beyond in (-1, 17 - bits):
        with pytest.raises(ConfigError, match=f"bits: 0 to {16 - bits}"):
            check_shift(bits, beyond)
