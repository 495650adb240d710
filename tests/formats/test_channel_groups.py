# SPDX-License-Identifier: Apache-2.0
"""Laws of channel and element groups (method file, P1, P4, P9, P10) on random ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import Histogram
from qgraph.errors import ConfigError
from qgraph.formats.channel_groups import (
    group_channels,
    group_order,
    grouped_encoding,
    octave_thresholds,
    outlier_thresholds,
    permuted,
)
from qgraph.formats.element_groups import element_groups, magnitude_thresholds

laws = settings(max_examples=30, deadline=None)
RULES = {"outliers": outlier_thresholds, "octaves": octave_thresholds}


@st.composite
def ranges(draw: st.DrawFn) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    channels = draw(st.integers(1, 90))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return torch.exp2(torch.randn(channels, generator=generator) * spread)


rules = st.sampled_from(sorted(RULES))


@laws
@given(ranges(), rules, st.integers(1, 6), st.sampled_from([1, 4, 16]))
def test_groups_partition_the_channels_in_ascending_range_and_their_order_is_a_bijection(
    size, rule, cap, tile
):
    group = group_channels(size, RULES[rule](size, cap), tile=tile)
    count = int(group.max()) + 1
    assert count <= cap
    assert torch.bincount(group).sum() == len(size)
    assert (torch.bincount(group) > 0).all()
    for low, high in zip(range(count - 1), range(1, count), strict=True):
        assert size[group == low].max() <= size[group == high].min()
    order = group_order(group)
    assert torch.equal(order.sort().values, torch.arange(len(size)))
    assert torch.equal(order[order.argsort()], torch.arange(len(size)))
    assert (group[order].diff() >= 0).all()


@laws
@given(ranges(), rules, st.integers(2, 6))
def test_grouping_what_is_already_in_order_changes_nothing(size, rule, cap):
    group = group_channels(size, RULES[rule](size, cap))
    order = group_order(group)
    again = group_channels(size[order], RULES[rule](size[order], cap))
    assert torch.equal(again, group[order])
    assert torch.equal(group_order(again), torch.arange(len(size)))


@laws
@given(ranges(), rules, st.integers(2, 6), st.integers(-6, 6))
def test_thresholds_ascend_and_follow_powers_of_two_while_groups_stay(size, rule, cap, power):
    thresholds = RULES[rule](size, cap)
    assert (thresholds.diff() > 0).all()
    scaled = RULES[rule](size * 2.0**power, cap)
    assert torch.allclose(scaled, thresholds * 2.0**power, rtol=1e-12)
    before, after = group_channels(size, thresholds), group_channels(size * 2.0**power, scaled)
    assert torch.equal(before, after)


@laws
@given(ranges(), st.integers(2, 5), st.sampled_from([4, 16]))
def test_group_sizes_fill_tiles_from_the_widest_down_and_nobody_moves_to_narrower_ones(
    size, cap, tile
):
    thresholds = octave_thresholds(size, cap)
    plain, tiled = group_channels(size, thresholds), group_channels(size, thresholds, tile=tile)
    sizes = torch.bincount(tiled)
    assert all(int(n) % tile == 0 for n in sizes[1:])
    # counted from the widest group down, nobody moves to a narrower one
    assert (tiled.max() - tiled <= plain.max() - plain).all()


@laws
@given(st.floats(0.01, 100.0), st.integers(1, 50), rules)
def test_equal_channels_form_one_group(value, channels, rule):
    size = torch.full((channels,), value)
    assert group_channels(size, RULES[rule](size, 4)).tolist() == [0] * channels


def test_a_bounded_spread_is_one_group_and_one_group_is_the_plain_quantizer():
    size = torch.tensor([1.0, 2.0, 3.0, 2.5])
    assert outlier_thresholds(size, 4).numel() == 0
    group = group_channels(size, outlier_thresholds(size, 4))
    encoding = grouped_encoding(-size, size, group, 8, zero_points=False)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.clamp(torch.round(x / (3.0 / 127)), -128, 127) * torch.tensor(3.0 / 127)
    assert torch.allclose(encoding.fake(x), plain)


def test_a_few_wide_channels_are_split_off():
    size = torch.cat(
        [torch.rand(60, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0, 50.0])]
    )
    group = group_channels(size, outlier_thresholds(size, 4))
    assert group[:60].tolist() == [0] * 60
    assert int(group[60:].min()) > 0


@pytest.mark.parametrize("size", [torch.zeros(5), torch.zeros(1), torch.full((3,), 7.0)])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_degenerate_ranges_give_finite_positive_scales(size, rule):
    group = group_channels(size, RULES[rule](size, 4), tile=16)
    for tied in (True, False):
        encoding = grouped_encoding(-size, size, group, 8, tied=tied)
        assert (encoding.scale > 0).all()
        assert torch.isfinite(encoding.scale).all()


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [-1.0], []])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_ranges_that_are_no_sizes_are_refused(bad, rule):
    with pytest.raises(ConfigError, match="finite and not negative"):
        RULES[rule](torch.tensor(bad), 4)
    with pytest.raises(ConfigError, match="groups is"):
        RULES[rule](torch.ones(3), 0)


@laws
@given(ranges(), rules, st.integers(2, 8), st.booleans(), st.booleans())
def test_inside_the_ranges_the_error_is_at_most_half_a_step(size, rule, bits, tied, zero_points):
    group = group_channels(size, RULES[rule](size, 4))
    low = -size * torch.rand(len(size), generator=torch.Generator().manual_seed(1))
    encoding = grouped_encoding(low, size, group, bits, tied=tied, zero_points=zero_points)
    x = low + (size - low) * torch.rand(40, len(size), generator=torch.Generator().manual_seed(2))
    # rounding the zero point may cost half a step at the ends
    steps = 1.0 if zero_points else 0.5
    assert ((encoding.fake(x) - x).abs() <= encoding.scale * (steps + 1e-3)).all()
    assert torch.equal(encoding.fake(torch.zeros(1, len(size))), torch.zeros(1, len(size)))


@laws
@given(ranges(), rules, st.booleans())
def test_tied_scales_are_powers_of_two_apart_and_at_most_twice_too_wide(size, rule, zero_points):
    group = group_channels(size, RULES[rule](size, 4))
    tied = grouped_encoding(-size, size, group, 8, zero_points=zero_points)
    free = grouped_encoding(-size, size, group, 8, zero_points=zero_points, tied=False)
    mantissa, _ = torch.frexp(tied.scale / tied.scale.min())
    assert (mantissa == 0.5).all()
    ratio = tied.scale / free.scale
    assert (ratio >= 1 - 1e-5).all()
    assert (ratio <= 2 + 1e-5).all()


@laws
@given(ranges(), st.integers(0, 100))
def test_a_permuted_encoding_quantizes_permuted_values(size, seed):
    group = group_channels(size, octave_thresholds(size, 4))
    encoding = grouped_encoding(-size, size * 0.5, group, 6)
    x = torch.randn(7, len(size), generator=torch.Generator().manual_seed(seed))
    order = group_order(group)
    assert torch.equal(permuted(encoding, order).fake(x[:, order]), encoding.fake(x)[:, order])


def thresholds_of(seen: Histogram) -> torch.Tensor:
    bins = seen.bins()
    centre, index = ((bins.left.abs() + bins.right.abs()) / 2).unique(return_inverse=True)
    mass = torch.zeros_like(centre).scatter_add(0, index, bins.mass)
    return magnitude_thresholds(centre, mass)


@laws
@given(st.integers(0, 1000), st.integers(3, 8))
def test_element_groups_are_monotone_idempotent_open_ended_and_count_their_extra_bits(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4000, generator=generator) ** 3
    seen = Histogram(bins_per_octave=64, rate=1)
    seen.update(x)
    thresholds = thresholds_of(seen)
    assert (thresholds.diff() > 0).all()
    encoding = element_groups(thresholds, float(x.min()), float(x.max()), bits)
    groups = len(thresholds) + 1
    assert encoding.storage_bits == bits + math.ceil(math.log2(groups))
    y = encoding.fake(x.sort().values)
    assert (y.diff() >= 0).all()
    assert torch.equal(encoding.fake(y), y)
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert abs(float(encoding.fake(torch.tensor(1e9)) - x.max())) <= step + 0.04 * float(x.max())


def test_element_thresholds_follow_the_published_recursion():
    x = torch.randn(1, 20000, generator=torch.Generator().manual_seed(3)) ** 3
    work = x.abs().flatten().double()
    expected: list[float] = []
    while work.numel() > 1 and len(expected) < 10:
        threshold = work.mean() + 3 * work.std()
        if threshold > work.max():
            break
        expected.append(float(threshold))
        work = work[work > threshold]
    seen = Histogram(bins_per_octave=64, rate=1)
    seen.update(x)
    found = thresholds_of(seen)
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert found[1] == pytest.approx(expected[1], rel=0.05)
    with pytest.raises(ConfigError, match="not both ends 0"):
        element_groups(found, 0.0, 0.0, 8)
