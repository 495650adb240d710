# SPDX-License-Identifier: Apache-2.0
"""Bounds of accumulators against every sum that can occur."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.backends.bounds import (
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    INT32_LIMIT,
    dynamic_bound,
    magnitude,
    static_bound,
    total_range,
)

RANGES = st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(lambda p: (min(p), max(p)))
ROWS = st.lists(st.lists(st.integers(-7, 7), min_size=3, max_size=3), min_size=1, max_size=3)


@given(ROWS, RANGES, st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_no_partial_sum_exceeds_the_bound_and_one_reaches_it(rows, data, start):
    weight, bias = torch.tensor(rows), torch.full((len(rows),), start)
    bound = static_bound(weight, 0, data, bias)
    worst = 0
    for row in rows:
        for order in itertools.permutations(row):
            for picks in itertools.product(data, repeat=3):
                total = start
                for w, x in zip(order, picks, strict=True):
                    total += w * x
                    worst = max(worst, abs(total))
    assert worst <= bound
    most = max(sum(abs(w) for w in row) for row in rows) * max(abs(data[0]), abs(data[1]))
    assert bound == most + abs(start)


@given(ROWS, RANGES)
@settings(max_examples=60, deadline=None)
def test_complete_sums_lie_in_their_range_padding_included(rows, data):
    low, high = total_range(torch.tensor(rows), 0, data)
    for number, row in enumerate(rows):
        ends = [sum(w * x for w, x in zip(row, picks, strict=True))
                for picks in itertools.product((*data, 0), repeat=3)]  # fmt: skip
        assert (min(ends), max(ends)) == (float(low[number]), float(high[number]))


def test_the_channel_axis_is_the_one_that_is_kept():
    weight = torch.tensor([[1, 2], [3, -4]])
    assert static_bound(weight, 0, (-1, 1), None) == 7
    assert static_bound(weight, 1, (-1, 1), None) == 6
    assert [t.tolist() for t in total_range(weight, 1, (0, 1))] == [[0.0, -4.0], [4.0, 2.0]]


def test_a_bias_of_a_grouped_transposed_convolution_counts_whole():
    assert static_bound(torch.ones(2, 1), 0, (0, 3), torch.tensor([1, -9, 2, 2])) == 3 + 9


def test_dynamic_products_count_both_magnitudes():
    assert magnitude((-128, 127)) == 128
    assert dynamic_bound(4, (-8, 7), (0, 15)) == 4 * 8 * 15


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, FLOAT32_EXACT), (torch.float64, FLOAT64_EXACT)]
)
def test_the_limits_are_those_of_the_number_types(dtype: torch.dtype, limit: int):
    assert int(torch.tensor(limit - 1, dtype=dtype)) == limit - 1
    assert int(torch.tensor(limit, dtype=torch.int64).to(dtype) + 1) == limit
    assert torch.iinfo(torch.int32).max == INT32_LIMIT - 1
