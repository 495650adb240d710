# SPDX-License-Identifier: Apache-2.0
"""What two regions ask for, the candidates, and the scores that choose among them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Node

from qgraph.calibration.output_ranges import sketch
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region, shift_of
from qgraph.passes import (
    BalanceChannels,
    ChooseRanges,
    ReorderChannels,
    UseDualRegions,
)
from qgraph.passes.choose_ranges import relative_power
from qgraph.passes.use_dual_regions import (
    SILENT,
    attention_score,
    best_affine,
    joint_request,
    linear_score,
    matched,
    rectified_candidates,
    row_weights,
    shortlist,
    signed_candidates,
)
from tests.passes.by_hand import Hand, aten, kinds_asked, normal
from tests.passes.two_regions import activated, attention

NAME = UseDualRegions.name
FOREVER = float("inf")


def meta(node: Node, *shape: object) -> None:
    """Only a shape, which may hold symbols."""
    node.meta["val"] = SimpleNamespace(shape=shape)


@pytest.mark.parametrize(
    ("first", "second", "rows", "kept", "leads"),
    [
        ((2, 3, 5, 6), (2, 3, 6, 4), 128, 512, (3, 2)),
        ((2, 5, 6), (2, 6, 4), 128, 512, (2, 1)),
        ((2, 5, 6), (2, 6, 4), 2, 8, (2, 1)),
        ((2, 5, 6), (2, 6, 4), 1, None, None),
        ((2, 5, 512), (2, 512, 64), 128, 8, (2, 1)),
        ((2, 5, 512), (2, 512, 65), 128, None, None),
        ((2, 5, 512), (2, 512, 32), 128, 16, (2, 1)),
        ((2, 5, 0), (2, 0, 4), 128, 512, (2, 1)),
        ((2, 5, 1), (2, 1, 1), 1 << 20, 1 << 18, (2, 1)),
        (("s0", 5, 512), ("s0", 512, "s1"), 128, 8, (2, 1)),
        (("s0", 5, 513), ("s0", 513, "s1"), 128, None, None),
        (("s0", 5, "s1"), ("s0", "s1", 512), 128, 8, (2, 1)),
        (("s0", 5, 6), ("s1", 6, 4), 128, None, None),
        ((2, 3, 5, 6), (2, 1, 6, 4), 128, None, None),
        ((2, 3, 5, 6), (1, 3, 6, 4), 128, None, None),
        ((2, 3, 5, 6), (3, 6, 4), 128, None, None),
        ((5, 6), (6, 4), 128, None, None),
    ],
)
def test_rows_of_an_attention_are_sampled_with_their_values_as_many_as_memory_holds(
    first, second, rows, kept, leads
):
    _, site, soft = attention()
    meta(soft, *first)
    meta(site.edge.consumer.args[1], *second)
    asked: Any = joint_request([site], rows)
    if kept is None:
        assert asked is None
    else:
        assert asked.node is soft
        assert asked.partners == (site.edge.consumer.args[1],)
        assert dict(asked.options) == {"leads": leads, "per_sample": 8, "rows": kept}


def test_only_the_left_operand_of_one_product_of_two_values_is_sampled_jointly():
    hand, site, soft = attention()
    assert joint_request([site], 8) is not None
    assert joint_request([site, site], 8) is None
    v = site.edge.consumer.args[1]
    turned = hand.call(aten.transpose.int, v, -1, -2)
    right = hand.data_site(hand.call(aten.matmul.default, turned, hand.call(
        aten.transpose.int, soft, -1, -2)), 1)  # fmt: skip
    assert joint_request([right], 8) is None
    left = hand.data_site(right.edge.consumer)
    assert joint_request([left], 8) is None, "the left operand is no softmax"
    table = hand.stored("table", normal(2, 3, 6, 4))
    assert joint_request([hand.data_site(hand.call(aten.matmul.default, soft, table))], 8) is None
    layer = hand.linear(soft, normal(4, 6))
    assert joint_request([hand.data_site(layer)], 8) is None


def cases() -> dict[str, tuple[Hand, set[str]]]:
    """Graphs, and the statistics of `value` or `soft` that they need."""
    both = {"Range", "JointReservoir", "Histogram"}
    found = {"attention": (attention()[0], both)}
    hand, _, soft = attention()
    hand.data_site(hand.linear(soft, normal(4, 6)))
    found["attention with a linear"] = (hand, {"Range", "Histogram"})
    hand = Hand()
    soft = hand.call(aten.softmax.int, hand.given("x", normal(3, 6)), -1, name="soft")
    hand.data_site(hand.linear(soft, normal(4, 6)))
    found["no attention"] = (hand, set())
    found["gelu"] = (activated()[0], {"Range", "Reservoir"})
    found["relu"] = (activated(aten.relu.default)[0], {"Range", "Reservoir"})
    found["tanh"] = (activated(aten.tanh.default)[0], set())
    hand = Hand()
    value = hand.call(aten.gelu.default, hand.given("x", normal(3, 6)), name="value")
    hand.data_site(hand.call(aten.matmul.default, value, hand.given("y", normal(6, 4))))
    found["gelu before a product of values"] = (hand, {"Range", "Histogram"})
    hand = Hand()
    value = hand.call(aten.gelu.default, hand.given("x", normal(3, 6)), name="value")
    hand.data_site(hand.call(aten.add.Tensor, value, hand.given("y", normal(3, 6))))
    found["gelu before a sum"] = (hand, set())
    return found


@pytest.mark.parametrize("name", cases())
def test_each_kind_of_value_asks_for_what_its_score_needs(name):
    hand, wanted = cases()[name]
    asked = kinds_asked(UseDualRegions(), hand)
    assert {kind for _, kind in asked} == wanted
    assert {node for node, _ in asked} <= {"value", "soft"}


def test_rows_are_asked_for_as_other_passes_do_so_that_they_are_kept_once():
    hand, sites, _ = activated()
    sites[0].axis = None
    module = hand.module()
    context = hand.context(module)
    asked = [
        [r for r in item.statistics(module, context) if r.kind == "Reservoir"]
        for item in (UseDualRegions(), ReorderChannels(), BalanceChannels(), ChooseRanges())
    ]
    assert all(each[0] == asked[0][0] for each in asked)
    assert dict(asked[0][0].options) == {"axis": -1, "rows": 128, "per_sample": 16}
    for site in sites:
        site.axis = 1
    (request,) = [r for r in UseDualRegions().statistics(module, context) if r.kind == "Reservoir"]
    assert dict(request.options)["axis"] == 1


def test_only_products_are_matched_and_only_where_undecided():
    hand, sites, value = activated()
    total = hand.data_site(hand.call(aten.add.Tensor, value, value), bits=4)
    context = hand.context(hand.module())
    assert matched(context) == {(value, 4): sites}
    sites[0].bits = 5
    assert matched(context) == {(value, 5): sites[:1], (value, 4): sites[1:]}
    sites[1].decide(AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=False)), "test")
    assert matched(context) == {(value, 5): sites[:1]}
    _, context, _ = hand.run(UseDualRegions(force=("*",)))
    assert sites[0].decided_by == NAME
    assert total.encoding is None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6))
def test_the_attention_score_is_the_relative_error_of_outputs(seed, bits, keys):
    rows = normal(7, keys, seed=seed).softmax(-1)
    values = normal(7, keys, 3, seed=seed + 1)
    encoding = dual_region(bits, 1)
    a, v = rows.double().numpy(), values.double().numpy()
    off = np.einsum("ns,nsd->nd", encoding.fake(rows).double().numpy() - a, v)
    whole = np.einsum("ns,nsd->nd", a, v)
    wanted = (off**2).sum() / (whole**2).sum()
    assert attention_score(rows, values)(encoding) == pytest.approx(wanted, rel=1e-4)
    zero = attention_score(rows, 0 * values)
    assert zero(encoding) == 0.0
    nothing = attention_score(0 * rows, values)(
        AffineEncoding.per_tensor(1.0, 0, IntGrid(2, signed=False))
    )
    assert nothing == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 5, 64, 65, 90]), st.sampled_from([0.0, 1.0, 1.5]))
def test_the_linear_score_is_the_weighted_relative_error_of_outputs(seed, outputs, power):
    rows, weight = 2 * normal(9, 6, seed=seed), normal(outputs, 6, seed=seed + 1)
    encoding = AffineEncoding.per_tensor(0.7, 3, IntGrid(4, signed=False))
    factor = sketch(weight, 64).double().numpy()
    assert len(factor) == min(outputs, 64)
    x = rows.double().numpy()
    energy = ((x @ factor.T) ** 2).sum(1)
    loud = energy[energy > energy.max() * SILENT]
    middle = np.sort(loud)[(len(loud) - 1) // 2]
    importance = (middle / (energy + middle)) ** power
    error = (((encoding.fake(rows).double().numpy() - x) @ factor.T) ** 2).sum(1)
    wanted = (error * importance).sum() / (energy * importance).sum()
    assert linear_score(rows, weight, power)(encoding) == pytest.approx(wanted, rel=1e-3)


def test_scores_of_silent_layers_are_errors_themselves():
    rows = torch.zeros(4, 3)
    shifted = LevelEncoding.nearest(
        "shifted", torch.tensor(1.0), torch.tensor([1, 2]), storage_bits=1
    )
    assert linear_score(rows, torch.ones(2, 3), 0.0)(shifted) == 4 * 2 * 9
    assert attention_score(rows, torch.ones(4, 3, 2))(shifted) == 4 * 2 * 9


@pytest.mark.parametrize(
    ("energy", "middle"),
    [
        ([4.0, 1.0, 2.0], 2.0),
        ([4.0, 1.0, 2.0, 3.0], 2.0),
        ([0.0, 0.0, 0.0, 5.0, 6.0, 7.0], 6.0),
        ([1e-8, 1e-8, 1e-8, 1.0], 1.0),
        ([2e-8, 2e-8, 2e-8, 1.0], 2e-8),
        ([4e-36, 1e-36, 2e-36], 2e-36),
    ],
)
def test_the_middle_row_that_counts_weighs_half(energy, middle):
    given_energy = torch.tensor(energy)
    found = row_weights(given_energy, 2.0)
    wanted = [(middle / (e + middle)) ** 2 for e in given_energy.double().tolist()]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_rows_weigh_alike_where_all_are_silent():
    assert row_weights(torch.zeros(3), 1.5).tolist() == [1.0, 1.0, 1.0]


@given(st.integers(2, 8), st.floats(1e-3, 1e4), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_candidates_are_every_split_at_ten_clips_a_quarter_octave_apart(bits, high, most):
    shifts = range(min(most, 15 - bits + 1) + 1)
    for make, kind in ((signed_candidates, "signed"), (rectified_candidates, "plain")):
        found = make(bits, shifts, high)
        tops = [float(c.scale) * int(c.levels[-1]) for c in found]
        wanted = [high * 2 ** (-k / 4) for _ in shifts for k in range(10)]
        assert tops == pytest.approx(wanted, rel=1e-5), kind
        if kind == "signed":
            assert [shift_of(c) for c in found] == [s for s in shifts for _ in range(10)]
    for make in (signed_candidates, rectified_candidates):
        (lowest,) = {float(c.scale) * int(c.levels[-1]) for c in make(4, [0], 0.0)[:1]}
        assert lowest == pytest.approx(1e-6, rel=1e-5)


def test_the_shortlist_holds_the_best_split_of_every_clip_the_first_of_equals():
    found = rectified_candidates(4, range(4), 3.0)
    expected = torch.rand(40, generator=torch.Generator().manual_seed(0))
    expected[13] = expected[23] = -1.0  # clip 3, splits 1 and 2
    short = shortlist(found, expected)
    by_clip = [[found[10 * s + c] for s in range(4)] for c in range(10)]
    scores = expected.reshape(4, 10).T
    assert len(short) == 10
    for each, own, score in zip(short, by_clip, scores, strict=True):
        assert each is own[score.tolist().index(score.min())]
    assert short[3] is found[13]


@pytest.mark.parametrize(("low", "high"), [(2.0, 3.0), (-3.0, -2.0), (-1.0, 3.0)])
def test_zero_is_inside_every_affine_rival(low, high):
    tried = []

    def score(encoding: object) -> float:
        assert isinstance(encoding, AffineEncoding)
        tried.append(encoding)
        return 1.0

    assert best_affine(score, low, high, 4) == (min(low, 0.0), max(high, 0.0))
    step = (max(high, 0.0) - min(low, 0.0)) / 15
    assert max(float(e.scale) for e in tried) == pytest.approx(step, rel=0.1)


def test_errors_are_relative_only_where_every_reader_is_normalised():
    hand, sites, _ = activated()
    weight, bias = hand.stored("g", torch.ones(5)), hand.stored("b", torch.zeros(5))
    for site in sites[:1]:
        hand.call(aten.layer_norm.default, site.edge.consumer, [5], weight, bias)
    hand.call(aten.tanh.default, sites[1].edge.consumer)
    assert relative_power(sites[:1]) == 1.5
    assert relative_power(sites[1:]) == 0.0
    assert relative_power(sites) == 0.0
