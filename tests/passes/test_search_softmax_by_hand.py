# SPDX-License-Identifier: Apache-2.0
"""Softmax formats on graphs written by hand: what is sampled, what each search sees, what wins."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qgraph.calibration import ChannelHistogram, ChannelRange, Range
from qgraph.calibration.probability_formats import CELLS, Choice
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.formats.dual_region import dual_region
from qgraph.passes import SearchSoftmaxBase, search_softmax_base
from qgraph.passes.search_softmax_base import joint_request
from tests.passes.by_hand import Hand, aten, kinds_asked, normal, told
from tests.passes.two_regions import attention

NAME = SearchSoftmaxBase.name


@pytest.mark.parametrize(
    ("first", "second", "rows", "heads", "kept"),
    [
        ((2, 3, 5, 6), (2, 3, 6, 4), 128, 0, 128),
        ((2, 3, 5, 6), (2, 3, 6, 4), 128, 1, 128),
        ((2, 3, 5, 6), (2, 3, 6, 4), 128, 3, 384),
        ((2, 5, 6), (2, 6, 4), 9, 0, 9),
        ((2, 5, 6), (2, 6, 4), 8, 0, 8),
        ((2, 5, 6), (2, 6, 4), 7, 0, 8),
        ((2, 5, 512), (2, 512, 64), 999, 0, CELLS // 2**15),
        ((2, 5, 512), (2, 512, 1024), 999, 0, 8),
        ((2, 5, 2**16), (2, 2**16, 7), 999, 0, CELLS // (2**16 * 7)),
        ((2, 5, 0), (2, 0, 7), 2 * CELLS, 0, CELLS),
        ((2, 5, 1), (2, 1, 1), 2 * CELLS, 0, CELLS),
        ((2, 3, 5, 6), (2, 1, 6, 4), 128, 0, None),
        ((2, 3, 5, 6), (1, 3, 6, 4), 128, 0, None),
        ((2, 3, 5, 6), (3, 6, 4), 128, 0, None),
        ((5, 6), (6, 4), 128, 0, None),
    ],
)
def test_as_many_rows_are_sampled_as_asked_for_and_as_memory_holds(
    first, second, rows, heads, kept
):
    _, site, soft = attention()
    v = site.edge.consumer.args[1]
    soft.meta["val"], v.meta["val"] = (SimpleNamespace(shape=s) for s in (first, second))
    asked: Any = joint_request(site, rows, heads=heads)
    if kept is None:
        assert asked == "probabilities and values do not share their leading dimensions"
        return
    assert (asked.node, asked.partners) == (soft, (v,))
    wanted = {"leads": (len(first) - 1, len(first) - 2), "rows": kept}
    by_head = {"per_sample": 4 * heads, "index_axis": 1} if heads else {}
    assert dict(asked.options) == wanted | by_head
    assert joint_request(site, rows) == joint_request(site, rows, heads=0)


@pytest.mark.parametrize(
    ("shape", "values", "per_head", "heads"),
    [
        ((2, 3, 5, 6), (2, 3, 6, 4), True, 3),
        ((2, 2, 5, 6), (2, 2, 6, 4), True, 2),
        ((2, 1, 5, 6), (2, 1, 6, 4), True, 0),
        ((2, 3, 5, 6), (2, 3, 6, 4), False, 0),
        ((3, 5, 6), (3, 6, 4), True, 0),
        ((2, 3, 2, 5, 6), (2, 3, 2, 6, 4), True, 0),
    ],
)
def test_heads_get_numbers_of_their_own_only_where_an_axis_tells_them_apart(
    shape, values, per_head, heads
):
    hand, site, _ = attention(shape, values)
    item = SearchSoftmaxBase(per_head=per_head)
    module = hand.module()
    asked = list(item.statistics(module, hand.context(module)))
    found = {r.kind: dict(r.options) for r in asked}
    assert dict(found["JointReservoir"]).get("index_axis") == (1 if heads else None)
    one = {"JointReservoir", "Range", "Histogram"}
    assert set(found) == (one | {"ChannelRange", "ChannelHistogram"} if heads else one)
    if heads:
        assert found["ChannelRange"] == {"axis": 1}
        assert found["ChannelHistogram"] == {"axis": 1, "positions": 1024}
        assert found["JointReservoir"]["rows"] == 128 * heads
    _, context, _ = hand.run(item)
    (line,) = told(context, NAME)
    assert line.numbers["heads"] == heads
    assert (getattr(site.encoding, "axis", None) == 1) is bool(heads)
    assert site.decided_by == NAME


def test_a_number_of_heads_that_is_not_known_is_one_format_for_all():
    hand, site, soft = attention()
    v = site.edge.consumer.args[1]
    soft.meta["val"], v.meta["val"] = (
        SimpleNamespace(shape=s) for s in ((2, "h", 5, 6), (2, "h", 6, 4))
    )
    asked = {k for _, k in kinds_asked(SearchSoftmaxBase(per_head=True), hand)}
    assert asked == {"JointReservoir", "Range", "Histogram"}


def test_only_planned_softmax_operands_on_the_left_are_searched():
    hand, site, _ = attention()
    site.decide(AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=False)), "someone")
    _, context, _ = hand.run(SearchSoftmaxBase())
    assert [(d.outcome, d.reason) for d in told(context, NAME)] == [("kept", "someone has decided")]
    hand, site, _soft = attention((2, 3, 5, 6), (2, 1, 6, 4))
    _, context, _ = hand.run(SearchSoftmaxBase())
    assert [d.outcome for d in told(context, NAME)] == ["refused"]
    assert site.encoding is None
    hand, site, _ = attention()
    hand.plan.remove(site)
    hand.data_site(site.edge.consumer, 1)
    assert not kinds_asked(SearchSoftmaxBase(), hand)
    hand = Hand()
    tanh = hand.call(aten.tanh.default, hand.given("x", normal(2, 5, 6)))
    hand.data_site(hand.call(aten.matmul.default, tanh, hand.given("v", normal(2, 6, 4))))
    assert not kinds_asked(SearchSoftmaxBase(), hand)


def seen_by(name: str, hand: Hand, change: Any, item: SearchSoftmaxBase) -> tuple[list[Any], Any]:
    """The samples that a search is given, after `change` edited the statistics."""
    seen: Any = []
    real = getattr(search_softmax_base, name)
    module = hand.module()
    context = hand.context(module, item)
    change(context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_softmax_base, name,
                      lambda s, *a, **k: (seen.append((s, *a)), real(s, *a, **k))[1])  # fmt: skip
        item.run(module, context)
    return seen, context


def key(site: Any) -> Any:
    return (site.value, site.edge.consumer.args[1])


@pytest.mark.parametrize("known", [0.2, 1.0])
def test_the_peak_is_the_largest_probability_that_anybody_saw(known):
    hand, _, soft = attention()

    def change(context):
        whole = context.statistics[soft]
        whole.get(Range).low, whole.get(Range).high = torch.tensor(0.0), torch.tensor(known)

    ((sample, bits, families),), _ = seen_by("best_by_family", hand, change, SearchSoftmaxBase())
    largest = float(sample.rows.max())
    assert sample.peak == max(known, largest)
    assert 0.2 < largest < 1.0
    assert bits == 4
    assert sample.everywhere.total == pytest.approx(soft.meta["val"].numel(), rel=0.1)
    assert families == SearchSoftmaxBase().formats


@pytest.mark.parametrize("known", [0.01, 1.0])
def test_every_head_is_searched_on_its_own_rows_and_a_silent_one_on_all(known):
    hand, site, soft = attention((4, 3, 5, 6), (4, 3, 6, 4))
    item = SearchSoftmaxBase(per_head=True, attention_rows=64)

    def change(context):
        joint = context.statistics[key(site)].statistics[0]
        rows, _, heads = joint.payloads
        rows[heads.flatten() == 1] = 0.0
        rows[(heads.flatten() == 2).nonzero().flatten()[1:], 0] = 0.0
        peaks = context.statistics[soft].get(ChannelRange)
        peaks.high = torch.tensor([known, known / 2, known])

    ((samples, bits, _),), context = seen_by("best_by_head", hand, change, item)
    rows, values, heads = context.statistics[key(site)].statistics[0].sampled()
    histogram = context.statistics[soft].get(ChannelHistogram)
    assert len(samples) == 3
    assert bits == 4
    for head, sample in enumerate(samples):
        own = heads.flatten() == head if head != 1 else torch.ones(len(heads), dtype=torch.bool)
        assert torch.equal(sample.rows, rows[own])
        assert torch.equal(sample.values, values[own])
        most = known / 2 if head == 1 else known
        assert sample.peak == pytest.approx(max(most, float(rows[own].max())))
        wanted = histogram.permuted(torch.tensor([head])).bins()
        assert torch.equal(sample.everywhere.mass, wanted.mass)
        assert torch.equal(sample.everywhere.left, wanted.left)


@pytest.mark.parametrize("how", ["no rows", "only zeros", "one zero"])
def test_probabilities_that_were_never_above_zero_are_refused(how):
    hand, site, _ = attention()
    module, item = hand.module(), SearchSoftmaxBase()
    context = hand.context(module, item)
    joint: Any = context.statistics[key(site)].statistics[0]
    if how == "no rows":
        joint.priority.fill_((1 << 63) - 1)
    elif how == "only zeros":
        joint.payloads[0].zero_()
    else:
        joint.payloads[0][:, 0] = 0.0
    if how == "no rows":
        joint.sampled = lambda: (torch.zeros(0, 6), torch.zeros(0, 6, 4))
    item.run(module, context)
    (line,) = told(context, NAME)
    assert (line.outcome == "refused") is (how != "one zero")
    assert (site.encoding is None) is (how != "one zero")


def choice(family: str, error: float) -> Choice:
    uniform = AffineEncoding.per_tensor(0.1, 0, IntGrid(4, signed=False))
    return Choice(error, family, uniform if family == "uniform" else dual_region(4, 2), family)


GAIN = 10.0  # of an error ten times smaller


@pytest.mark.parametrize(
    ("errors", "least", "winner", "gain"),
    [
        ({"uniform": 1.0, "power_of_two": 0.1, "dual_region": 0.5}, 0.0, "power_of_two", GAIN),
        ({"uniform": 1.0, "power_of_two": 0.5, "dual_region": 0.1}, 0.0, "dual_region", GAIN),
        ({"uniform": 0.1, "power_of_two": 0.5, "dual_region": 1.0}, 0.0, "uniform", 0.0),
        ({"uniform": 1.0, "power_of_two": 0.1}, GAIN, "power_of_two", GAIN),
        ({"uniform": 1.0, "power_of_two": 0.1}, math.nextafter(GAIN, 99), "uniform", 0.0),
        ({"power_of_two": 1.0, "uniform": 1.0}, 0.0, "uniform", 0.0),
        ({"power_of_two": 1.0, "uniform": 1.0}, -99.0, "uniform", 0.0),
        ({"power_of_two": 1.0, "dual_region": 0.5}, 50.0, "dual_region", 0.0),
        ({"dual_region": 0.5}, 0.0, "dual_region", 0.0),
    ],
)
def test_the_smallest_error_wins_where_it_beats_the_uniform_format_by_enough(
    errors, least, winner, gain, monkeypatch
):
    found = {family: choice(family, error) for family, error in errors.items()}
    monkeypatch.setattr(search_softmax_base, "best_by_family", lambda *_: found)
    hand, site, _ = attention()
    _, context, changed = hand.run(SearchSoftmaxBase(min_gain_db=least))
    assert changed == [False]
    (line,) = told(context, NAME)
    assert site.encoding is found[winner].encoding
    assert line.outcome == ("kept" if winner == "uniform" else "applied")
    assert line.numbers["gain_db"] == pytest.approx(gain)
    assert line.numbers["bits"] == 4
    assert {f: line.numbers[f"error_{f}"] for f in errors} == errors
    said = "dB below uniform" in line.reason
    assert said is ("uniform" in errors and winner != "uniform")


def test_families_are_checked():
    for good in ((), ("uniform",), ("power_of_two", "dual_region")):
        SearchSoftmaxBase(formats=good)
    with pytest.raises(ConfigError):
        SearchSoftmaxBase(formats=("uniform", "none"))
