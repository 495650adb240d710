# SPDX-License-Identifier: Apache-2.0
"""Grouping channels on graphs written by hand: what is tried, which of it wins, what moves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration import ChannelRange, Reservoir
from qgraph.calibration.decibels import decibels
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.formats.dual_region import dual_region
from qgraph.formats.element_groups import element_groups, magnitude_thresholds
from qgraph.passes import ReorderChannels, reorder_channels
from qgraph.passes.reorder_channels import channel_axis, likely_range, matched
from tests.passes.by_hand import Hand, aten, kinds_asked, normal, told

NAME = ReorderChannels.name
CLIPS = (1.3, 1.15, 1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24)
KEPT = {9: 3, 8: 3, 7: 4, 6: 5, 5: 7, 4: 9, 3: 9, 2: 9}  # clips that so many bits may try


def wide(channels: int) -> Tensor:
    """Some channels far wider than the others, not in order."""
    return torch.where(torch.arange(channels) % 16 == 2, 40.0, 1.0)


def layers(
    channels: int = 16, *, bits: int = 6, readers: tuple[int, ...] = (5, 7), sizes: Any = None
) -> tuple[Hand, Any, Any]:
    """A value with a few wide channels, read by linears `fc0`, `fc1`, ..."""
    hand = Hand()
    factor = wide(channels) if sizes is None else sizes
    x = hand.given("x", normal(40, 4))
    first = hand.linear(x, normal(channels, 4, seed=1) * factor[:, None], name="first")
    value = hand.call(aten.gelu.default, first, name="value")
    sites = [
        hand.data_site(hand.linear(value, normal(size, channels, seed=2 + n), name=f"fc{n}"),
                       bits=bits, axis=-1)
        for n, size in enumerate(readers)
    ]  # fmt: skip
    return hand, sites, value


class Scripted:
    """Stands for `linear_score`: the errors that a test wants, in the order of the questions."""

    def __init__(self, *errors: float) -> None:
        self.errors, self.asked = list(errors), 0
        self.encodings: list[Any] = []

    def __call__(self, rows: Tensor, weight: Tensor, power: float) -> Any:
        return self.score

    def score(self, encoding: object) -> float:
        self.encodings.append(encoding)
        self.asked += 1
        return self.errors[min(self.asked, len(self.errors)) - 1]


def run(hand: Hand, item: ReorderChannels, *errors: float) -> tuple[Any, Any, Any, Any]:
    """The line of the report, whether the graph changed, what was asked, the graph."""
    script = Scripted(*errors)
    with pytest.MonkeyPatch.context() as patch:
        if errors:
            patch.setattr(reorder_channels, "linear_score", script)
        module, context, changed = hand.run(item)
    (line,) = told(context, NAME)
    return line, changed[0], script.encodings, module


SLOW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@SLOW
@given(st.integers(0, 10**6), st.sampled_from(sorted(KEPT)), st.sampled_from(["best", "octaves"]))
def test_the_grouping_of_the_smallest_error_wins_and_tight_clips_must_win_clearly(
    seed, bits, grouping
):
    draw = torch.Generator().manual_seed(seed)
    count = KEPT[bits] * (2 if grouping == "best" else 1)
    pool = [0.5, 0.5 * 0.93, 0.4, 0.4 * 0.93, 0.3, 0.2]  # ties and borders are likely
    errors = [pool[int(torch.randint(len(pool), (), generator=draw))] for _ in range(count)]
    hand, sites, _ = layers(bits=bits)
    item = ReorderChannels(grouping=grouping, min_gain_db=-99.0)
    line, changed, asked, _ = run(hand, item, 1.0, *errors)
    assert changed
    assert len(asked) == 1 + count
    best: tuple[float, int] | None = None
    for start in range(0, count, KEPT[bits]):
        here = start
        for at in range(start, start + KEPT[bits]):
            if errors[at] < errors[here] * 0.93:
                here = at
        if best is None or errors[here] < best[0]:
            best = errors[here], here
    assert best is not None
    assert line.numbers["gain_db"] == pytest.approx(decibels(1.0, best[0]))
    found = asked[1 + best[1]]
    assert line.numbers["groups"] == len(found.scale.unique()) > 1
    assert line.numbers["bits"] == bits == found.bits
    for site in sites:
        assert sorted(site.encoding.scale.tolist()) == sorted(found.scale.tolist())


def test_of_two_groupings_that_are_as_good_the_first_is_taken():
    sizes = torch.tensor([1.0] * 8 + [6.0] * 6 + [40.0, 50.0])
    for first, second in ((0.5, 0.5), (0.5, 0.4)):
        hand, sites, _ = layers(sizes=sizes[normal(16).argsort()])
        errors = [first] * KEPT[6] + [second] * KEPT[6]
        _, _, asked, _ = run(hand, ReorderChannels(min_gain_db=-99.0), 1.0, *errors)
        ways = [sorted(asked[at].scale.tolist()) for at in (1, 1 + KEPT[6])]
        assert ways[0] != ways[1]
        assert sorted(sites[0].encoding.scale.tolist()) == ways[second < first]


@pytest.mark.parametrize("bits", KEPT)
def test_more_bits_try_fewer_clips_and_each_group_has_its_own_scale(bits, monkeypatch):
    seen: Any = []
    real = reorder_channels.grouped_encoding  # type: ignore[attr-defined]

    def spy(low, high, group, width, **options):
        seen.append((options, width, group))
        return real(low, high, group, width, **options)

    monkeypatch.setattr(reorder_channels, "grouped_encoding", spy)
    layers(bits=bits)[0].run(ReorderChannels(grouping="octaves", force=("*",)))
    assert [options["clip"] for options, _, _ in seen] == list(CLIPS[: KEPT[bits]])
    assert {(options["axis"], width) for options, width, _ in seen} == {(-1, bits)}


@pytest.mark.parametrize(
    ("channels", "tile", "wanted"),
    [(6, 4, 1), (8, 4, 1), (15, 4, 1), (16, 4, 2), (31, 4, 3), (32, 4, 4), (64, 4, 4), (64, 2, 2)],
)
def test_few_channels_make_small_tiles(channels, tile, wanted, monkeypatch):
    seen: Any = []
    real = reorder_channels.group_channels  # type: ignore[attr-defined]
    monkeypatch.setattr(
        reorder_channels, "group_channels",
        lambda size, cuts, tile: (seen.append((size, tile)), real(size, cuts, tile=tile))[1],
    )  # fmt: skip
    hand, _, value = layers(channels)
    hand.run(ReorderChannels(tile=tile, force=("*",)))
    assert {tile for _, tile in seen} == {wanted}
    x = value.meta["val"]
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    for centred, size in ((True, high - low), (False, torch.maximum(high, -low))):
        seen.clear()
        layers(channels)[0].run(ReorderChannels(zero_points=centred, force=("*",)))
        assert all(torch.equal(each, size) for each, _ in seen)


@pytest.mark.parametrize("grouping", ["outliers", "octaves", "best"])
def test_each_grouping_is_the_only_one_that_is_tried_unless_the_best_is_wanted(grouping):
    _, _, asked, _ = run(
        layers()[0], ReorderChannels(grouping=grouping, min_gain_db=-99.0), 1.0, 0.5
    )
    assert len(asked) - 1 == KEPT[6] * (2 if grouping == "best" else 1)


@pytest.mark.parametrize(
    ("errors", "options", "outcome"),
    [
        ((0.01, 0.001), {"enough_db": 20.0}, "20.0 dB are enough"),
        ((0.01, 0.001), {"enough_db": math.nextafter(20.0, 99.0)}, "applied"),
        ((0.01, 0.001), {"enough_db": 19.0, "force": ("fc0",)}, "applied"),
        ((0.01, 0.001), {"enough_db": 19.0, "force": ("fc1",)}, "applied"),
        ((1.0, 0.1), {"min_gain_db": 10.0}, "applied"),
        ((1.0, 0.1), {"min_gain_db": math.nextafter(10.0, 99.0)}, "gain +10.00 dB"),
        ((1.0, 0.1), {"min_gain_db": 11.0, "force": ("fc1",)}, "applied"),
        ((1.0, 1.0), {"skip": ("fc0",), "force": ("*",)}, "left alone on request"),
        ((1.0, 1.0), {"skip": ("fc1",)}, "left alone on request"),
    ],
)
def test_gains_and_requests_decide_right_at_their_limits(errors, options, outcome):
    hand, sites, _ = layers()
    line, changed, _, _ = run(hand, ReorderChannels(**options), *errors)
    assert changed is (outcome == "applied")
    assert line.outcome == ("applied" if changed else "kept")
    assert outcome in (line.outcome if changed else line.reason)
    assert all((site.encoding is not None) is changed for site in sites)


@pytest.mark.parametrize(
    ("gain", "options", "outcome"),
    [
        (10.0, {"min_gain_db": 10.0}, "applied"),
        (10.0, {"min_gain_db": math.nextafter(10.0, 99.0)}, "kept"),
        (10.0, {"min_gain_db": 11.0, "force": ("fc1",)}, "applied"),
        (10.0, {"min_gain_db": 11.0, "force": ("nobody",)}, "kept"),
    ],
)
def test_groups_of_elements_are_taken_at_the_gain_that_is_asked_for(gain, options, outcome):
    hand, sites, value = layers()
    item = ReorderChannels(elements=True, **options)
    line, changed, asked, _ = run(hand, item, 1.0, 10 ** (-gain / 10))
    assert line.outcome == outcome
    assert not changed
    grouped = asked[1]
    assert (sites[0].encoding is grouped) is (outcome == "applied")
    magnitude, count = value.meta["val"].abs().double().unique(return_counts=True)
    cuts = magnitude_thresholds(magnitude, count)
    x = value.meta["val"]
    exact = element_groups(cuts, float(x.min()), float(x.max()), 6)
    assert grouped.levels.numel() == pytest.approx(exact.levels.numel(), rel=0.1)
    assert float(grouped.scale) == pytest.approx(float(exact.scale), rel=0.1)
    assert line.numbers["bits"] == grouped.bits == exact.bits
    assert line.numbers["gain_db"] == pytest.approx(gain)


def test_the_rival_is_what_two_regions_decided_or_else_an_affine_range():
    hand, sites, _ = layers()
    _, _, asked, _ = run(hand, ReorderChannels(min_gain_db=99.0), 1.0)
    assert isinstance(asked[0], AffineEncoding)
    assert asked[0].scale.ndim == 0
    hand, sites, _ = layers()
    regions = dual_region(6, 2, high=9.0)
    for site in sites:
        site.decide(regions, "use-dual-regions")
    _, _, asked, _ = run(hand, ReorderChannels(min_gain_db=99.0), 1.0)
    assert asked[0] is regions
    assert sites[0].encoding is regions


def test_without_sampled_rows_a_site_is_refused():
    hand, _, value = layers()
    module, item = hand.module(), ReorderChannels()
    context = hand.context(module, item)
    seen = context.statistics[value]
    context.statistics[value] = type(seen)(
        [seen.get(ChannelRange), Reservoir(-1, 128, 16)]
    )  # fmt: skip
    assert item.run(module, context) is False
    assert [d.outcome for d in told(context, NAME)] == ["refused"]


def test_operands_are_matched_by_kind_axis_weight_and_who_decided():
    hand = Hand()
    x = hand.given("x", normal(2, 6, 6))
    fc, other = (hand.linear(x, normal(3, 6, seed=n), name=f"fc{n}") for n in (0, 1))
    conv = hand.call(aten.conv1d.default, x, hand.stored("w", normal(3, 6, 1)))
    mixed = hand.call(aten.matmul.default, x, x)
    a, b = hand.data_site(fc, axis=-1), hand.data_site(other, axis=-1)
    c, _ = hand.data_site(conv, axis=1), hand.data_site(mixed, axis=-1)
    module, both = hand.module(), ("linear", "conv")
    context = hand.context(module)
    assert matched(module, context, both) == {(x, 4): [a, b]}
    hand.plan.sites.remove(c)
    hand.plan.sites.insert(0, c)
    assert matched(module, context, both) == {(x, 4): [c]}
    assert matched(module, context, ("linear",)) == {}, "axes are those of the first reader"
    c.bits = 5
    assert matched(module, context, both) == {(x, 5): [c], (x, 4): [a, b]}
    assert matched(module, context, ("linear",)) == {(x, 4): [a, b]}
    a.decide(AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=False)), "use-dual-regions")
    b.decide(a.encoding, "fold-key-signs")
    assert matched(module, context, both)[x, 4] == [a]
    assert (channel_axis([a]), channel_axis([c, a])) == (-1, 1)
    a.axis = None
    assert channel_axis([a, c]) == -1


def test_a_weight_is_reordered_only_where_all_its_readers_read_the_value():
    for shared, how in ((False, "gathered"), (True, "order kept, the weight serves others too")):
        hand = Hand()
        x = hand.given("x", normal(40, 16) * wide(16))
        weight = hand.stored("weight", normal(5, 16, seed=3))
        alone = hand.stored("alone", normal(5, 16, seed=4))
        first = hand.call(aten.linear.default, x, alone, name="first")
        second, third = (hand.call(aten.linear.default, x, weight) for _ in range(2))
        sites = [hand.data_site(n, bits=6, axis=-1) for n in (first, second, third)]
        if shared:
            hand.call(aten.linear.default, hand.given("y", normal(3, 16)), weight)
        line, changed, _, _ = run(hand, ReorderChannels(tile=1, force=("*",)))
        assert how in line.reason
        assert changed is not shared
        wanted = [n.meta["val"] for n in (first, second, third)]
        got = [first, second, third]
        assert len({id(s.encoding) for s in sites}) == 1
        scale = sites[0].encoding.scale
        assert bool((scale.diff() >= 0).all()) is changed
        assert [n.meta["val"] for n in got] == wanted


def test_an_order_that_stands_or_is_not_wanted_is_kept():
    sorted_sizes = torch.tensor([1.0] * 12 + [40.0] * 4)
    for item, sizes in (
        (ReorderChannels(tile=1, grouping="octaves", groups=2, force=("*",)), sorted_sizes),
        (ReorderChannels(tile=1, reorder=False, force=("*",)), None),
    ):
        if sizes is not None:  # ascending ranges
            hand = Hand()
            x = hand.given("x", normal(40, 1).sign() * sizes.sort().values)
            site = hand.data_site(hand.linear(x, normal(5, 16)), bits=6, axis=-1)
        else:
            hand, (site, _), _ = layers()
        line, changed, _, module = run(hand, item)
        assert line.outcome == "applied"
        assert line.reason.endswith("order kept")
        assert not changed
        assert isinstance(site.encoding, AffineEncoding)
        assert not any("index_select" in n.name for n in module.graph.nodes)


def test_reordered_layers_compute_what_they_did_and_statistics_move_along():
    hand, sites, value = layers()
    module, item = hand.module(), ReorderChannels(tile=1, force=("*",))
    context = hand.context(module, item)
    before = context.statistics[value].get(ChannelRange).fields()["high"]
    wanted = module(*(n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"))
    assert item.run(module, context) is True
    module.recompile()
    got = module(*(n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    after = context.statistics[value].get(ChannelRange).fields()["high"]
    order = [int((before == v).nonzero()[0]) for v in after]
    assert sorted(order) == list(range(16))
    weight = module.get_buffer(str(sites[0].edge.consumer.args[1].target))
    assert torch.equal(weight, normal(5, 16, seed=2)[:, order])
    assert bool((sites[0].encoding.scale.diff() >= 0).all())


@example(0, 1, 1, 80)
@SLOW
@given(
    st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 2.5, 9, 80])
)
def test_ranges_grow_as_they_grew_from_the_sample_to_all_data(seed, channels, rows, times):
    sample = normal(rows, channels, seed=seed)
    whole = [3 * normal(channels, seed=seed + i).exp() for i in (1, 2)]
    side = normal(channels, seed=seed + 3)
    low = torch.where(side > 0.5, whole[0], -whole[0])
    high = torch.where(side < -0.5, -whole[1], whole[1])
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    sample[:, 0] = 1e-4 * sample[:, 0]
    seen = ChannelRange(-1)
    seen.update(torch.stack([low, high]))
    seen.count = torch.tensor(int(times * rows * channels))
    found = likely_range(seen, sample)
    bottom, top = (np.asarray(v, dtype=np.float64) for v in (low, high))
    bottom, top = np.minimum(bottom, 0), np.maximum(top, 0)
    share = int(times * rows * channels) / (rows * channels)
    factor = np.ones(channels)
    if share >= 2:
        part = np.maximum(sample.double().numpy().max(0), 0)
        part = part - np.minimum(sample.double().numpy().min(0), 0)
        own = np.log2(np.clip((top - bottom) / np.maximum(part, 1e-12), 1, 256)) / np.log2(share)
        factor = 2 ** np.maximum(own, own.mean())
    for got, wanted in zip(found, (bottom * factor, top * factor), strict=True):
        np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_without_rows_ranges_stay_as_they_are():
    seen = ChannelRange(-1)
    seen.update(torch.tensor([[1.0, -2.0]]))
    seen.count = torch.tensor(1)
    low, high = likely_range(seen, torch.zeros(0, 2))
    assert (low.tolist(), high.tolist()) == ([0.0, -2.0], [1.0, 0.0])


@pytest.mark.parametrize("elements", [False, True])
def test_what_is_asked_for(elements):
    asked = kinds_asked(ReorderChannels(elements=elements), layers()[0])
    wanted = [("value", "ChannelRange"), ("value", "Reservoir")]
    wanted += [("value", "Histogram")] if elements else []
    assert asked == wanted
    tried = itertools.islice(asked, 2)
    assert all(name == "value" for name, _ in tried)
