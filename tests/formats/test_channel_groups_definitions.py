# SPDX-License-Identifier: Apache-2.0
"""Channel groups against their definitions, channel by channel in plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ConfigError
from qgraph.formats.channel_groups import (
    group_channels,
    group_order,
    grouped_encoding,
    octave_thresholds,
    outlier_thresholds,
    permuted,
)

laws = settings(max_examples=30, deadline=None)


@st.composite
def ranges(draw: st.DrawFn) -> list[float]:
    """Multiples of an eighth, so that some are equal, and a few far above the others."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    sizes = generator.integers(0, draw(st.sampled_from([1, 30])), generator.integers(1, 80)) / 8
    wide = sizes.max() + 20 * np.cumprod(generator.integers(2, 9, draw(st.integers(0, 4))))
    return [float(v) for v in generator.permutation([*sizes, *wide])]


@laws
@given(ranges(), st.integers(1, 6))
def test_outlier_thresholds_are_three_deviations_above_the_mean_of_what_is_left(sizes, groups):
    left = np.array(sizes)
    wanted: list[float] = []
    while len(wanted) < groups - 1:
        threshold = left.mean() + 3 * left.std()
        if not threshold < left.max() * (1 - 1e-12):
            break
        wanted.append(threshold)
        left = left[left > threshold]
    got = outlier_thresholds(torch.tensor(sizes), groups)
    assert got.dtype is torch.float64
    assert got.tolist() == pytest.approx(wanted)


@laws
@given(ranges(), st.integers(1, 16))
def test_octave_thresholds_halve_the_largest_range(sizes, groups):
    wanted = [max(sizes) / 2**i for i in range(groups - 1, 0, -1)]
    got = octave_thresholds(torch.tensor(sizes), groups)
    assert got.tolist() == (wanted if max(sizes) else [])


def test_up_to_the_asked_groups_are_found_and_no_more() -> None:
    sizes = torch.tensor([1.0] * 100_000 + [30.0] * 100 + [1000.0])
    assert [len(outlier_thresholds(sizes, g)) for g in range(1, 6)] == [0, 1, 2, 2, 2]
    assert [len(octave_thresholds(sizes, g)) for g in range(1, 6)] == [0, 1, 2, 3, 4]
    assert octave_thresholds(torch.zeros(3), 4).tolist() == []
    three = group_channels(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.5]).double())
    assert three.tolist() == [0, 1, 1]
    pair = group_channels(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([5.0]).double(), tile=2)
    assert pair.tolist() == [0, 1, 1]


@pytest.mark.parametrize("beyond", [0.0, 2.0**-22, 2.0**-19])
def test_tied_scales_are_not_narrower_than_ranges_just_above_a_power_of_two(beyond):
    width = torch.tensor([1.0, 2.0, 4.0, 8.0]).double() * (1 + beyond)
    width[3] = 8.0
    made = grouped_encoding(torch.zeros(4), width, torch.arange(4), 8)
    assert (made.scale.double() >= width / 255 * (1 - 2.0**-23)).all()
    assert (made.scale.double() <= width / 255 * 2 * (1 + 2.0**-23)).all()


@pytest.mark.parametrize("rule", [outlier_thresholds, octave_thresholds])
def test_one_to_sixteen_groups_are_allowed(rule):
    sizes = torch.tensor([0.0, 1.0, 5.0])
    for groups in (1, 16):
        assert len(rule(sizes, groups)) <= groups - 1
    for groups in (0, -1, 17):
        with pytest.raises(ConfigError, match=f"groups is {groups}; allowed: 1 to 16"):
            rule(sizes, groups)
    with pytest.raises(ConfigError, match="not negative"):
        rule(torch.tensor([1.0, -0.5, 3.0]), 2)
    with pytest.raises(ConfigError, match="not negative"):
        rule(torch.tensor([1.0, math.inf, 3.0]), 2)


