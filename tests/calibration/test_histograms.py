# SPDX-License-Identifier: Apache-2.0
"""Histograms: bins against a plain count, exact mirroring, exact widening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qgraph.calibration import ChannelHistogram, Histogram, Statistic


def same(first: Statistic, second: Statistic) -> bool:
    a, b = first.state(), second.state()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


VALUES = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(VALUES, st.sampled_from([1, 16, 64]))
@settings(max_examples=40, deadline=None)
def test_every_value_falls_into_the_bin_whose_edges_enclose_it(values, bins_per_octave):
    histogram = Histogram(bins_per_octave, rate=1)
    histogram.update(torch.from_numpy(values))
    edges = histogram.edges().numpy()
    for side, signed in enumerate((values, -values)):
        counts, _ = np.histogram(signed[(signed > 0) & (signed < 2.0**24)], edges)
        # np.histogram closes the last bin on the right; the mask above leaves nothing there
        assert np.array_equal(histogram.state()["counts"][side].flatten().numpy(), counts)
    assert histogram.total == values.size
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    assert histogram.zeros == int(tiny.sum())


@given(VALUES)
@settings(max_examples=30, deadline=None)
def test_the_density_holds_all_values_each_in_its_own_interval(values):
    histogram = Histogram(rate=1)
    histogram.update(torch.from_numpy(values))
    bins = histogram.bins()
    assert bins.total == values.size
    assert bool((bins.left < bins.right).all())
    for value in values[np.abs(values) >= np.finfo(np.float32).tiny]:
        assert bool(((bins.left <= value) & (value <= bins.right)).any())


@given(VALUES)
@settings(max_examples=30, deadline=None)
def test_mirroring_a_histogram_equals_observing_the_negated_values(values):
    x = torch.from_numpy(values)
    first, second = Histogram(), Histogram()
    first.update(x)
    second.update(-x)
    assert same(first.mirrored(), second)
    one, two = ChannelHistogram(half=8), ChannelHistogram(half=8)
    one.update(x)
    two.update(-x)
    assert same(one.mirrored(), two)


def test_both_zeros_are_one():
    first, second = Histogram(), Histogram()
    first.update(torch.tensor([[0.0, 0.0, 1.0]]))
    second.update(torch.tensor([[-0.0, 0.0, 1.0]]))
    assert same(first, second)
    assert first.zeros == second.zeros == 2


def test_the_sample_of_a_wide_tensor_is_small_and_sees_every_channel():
    x = torch.zeros(2, 64, 1536)
    x[..., :] = torch.arange(1.0, 1537.0)
    histogram = Histogram(64, rate=16)
    histogram.update(x)
    assert x.numel() / 24 < histogram.total <= x.numel() / 16
    exact = Histogram(64, rate=1)
    exact.update(x)
    assert torch.equal(histogram.state()["counts"] > 0, exact.state()["counts"] > 0)


@given(VALUES)
@settings(max_examples=40, deadline=None)
def test_channel_bins_enclose_their_values(values):
    histogram = ChannelHistogram(half=8, positions=0)
    histogram.update(torch.from_numpy(values))
    exponent, counts = histogram.state()["exponent"], histogram.state()["counts"]
    for channel in range(values.shape[1]):
        column = values[:, channel].astype(np.float64)
        width = 2.0 ** float(exponent[channel]) / 8
        expected = np.zeros(17, dtype=np.int64)
        for value in column:
            magnitude = min(int(abs(value) / width), 7) + 1 if value else 0
            expected[8 + magnitude * int(np.sign(value))] += 1
        assert np.array_equal(counts[channel].numpy(), expected)


def test_widening_is_exact_whatever_came_first():
    small, large = torch.rand(20, 3) * 0.01, torch.rand(20, 3) * 900
    up, down, once = (ChannelHistogram(half=16) for _ in range(3))
    up.update(small)
    up.update(large)
    down.update(large)
    down.update(small)
    once.update(torch.cat([small, large]))
    for other in (down, once):
        assert same(up, other)


def test_channel_histograms_transport_permutation_and_signs():
    x = torch.randn(40, 4) * torch.tensor([1.0, 5.0, 0.1, 0.0])
    order, flip = torch.tensor([2, 0, 3, 1]), torch.tensor([True, False, True, True])
    before, after = ChannelHistogram(), ChannelHistogram()
    before.update(x)
    after.update(torch.where(flip, -x, x)[:, order])
    assert same(before.mirrored(flip).permuted(order), after)


def test_shifted_density_moves_every_channel_by_its_own_amount():
    x = torch.tensor([[4.0, -8.0], [5.0, -9.0]])
    histogram = ChannelHistogram(half=64)
    histogram.update(x)
    bins = histogram.bins(shift=-x.double().mean(0))
    assert bins.total == 4
    assert float(bins.left.min()) >= -0.5 - 16 / 64
    assert float(bins.right.max()) <= 0.5 + 16 / 64


def test_a_histogram_that_saw_nothing_is_an_empty_density():
    for histogram in (Histogram(), ChannelHistogram()):
        assert histogram.bins().total == 0
        assert histogram.mirrored().counts is None


def test_values_outside_the_fine_bins_are_kept_by_octave():
    histogram = Histogram(rate=1)
    histogram.update(torch.tensor([[1e-30, -1e30, 1.0, 0.0]]))
    assert int(histogram.state()["counts"].sum()) == 1
    bins = histogram.bins()
    assert bins.mass.tolist() == [1.0, 1.0, 1.0]
    assert bins.zeros == pytest.approx(1.0)
