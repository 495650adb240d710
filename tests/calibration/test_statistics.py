# SPDX-License-Identifier: Apache-2.0
"""Laws of every statistic: batching, order and merging do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import (
    ChannelHistogram,
    ChannelRange,
    FusedStatistics,
    Gram,
    Histogram,
    JointReservoir,
    Moments,
    Range,
    Reservoir,
    Statistic,
    make_statistic,
)
from qgraph.calibration import moments as moments_module
from qgraph.calibration.sampling import run_positions, spread_positions, stride_for
from qgraph.calibration.statistics import Observation
from qgraph.errors import ArtifactError, CalibrationError, ConfigError

ROUNDED = {"total", "squares", "matrix"}


def every(axis: int) -> list[Statistic]:
    return [
        Range(),
        ChannelRange(axis),
        Moments(axis),
        Gram(axis, exact=1),
        Histogram(rate=3),
        Histogram(64, rate=1),
        ChannelHistogram(axis, half=8, positions=5),
        Reservoir(axis, rows=6, per_sample=3),
    ]


def assert_same(first: Statistic, second: Statistic) -> None:
    a, b = first.state(), second.state()
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name in ROUNDED:
            torch.testing.assert_close(value, b[name], rtol=1e-12, atol=1e-9)
        else:
            assert torch.equal(value, b[name]), (first, name)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    shape = draw(st.sampled_from([(6, 5, 4), (6, 3, 2, 5), (6, 7), (6, 40, 3)]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp(3 * torch.randn(6, *[1] * (len(shape) - 1), generator=generator))
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    cuts = sorted(draw(st.lists(st.integers(0, 6), max_size=3)))
    order = torch.randperm(6, generator=generator)
    return x, cuts, order


@given(batches(), st.sampled_from([1, -1]))
@settings(max_examples=30, deadline=None)
def test_statistics_do_not_depend_on_batch_order_and_split(case, axis):
    x, cuts, order = case
    for whole, parts, left, right in zip(
        every(axis), every(axis), every(axis), every(axis), strict=True
    ):
        whole.update(x)
        for piece in x[order].tensor_split(cuts):
            parts.update(piece)
        assert_same(whole, parts)
        left.update(x[:2])
        right.update(x[2:])
        left.merge(right)
        assert_same(whole, left)


@given(batches())
@settings(max_examples=20, deadline=None)
def test_fused_statistics_equal_separate_ones_and_survive_a_save(case):
    x, _, _ = case
    fused = FusedStatistics(every(1))
    assert fused.update(x) == 0
    for statistic in every(1):
        statistic.update(x)
        assert_same(statistic, fused.get(type(statistic), **statistic.options()))
        assert_same(statistic, type(statistic).from_state(statistic.state()))
    again = FusedStatistics(every(1))
    again.load_state(fused.state())
    for first, second in zip(fused.statistics, again.statistics, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("statistic", every(-1), ids=repr)
def test_masked_rows_leave_no_trace(statistic):
    other = type(statistic)(**statistic.options())
    x = torch.randn(4, 6, 5)
    mask = torch.rand(4, 6) < 0.6
    garbage = torch.where(mask[..., None], x, float("nan"))
    statistic.update(x, mask=mask)
    other.update(garbage, mask=mask)
    assert_same(statistic, other)
    if isinstance(statistic, Range):
        assert int(statistic.state()["count"]) == int(mask.sum()) * 5
        assert statistic.bounds()[1] == x[mask].max()


def test_a_mask_of_another_rank_is_ignored():
    plain, masked = Range(), Range()
    x = torch.randn(2, 3, 3, 4)
    plain.update(x)
    masked.update(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert_same(plain, masked)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_kept_out_of_ranges(bad):
    x = torch.tensor([[1.0, -2.0, bad], [bad, 0.5, 4.0]])
    whole, channels = Range(), ChannelRange(1)
    for statistic in (whole, channels):
        statistic.update(x)
        assert int(statistic.state()["nonfinite"]) == 2
        assert int(statistic.state()["count"]) == 6
    assert whole.bounds() == (-2.0, 4.0)
    assert channels.state()["low"].tolist() == [1.0, -2.0, 4.0]
    histogram = Histogram(rate=1)
    histogram.update(x)
    assert histogram.total == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_taken_as_fp32(dtype):
    x = torch.randn(3, 4).to(dtype)
    for first, second in zip(every(1), every(1), strict=True):
        first.update(x)
        second.update(x.float())
        assert_same(first, second)


def test_layout_does_not_matter():
    x = torch.randn(3, 40, 30)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for first, second in zip(every(1), every(1), strict=True):
        first.update(x)
        second.update(turned)
        assert_same(first, second)


def test_zero_size_batches_change_nothing():
    for statistic, untouched in zip(every(1), every(1), strict=True):
        untouched.update(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)))
        statistic.update(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)))
        statistic.update(torch.zeros(0, 3, 4))
        assert_same(statistic, untouched)
    fused = FusedStatistics(every(1))
    assert fused.update(torch.zeros(0, 3, 4)) == 0


def test_an_empty_summary_merges_both_ways():
    for empty, full, other in zip(every(1), every(1), every(1), strict=True):
        full.update(torch.ones(2, 3))
        full.merge(type(full)(**full.options()))
        empty.merge(full)
        other.update(torch.ones(2, 3))
        assert_same(empty, other)
        assert_same(full, other)


def test_transported_ranges_equal_observed_ones():
    x = torch.randn(4, 6, 5)
    flip = torch.tensor([True, False, True, False, False])
    order = torch.tensor([3, 1, 0, 4, 2])
    before, after = ChannelRange(-1), ChannelRange(-1)
    before.update(x)
    after.update(torch.where(flip, -x, x)[..., order])
    assert_same(before.mirrored(flip).permuted(order), after)
    whole, turned = Range(), Range()
    whole.update(x)
    turned.update(-x)
    assert_same(whole.mirrored(), turned)
    assert_same(before.tensor_range(), whole)


@pytest.mark.parametrize("chunk", [16, 10**6])
def test_moments_match_their_definition(chunk, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_ROWS", chunk)
    x = torch.randn(50, 7, 3) * 4 + 2
    moments, gram = Moments(-1), Gram(-1)
    moments.update(x)
    gram.update(x)
    rows = x.reshape(-1, 3).double()
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.std, rows.std(0, unbiased=False))
    torch.testing.assert_close(gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-3)


@given(st.integers(1, 5000), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_sampling_positions_are_distinct_and_never_resonate_with_an_axis(length, rate):
    stride = stride_for(length, rate, 16, 1 << 16)
    assert stride == 1 or math.gcd(stride, length) == 1
    taken = run_positions(length, stride, torch.device("cpu"))
    assert taken.unique().numel() == taken.numel() <= max(length // rate, 16, 1)
    assert taken.numel() >= min(length, max(length // rate, 16)) // 3
    assert int(taken.max()) < length
    positions = spread_positions(length, rate)
    assert positions.unique().numel() == min(rate, length)
    assert int(positions.max()) < length


def test_sampled_values_are_the_same_however_a_tensor_lies_in_memory():
    x = torch.randn(4, 90, 60)[1:]
    numbers = torch.arange(x[0].numel()).view(1, 90, 60).expand(3, -1, -1)
    mask = torch.rand(3, 90) < 0.5
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    taken = run_positions(90 * 60, stride_for(90 * 60, 16, 4096, 1 << 16), x.device)
    for each in (x, turned):
        found = Observation(each, mask).sample(16)
        assert torch.equal(found.values.flatten(1), x.flatten(1)[:, taken])
        assert found.keep is not None
        tokens = numbers.flatten(1)[:, taken] // 60
        assert torch.equal(found.keep.flatten(1), mask.gather(1, tokens))


def test_wrong_requests_name_what_is_allowed():
    with pytest.raises(ConfigError, match=r"unknown statistic 'Histogramm'; did you mean 'Hist"):
        make_statistic("Histogramm")
    with pytest.raises(ConfigError, match=r"unknown option of Range 'axis'"):
        make_statistic("Range", axis=1)
    with pytest.raises(ConfigError, match="a power of two up to 1024"):
        Histogram(12)
    with pytest.raises(ConfigError, match="powers of two from 2"):
        ChannelHistogram(half=3)
    with pytest.raises(ConfigError, match="cannot hold any"):
        Reservoir(rows=0)
    with pytest.raises(ConfigError, match="the first the largest"):
        JointReservoir((2, 3))
    with pytest.raises(ConfigError, match="cannot merge"):
        Histogram(16).merge(Histogram(64))
    with pytest.raises(ConfigError, match="channel axis 0 does not fit"):
        ChannelRange(0).update(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match=r"need a floating tensor, got torch.int64 \[2\]"):
        Range().update(torch.ones(2, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"no Gram here"):
        FusedStatistics([Range()]).get(Gram)
    with pytest.raises(ArtifactError, match="no field 'widths'"):
        Range.from_state({"widths": torch.ones(1)})