@laws
@given(ranges(), st.integers(0, 4), st.integers(0, 99), st.sampled_from([1, 2, 3, 8]))
def test_groups_are_counted_from_below_and_tiles_filled_from_above(sizes, cuts, seed, tile):
    thresholds = sorted(set(random.Random(seed).choices(sizes, k=cuts)))
    group = [sum(t < size for t in thresholds) for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda c: (sizes[c], c))
    for number in range(len(thresholds), 0, -1):
        own = sum(group[c] == number for c in rest)
        taken = min(-(-own // tile) * tile, len(rest))
        for channel in rest[len(rest) - taken :]:
            group[channel] = number
        rest = rest[: len(rest) - taken]
    used = sorted(set(group))
    wanted = [used.index(g) for g in group]
    got = group_channels(
        torch.tensor(sizes), torch.tensor(thresholds, dtype=torch.float64), tile=tile
    )
    assert got.tolist() == wanted
    order = sorted(range(len(sizes)), key=lambda c: (wanted[c], c))
    assert group_order(got).tolist() == order


@laws
@given(
    st.integers(0, 999), st.integers(2, 8), st.booleans(), st.booleans(),
    st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_every_group_has_the_scale_its_widest_channel_needs(seed, bits, tied, zero_points, clip):
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0, 1, 0, 2, 1, 2, 2])
    spread = torch.tensor([0.1, 1.0, 9.0])[group]
    high = (torch.rand(7, generator=generator) - 0.2) * spread
    low = (torch.rand(7, generator=generator) - 0.8) * spread
    made = grouped_encoding(
        low, high, group, bits, tied=tied, zero_points=zero_points, clip=clip, axis=1
    )
    assert made.axis == 1
    qmax = (1 << bits) - 1 if zero_points else (1 << (bits - 1)) - 1
    assert (made.qmin, made.qmax) == (0 if zero_points else -qmax - 1, qmax)
    below = [min(v, 0.0) * clip for v in low.tolist()]
    above = [max(v, 0.0) * clip for v in high.tolist()]
    need = [
        (b - a) / qmax if zero_points else max(b, -a) / qmax
        for a, b in zip(below, above, strict=True)
    ]
    free = [max([need[c] for c in range(7) if group[c] == g] + [2.0**-60]) for g in range(3)]
    for channel, g in enumerate(group.tolist()):
        scale = float(made.scale[channel])
        if tied:
            octaves = math.log2(max(free) / scale)
            assert octaves == pytest.approx(round(octaves), abs=1e-5)
            assert free[g] * (1 - 1e-5) <= scale
            assert scale < free[g] * 2 * (1 + 1e-5)
        else:
            assert scale == pytest.approx(free[g], rel=1e-6)
        exact = (qmax - (above[channel] + below[channel]) / scale) / 2 if zero_points else 0.0
        zero = min(max(round(exact), made.qmin), qmax)
        assert int(made.zero_point[channel]) == zero or abs(exact % 1 - 0.5) < 1e-4
    order = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    moved = permuted(made, order)
    assert moved.scale.tolist() == made.scale[order].tolist()
    assert moved.zero_point.tolist() == made.zero_point[order].tolist()
    assert (moved.qmin, moved.qmax, moved.axis) == (made.qmin, made.qmax, 1)


def test_groups_of_nothing_but_zeros_take_the_smallest_width_there_is() -> None:
    zero, group = torch.zeros(3), torch.tensor([0, 1, 1])
    made = grouped_encoding(zero, zero, group, 8, tied=False)
    assert made.scale.tolist() == pytest.approx([2.0**-40 / 255] * 3, rel=1e-6)
    assert made.zero_point.tolist() == [128] * 3
    assert made.axis == -1
    signed = grouped_encoding(zero, zero, group, 8, tied=False, zero_points=False)
    assert signed.scale.tolist() == pytest.approx([2.0**-40 / 254] * 3, rel=1e-6)


def test_ranges_on_one_side_end_at_zero() -> None:
    low, high = torch.tensor([1.0, -8.0]), torch.tensor([4.0, -2.0])
    made = grouped_encoding(low, high, torch.tensor([0, 0]), 8, tied=False)
    assert made.scale.tolist() == pytest.approx([8 / 255] * 2)
    assert made.zero_point.tolist() == [round((255 - 4 / (8 / 255)) / 2), 255]
