# SPDX-License-Identifier: Apache-2.0
"""Two regions on graphs written by hand: what is asked for, scored, chosen, at every limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qgraph.calibration import Histogram, Range, Reservoir, choose_range_for_output
from qgraph.calibration.decibels import decibels
from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.table_error import table_error
from qgraph.formats import AffineEncoding, LevelEncoding
from qgraph.formats.dual_region import shift_of, signed_dual_region
from qgraph.graph.plan import Site
from qgraph.passes import (
    UseDualRegions,
    use_dual_regions,
)
from qgraph.passes.use_dual_regions import (
    linear_score,
    rectified_candidates,
    shortlist,
    signed_candidates,
)
from tests.passes.by_hand import Hand, aten, normal, told
from tests.passes.two_regions import activated, attention

NAME = UseDualRegions.name
FOREVER = float("inf")


def observed(site: Site, low: float, high: float) -> FusedStatistics:
    """Statistics of probabilities with these extremes."""
    seen = FusedStatistics([Range(), Histogram(rate=1)])
    seen.update(torch.tensor([low, 0.1, 0.2, 0.3, high]))
    return seen


@pytest.mark.parametrize(
    ("low", "high", "fine"),
    [
        (0.0, 1.0, True),
        (0.0, 1.000009, True),
        (0.0, 1.0001, False),
        (-1e-6, 1.0, False),
        (-1.0, 2.0, False),
        (0.1, 0.9, True),
    ],
)
def test_probabilities_outside_zero_to_one_are_refused(low, high, fine):
    hand, site, soft = attention()
    module = hand.module()
    context = hand.context(module, UseDualRegions())
    context.statistics[soft] = observed(site, low, high)
    UseDualRegions().run(module, context)
    (line,) = told(context, NAME)
    assert line.reason.startswith("not in [0, 1]") is not fine
    assert (line.outcome == "refused") is not fine


@pytest.mark.parametrize("make", [attention, activated, lambda: activated(aten.relu.default)])
@pytest.mark.parametrize("most", [None, 0, 1, 2])
def test_every_split_up_to_the_largest_competes(make, most, monkeypatch):
    tried: list[LevelEncoding] = []

    def spy(bins, candidates):
        tried.extend(candidates)
        return table_error(bins, candidates)

    monkeypatch.setattr(use_dual_regions, "table_error", spy)
    make()[0].run(UseDualRegions(max_shift=most))
    top = 3 if most is None else most
    assert {shift_of(each) for each in tried} == set(range(top + 1))


def affine_rival(value: Tensor, weight: Tensor, bits: int) -> float:
    """What the best affine format loses before a linear."""
    low, high = float(value.min()), float(value.max())
    ends = choose_range_for_output(value, weight, low=low, high=high, bits=bits, relative=0.0)
    return linear_score(value, weight, 0.0)(use_dual_regions.affine_encoding(*ends, bits))


@pytest.mark.parametrize("function", [aten.gelu.default, aten.relu.default])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_before_a_linear_the_split_of_the_smallest_output_error_wins(function, bits):
    hand, sites, value = activated(function, bits)
    _, context, changed = hand.run(UseDualRegions(force=("*",)))
    assert changed == [False]
    (line,) = told(context, NAME)
    x = value.meta["val"]
    weight = torch.cat([normal(5, 6, seed=2), normal(5, 6, seed=3)])
    signed = function is aten.gelu.default
    make: Callable[..., list[LevelEncoding]] = signed_candidates if signed else rectified_candidates
    candidates = make(bits, range(bits), float(x.max()))
    seen = Histogram()
    seen.update(context.statistics[value].get(Reservoir).sampled())
    short = shortlist(candidates, table_error(seen.bins(), candidates))
    score = linear_score(x, weight, 0.0)
    best = min(score(each) for each in short)
    for site in sites:
        assert isinstance(site.encoding, LevelEncoding)
        assert score(site.encoding) == pytest.approx(best, rel=1e-3)
    gain = decibels(affine_rival(x, weight, bits), best)
    assert line.numbers["gain_db"] == pytest.approx(gain, abs=0.01)
    assert line.numbers["shift"] == shift_of(sites[0].encoding)
    assert line.numbers["bits"] == bits
    assert line.numbers["unused_codes"] == 2**bits - sites[0].encoding.levels.numel()


def test_the_gain_that_is_asked_for_is_enough_and_a_little_less_is_not():
    (line,) = told(activated(bits=3)[0].run(UseDualRegions(force=("*",)))[1], NAME)
    gain = line.numbers["gain_db"]
    for asked, outcome in ((gain, "applied"), (math.nextafter(gain, FOREVER), "kept")):
        (found,) = told(activated(bits=3)[0].run(UseDualRegions(min_gain_db=asked))[1], NAME)
        assert found.outcome == outcome
    for force in (("fc",), ("other",), ("*",)):
        hand = activated(bits=3)[0]
        item = UseDualRegions(min_gain_db=gain + 1, enough_db=-99.0, force=force)
        assert [d.outcome for d in told(hand.run(item)[1], NAME)] == ["applied"]


def test_where_affine_is_good_enough_it_stays():
    x, weight = (
        activated()[2].meta["val"],
        torch.cat([normal(5, 6, seed=2), normal(5, 6, seed=3)]),
    )
    level = decibels(1.0, affine_rival(x, weight, 4))
    for enough, outcome in ((level - 0.05, "kept"), (level + 0.05, "applied")):
        item = UseDualRegions(min_gain_db=-FOREVER, enough_db=enough)
        (line,) = told(activated()[0].run(item)[1], NAME)
        assert line.outcome == outcome
        assert line.reason.startswith("affine keeps") is (outcome == "kept")


@pytest.mark.parametrize(
    ("loss", "outcome"),
    [(10**-2.0, "kept"), (math.nextafter(10**-2.0, 1.0), "applied"), (10**-3.0, "kept")],
)
def test_twenty_decibels_that_were_asked_for_are_enough_and_a_little_less_is_not(
    loss, outcome, monkeypatch
):
    monkeypatch.setattr(
        use_dual_regions, "linear_score",
        lambda *_: lambda encoding: loss if isinstance(encoding, AffineEncoding) else 1e-9,
    )  # fmt: skip
    (line,) = told(activated()[0].run(UseDualRegions(enough_db=20.0))[1], NAME)
    assert line.outcome == outcome
    assert line.numbers["gain_db"] == pytest.approx(decibels(loss, 1e-9))


@pytest.mark.parametrize("skip", [("fc",), ("other",), ("*",)])
def test_one_reader_that_is_to_be_left_alone_is_enough(skip):
    _, context, _ = activated()[0].run(UseDualRegions(skip=skip, force=("*",)))
    assert [(d.outcome, d.reason) for d in told(context, NAME)] == [
        ("kept", "left alone on request")
    ]


@pytest.mark.parametrize("function", [aten.gelu.default, aten.relu.default])
def test_without_rows_the_histogram_judges_both_formats(function):
    hand = Hand()
    value = hand.call(function, hand.given("x", normal(4000, 6)), name="value")
    other = hand.given("y", normal(6, 4, seed=1))
    site = hand.data_site(hand.call(aten.matmul.default, value, other), bits=3)
    module = hand.module()
    item = UseDualRegions(min_gain_db=-FOREVER, enough_db=-1000.0)
    context = hand.context(module, item)
    context.statistics[value] = FusedStatistics([Range(), Histogram(rate=1)])
    context.statistics[value].update(value.meta["val"])
    item.run(module, context)
    (line,) = told(context, NAME)
    x = value.meta["val"].double()

    def kept(encoding: LevelEncoding | AffineEncoding) -> float:
        lost = encoding.fake(x.float()).double() - x
        return decibels(float(x.square().sum()), float(lost.square().sum()))

    plain = max(
        kept(use_dual_regions.affine_encoding(float(x.min()), float(x.max()) * part / 50, 3))
        for part in range(10, 51)
    )
    said = float(line.reason.split()[2])
    assert said == pytest.approx(plain, abs=0.35)
    forced = UseDualRegions(force=("*",))
    forced.run(module, context)
    assert isinstance(site.encoding, LevelEncoding)
    signed = function is aten.gelu.default
    make: Callable[..., list[LevelEncoding]] = signed_candidates if signed else rectified_candidates
    best = max(kept(each) for each in make(3, range(3), float(x.max())))
    assert kept(site.encoding) == pytest.approx(best, abs=0.1)
    assert line.numbers["gain_db"] == pytest.approx(best - plain, abs=0.4)


def test_a_histogram_of_all_data_comes_before_the_sampled_rows(monkeypatch):
    hand, _, value = activated(rows=40)
    module = hand.module()
    context = hand.context(module, UseDualRegions())
    seen = []

    def spy(bins, candidates):
        seen.append(bins.total)
        return table_error(bins, candidates)

    monkeypatch.setattr(use_dual_regions, "table_error", spy)
    whole = FusedStatistics([Range(), Histogram(rate=1), Reservoir(-1, 128, 16)])
    whole.update(value.meta["val"])
    whole.get(Histogram).update(torch.ones(60))
    few = whole.get(Reservoir).sampled().numel()
    sampled_only = context.statistics[value]
    for statistics in (whole, sampled_only):
        context.statistics[value] = statistics
        UseDualRegions(min_gain_db=FOREVER).run(module, context)
    assert seen[0] == 300
    assert 0 < seen[1] <= few


def test_signed_tables_have_the_fine_step_that_their_top_asks_for():
    wanted = signed_dual_region(4, 2, torch.tensor(3.0 / 28))
    assert torch.equal(signed_candidates(4, [2], 3.0)[0].scale, wanted.scale)
