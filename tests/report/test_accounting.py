# SPDX-License-Identifier: Apache-2.0
"""Laws of accounting: exact ratios, weightings that differ, and the peak against its definition."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.report.accounting import (
    Convention,
    OpUse,
    TensorUse,
    account,
    compute,
    compute_ratio,
    peak_bits,
)

laws = settings(max_examples=30, deadline=None)
counts = st.integers(1, 10**9)


@st.composite
def networks(draw):
    size = draw(st.integers(1, 6))
    ops = [
        OpUse(name=f"op{i}", parameters=draw(counts), macs=draw(counts), biases=draw(counts))
        for i in range(size)
    ]
    tensors = []
    for i in range(size):
        born = draw(st.integers(0, 9))
        last = draw(st.integers(born, 12))
        tensors.append(TensorUse(name=f"t{i}", elements=draw(counts), born=born, last_read=last))
    return ops, tensors


@given(networks())
@laws
def test_float_has_ratio_one_in_every_account(network):
    cost = account(*network)
    assert cost.weight_ratio == cost.model_ratio == cost.bit_operations_ratio == 1.0
    assert cost.activation_ratio == cost.peak_ratio == 1.0
    assert all(compute_ratio(network[0], c) == 1.0 for c in Convention)


@given(networks())
@laws
def test_uniform_eight_bits_give_exactly_a_quarter_and_a_sixteenth(network):
    ops = [replace(op, weight_bits=8, activation_bits=8) for op in network[0]]
    cost = account(ops, [replace(t, bits=8) for t in network[1]])
    assert cost.weight_ratio == cost.activation_ratio == cost.peak_ratio == 4.0
    assert cost.bit_operations_ratio == 16.0
    assert (cost.mean_weight_bits, cost.mean_activation_bits) == (8.0, 8.0)
    assert compute_ratio(ops, Convention.WORDS_64) == 1.0
    assert compute_ratio(ops, Convention.WORDS_128) == 2.0


@given(networks(), st.lists(st.sampled_from([2, 4, 8, 16]), min_size=6, max_size=6))
@laws
def test_the_peak_is_the_largest_sum_of_tensors_alive_at_a_step(network, widths):
    tensors = [replace(t, bits=b) for t, b in zip(network[1], widths, strict=False)]
    alive = {
        step: sum(t.elements * t.bits for t in tensors if t.born <= step <= t.last_read)
        for step in range(14)
    }
    peak, step = peak_bits(tensors)
    assert peak == max(alive.values()) == alive[step]
    assert peak <= sum(t.elements * t.bits for t in tensors)


def test_a_skip_that_stays_alive_carries_the_peak():
    skip = TensorUse(name="skip", elements=100, bits=8, born=0, last_read=4)
    deep = TensorUse(name="deep", elements=30, bits=8, born=2, last_read=3)
    cost = account([], [skip, deep])
    assert cost.peak_bytes == 130
    assert cost.peak_step == 2
    assert cost.peak_bytes > account([], [replace(skip, last_read=1), deep]).peak_bytes


def test_each_mean_has_its_own_weighting():
    shallow = OpUse(name="a", parameters=1, macs=9, weight_bits=8, activation_bits=8)
    deep = OpUse(name="b", parameters=9, macs=1, weight_bits=2, activation_bits=4)
    maps = [
        TensorUse(name="a", elements=3, bits=8, born=0, last_read=1),
        TensorUse(name="b", elements=1, bits=4, born=1, last_read=2),
    ]
    cost = account([shallow, deep], maps)
    assert cost.mean_weight_bits == (8 + 9 * 2) / 10
    assert cost.mean_activation_bits == (3 * 8 + 4) / 4
    assert cost.mean_bit_product == (9 * 64 + 8) / 10


def test_scales_and_biases_are_counted_apart():
    op = OpUse(name="a", parameters=100, macs=1, weight_bits=4, scales=10, biases=5)
    cost = account([op], [], disk_bytes=123)
    assert (cost.weight_bytes, cost.scale_bytes, cost.bias_bytes) == (50.0, 40.0, 20.0)
    assert cost.weight_ratio == 8.0
    assert cost.model_ratio == (3200 + 160) / (400 + 480)
    assert "mean over parameters" in str(cost)
    assert "123 bytes" in str(cost)
    assert json.loads(json.dumps(cost.to_json()))["disk_bytes"] == 123


@pytest.mark.parametrize(
    ("convention", "amount"),
    [(Convention.BOPS, 1024 + 16), (Convention.WORDS_64, 1.25), (Convention.WORDS_128, 2.25)],
)
def test_conventions_price_a_float_and_a_four_bit_product(convention, amount):
    plain = OpUse(name="a", parameters=1, macs=1)
    small = OpUse(name="b", parameters=1, macs=1, weight_bits=4, activation_bits=4)
    assert compute([plain, small], convention) == amount


def test_published_example_of_a_deep_network_is_reproduced():
    shares = [0.017, 0.055, 0.146, 0.330, 0.452]
    ops = [
        OpUse(name=str(i), parameters=round(s * 1e6), macs=1, weight_bits=w)
        for i, (s, w) in enumerate(zip(shares, (6, 6, 6, 2, 1), strict=True))
    ]
    assert account(ops, []).mean_weight_bits == pytest.approx(2.42, abs=0.01)


def test_an_empty_network_costs_nothing():
    cost = account([], [])
    assert cost.weight_bytes == cost.peak_bytes == 0.0
    assert cost.model_ratio == 1.0
