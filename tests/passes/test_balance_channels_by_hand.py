# SPDX-License-Identifier: Apache-2.0
"""Balancing on graphs written by hand: every candidate, the best of them, and what moves along."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration import ChannelRange, choose_range_for_output
from qgraph.calibration.decibels import decibels
from qgraph.calibration.output_ranges import sketch
from qgraph.formats import AffineEncoding
from qgraph.passes import BalanceChannels
from qgraph.passes.balance_channels import exponents
from qgraph.passes.use_dual_regions import affine_encoding, row_weights
from tests.passes.by_hand import Hand, aten, kinds_asked, normal, told

NAME = BalanceChannels.name
WIDE = torch.tensor([1.0, 3.0, 0.5, 9.0, 1.0, 30.0])


def layers(
    *, function: object = aten.relu.default, outputs: tuple[int, ...] = (5, 7), bits: int = 6,
    weight_bits: int | None = 4, normed: bool = False,
) -> tuple[Hand, Any, Any]:  # fmt: skip
    """A wide value that linears read; their weights as planned, or in float."""
    hand = Hand()
    x = hand.given("x", normal(40, 4))
    first = hand.linear(x, normal(6, 4, seed=1) * WIDE[:, None], normal(6, seed=9), name="first")
    value = hand.call(function, first, name="value")
    sites = []
    for number, size in enumerate(outputs):
        layer = hand.linear(value, normal(size, 6, seed=2 + number), name=f"fc{number}")
        sites.append(hand.data_site(layer, bits=bits, axis=-1))
        if weight_bits is not None:
            hand.weight_site(layer, bits=weight_bits)
        if normed:
            gain = hand.stored(f"gain{number}", torch.ones(size))
            hand.call(aten.layer_norm.default, layer, [size], gain, gain)
    return hand, sites, value


def ranges(low: Tensor, high: Tensor) -> ChannelRange:
    seen = ChannelRange(-1)
    seen.update(torch.stack([low, high]))
    return seen


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_candidates_share_the_balancing_between_data_and_weights(seed, channels, outputs):
    a, b = (8 * normal(channels, seed=seed + i).exp() for i in (0, 1))
    sign = normal(channels, seed=seed + 2).sign()
    low, high = torch.minimum(sign * a, -b * (sign > 0.5)), torch.maximum(sign * a, b)
    if seed % 3 == 0:  # one side only: zero still counts
        low, high = torch.minimum(a, a + b), torch.maximum(a, a + b)
    elif seed % 3 == 1:
        low, high = -torch.maximum(a, a + b), -torch.minimum(a, a + b)
    weight = normal(outputs, channels, seed=seed + 3) * normal(channels, seed=seed + 4).exp()
    top, bottom = (np.asarray(v, dtype=np.float64) for v in (high, low))
    width = np.log2(np.maximum(np.maximum(top, 0) - np.minimum(bottom, 0), 1e-6))
    column = np.log2(np.maximum(np.abs(weight.numpy()).max(0), 1e-6))
    wanted = []
    for share in (1.0, 0.85, 0.7, 0.5):
        want = share * width - (1 - share) * column
        for most in (1, 2, 3, 4):
            power = np.maximum(np.ceil(want - want.max() - 1e-6), -most)
            wanted.append(2.0 ** (power - power.min()))
    found = [f.double().numpy() for f in exponents(ranges(low, high), weight)]
    assert len(found) == len(wanted)
    off = sum(not np.array_equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert off <= 1, "a border may fall on the other side of a power of two"


def planned_error(rows: Tensor, factor: Tensor, weights: list[tuple[Tensor, int]], bits: int,
                  power: float) -> tuple[float, AffineEncoding]:  # fmt: skip
    """What is lost when data and weights are both quantized, and the data's encoding."""
    scaled = rows / factor
    stacked = sketch(torch.cat([w for w, _ in weights]), 64) * factor
    ends = choose_range_for_output(
        scaled, stacked, low=float(scaled.min()), high=float(scaled.max()), bits=bits,
        relative=power,
    )  # fmt: skip
    encoding = affine_encoding(*ends, bits)
    wanted = [rows.double().numpy() @ w.double().numpy().T for w, _ in weights]
    energy = torch.as_tensor(sum((y**2).sum(1) for y in wanted)).float()
    importance = row_weights(energy, power).double().numpy()
    data, total = encoding.fake(scaled).double().numpy(), 0.0
    for (weight, width), want in zip(weights, wanted, strict=True):
        w = (weight * factor).double().numpy()
        step = np.abs(w).max(1, keepdims=True) / (2 ** (width - 1) - 1)
        lost = data @ (np.round(w / step) * step).T - want
        total += float(((lost**2).sum(1) * importance).sum())
    return total, encoding


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("weight_bits", "counted"), [(4, 4), (8, 8), (None, 16)])
def test_the_candidate_of_the_smallest_error_of_all_outputs_is_taken(weight_bits, counted, normed):
    hand, sites, value = layers(weight_bits=weight_bits, normed=normed)
    rows = value.meta["val"]
    weights = [(normal(n, 6, seed=2 + i), counted) for i, n in enumerate((5, 7))]
    power = 1.5 if normed else 0.0
    seen = ranges(rows.amin(0), rows.amax(0))
    plain, _ = planned_error(rows, torch.ones(6), weights, 6, power)
    every = list(exponents(seen, torch.cat([w for w, _ in weights])))
    errors = [planned_error(rows, factor, weights, 6, power) for factor in every]
    best = min(range(len(every)), key=lambda i: errors[i][0])
    module, context, changed = hand.run(BalanceChannels(min_gain_db=0.0))
    (line,) = told(context, NAME)
    assert changed == [True]
    assert line.numbers["gain_db"] == pytest.approx(decibels(plain, errors[best][0]), abs=0.02)
    assert line.numbers["spread"] == float(every[best].log2().max())
    assert line.numbers["bits"] == 6
    assert line.reason.endswith("folded into first")
    for site in sites:
        assert site.encoding is sites[0].encoding
        assert torch.equal(site.encoding.scale, errors[best][1].scale)
        assert torch.equal(site.encoding.zero_point, errors[best][1].zero_point)
    x = module.graph.find_nodes(op="placeholder")[0].meta["val"]
    again = module(x)
    assert torch.equal(again, hand_output(hand))


def hand_output(hand: Hand) -> Tensor:
    """What the graph gave before."""
    value: Tensor = [n for n in hand.graph.nodes if n.op == "call_function"][-1].meta["val"]
    return value


@pytest.mark.parametrize("function", [aten.relu.default, aten.gelu.default])
def test_statistics_of_every_value_on_the_way_are_those_of_the_scaled_values(function):
    hand, sites, value = layers(function=function)
    module = hand.module()
    item = BalanceChannels(min_gain_db=-99.0)
    context = hand.context(module, item)
    first = next(n for n in module.graph.nodes if n.name == "first")
    below = ChannelRange(-1)
    below.update(first.meta["val"])
    seen = context.statistics[value]
    context.statistics[first] = type(seen)([below])
    before = seen.get(ChannelRange).fields()
    assert item.run(module, context)
    factor = torch.cat([normal(5, 6, seed=2), normal(7, 6, seed=3)]).abs().amax(0)
    weight = module.get_buffer(str(sites[0].edge.consumer.args[1].target))
    factor = weight[0] / normal(5, 6, seed=2)[0]
    assert float(factor.max()) > 1.0
    source = sites[0].value
    assert source is (value if function is aten.relu.default else sites[0].edge.consumer.args[0])
    now = context.statistics[source].get(ChannelRange).fields()
    assert torch.equal(now["high"], before["high"] / factor)
    assert torch.equal(now["low"], before["low"] / factor)
    there = context.statistics[first].get(ChannelRange).fields()["high"]
    folded = function is aten.relu.default
    wanted = first.meta["val"].amax(0)
    assert torch.equal(there, wanted / factor if folded else wanted)


def test_the_gain_that_is_asked_for_is_enough_and_a_little_less_is_not():
    (line,) = told(layers()[0].run(BalanceChannels(min_gain_db=0.0))[1], NAME)
    gain = line.numbers["gain_db"]
    assert gain > 0
    for asked, outcome in ((gain, "applied"), (math.nextafter(gain, math.inf), "kept")):
        hand, sites, _ = layers()
        _, context, changed = hand.run(BalanceChannels(min_gain_db=asked))
        (found,) = told(context, NAME)
        assert found.outcome == outcome
        assert changed == [outcome == "applied"]
        assert all((s.encoding is None) is (outcome == "kept") for s in sites)


@pytest.mark.parametrize("skip", [("fc0",), ("fc1",)])
def test_one_reader_that_is_to_be_left_alone_is_enough(skip):
    _, context, changed = layers()[0].run(BalanceChannels(skip=skip, min_gain_db=-99.0))
    assert [d.reason for d in told(context, NAME)] == ["left alone on request"]
    assert changed == [False]


@pytest.mark.parametrize(("size", "looked_at"), [(96, 96), (97, 49), (192, 96), (193, 65)])
def test_of_many_output_channels_evenly_spread_ones_are_looked_at(size, looked_at, monkeypatch):
    from qgraph.passes import balance_channels

    seen: Any = []
    real = balance_channels.sketch  # type: ignore[attr-defined]
    monkeypatch.setattr(
        balance_channels, "sketch", lambda w, n: (seen.append((len(w), n)), real(w, n))[1]
    )
    layers(outputs=(size,))[0].run(BalanceChannels())
    assert set(seen) == {(looked_at, 64)}


def test_ranges_of_channels_and_rows_are_asked_for_and_only_before_linears():
    assert sorted(kinds_asked(BalanceChannels(), layers()[0])) == [
        ("value", "ChannelRange"), ("value", "Reservoir"),
    ]  # fmt: skip
    hand = Hand()
    x = hand.given("x", normal(2, 6, 5))
    conv = hand.call(aten.conv1d.default, x, hand.stored("w", normal(4, 6, 3)))
    hand.data_site(conv, axis=1)
    assert not kinds_asked(BalanceChannels(), hand)
