# SPDX-License-Identifier: Apache-2.0
"""Codes read as levels, channel axes through moves, and exact products, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qgraph.backends.arithmetic import Clamp, code_limits
from qgraph.backends.bounds import (
    FLOAT32_EXACT,
    OPEN_LENGTH,
    contraction_length,
    dynamic_bound,
    largest,
    magnitude,
    static_bound,
    total_range,
)
from qgraph.backends.levels import Levels, is_blocked, is_per_tensor, moved_axis, same_encoding
from qgraph.backends.products import MAX_GROUPS, contraction_axis_of_weight, operands
from qgraph.backends.semantics import analyze, clamp_bounds, is_function
from qgraph.backends.tables import all_codes, lookup
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from qgraph.passes import InsertQuantizers
from tests.passes.by_hand import Hand, aten, normal

U4, S4 = IntGrid(4, signed=False), IntGrid(4, signed=True)


def affine(
    scale: Any, zero: Any = 0, axis: int | None = None, grid: IntGrid = U4, block: int | None = None
) -> AffineEncoding:
    held = torch.as_tensor(scale, dtype=torch.float32)
    return AffineEncoding(
        scale=held, zero_point=torch.as_tensor(zero, dtype=torch.int32).expand(held.shape).clone(),
        qmin=grid.qmin, qmax=grid.qmax, axis=axis, block=block,
    )  # fmt: skip


REGIONS = dual_region(4, 2)
ENCODINGS: dict[str, Any] = {
    "tensor": affine(0.5, 3),
    "signed": affine(0.5, -2, grid=S4),
    "channel": affine([0.5, 0.25, 1.0], [1, 7, 15], axis=1),
    "one channel": affine([0.5], [4], axis=1),
    "table": REGIONS,
    "table by channel": LevelEncoding(
        scale=torch.tensor([0.5, 0.25, 1.0]), levels=REGIONS.levels,
        thresholds=REGIONS.thresholds, name="table", storage_bits=4, axis=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_levels_times_scale_are_the_values_that_the_format_decodes(name):
    encoding = ENCODINGS[name]
    per_tensor = name in {"tensor", "signed", "one channel", "table"}
    assert is_per_tensor(encoding) is per_tensor
    levels = Levels.of(encoding, 3)
    assert levels.axis == (None if per_tensor else 1)
    assert levels.scale.shape == (() if per_tensor else (3,))
    low, high = levels.codes()
    channels = 1 if name == "one channel" else 3
    codes = torch.arange(low, high + 1)[:, None, None].expand(-1, channels, 2)
    codes = codes.to(torch.int8 if low < 0 else torch.uint8)
    found = levels.of_codes(codes)
    assert found.dtype == torch.int32
    assert levels.range()[0] == int(found.min())
    assert levels.range()[1] == int(found.max())
    assert torch.equal(levels.values(codes), encoding.decode(codes))
    assert levels.bits == 4
    assert torch.equal(all_codes(levels), torch.arange(low, high + 1, dtype=torch.int32))
    if per_tensor:
        table = all_codes(levels) * 10
        assert torch.equal(lookup(table, codes, levels), codes.to(torch.int32) * 10)


def test_a_range_of_levels_counts_every_zero_point():
    assert Levels.of(affine([1.0, 1.0], [3, 9], axis=0), 1).range() == (-9, 12)
    assert Levels.of(affine(1.0, -2, grid=S4), 1).range() == (-6, 9)
    assert Levels.of(affine([1.0, 1.0], axis=-1), 4).axis == 3
    assert Levels.of(affine([1.0, 1.0], axis=-2), 4).axis == 2


def test_encodings_are_the_same_where_all_their_numbers_are():
    base = {"scale": [0.5, 1.0], "zero": [1, 2], "axis": 0, "grid": U4}
    others = ({"scale": [0.5, 2.0]}, {"zero": [1, 3]}, {"axis": 1}, {"grid": S4},
              {"grid": IntGrid(5, signed=False)})  # fmt: skip
    first = affine(**base)  # type: ignore[arg-type]
    assert same_encoding(first, first)
    assert same_encoding(first, affine(**base))  # type: ignore[arg-type]
    for other in others:
        assert not same_encoding(first, affine(**{**base, **other}))  # type: ignore[arg-type]

    def table(**change: Any) -> LevelEncoding:
        held = {"scale": torch.tensor(0.5), "levels": torch.tensor([0, 1, 3]),
                "thresholds": torch.tensor([0.5, 2.0]), "axis": None}  # fmt: skip
        return LevelEncoding(name="t", storage_bits=2, **{**held, **change})

    assert same_encoding(table(), table())
    assert not same_encoding(table(), first)
    assert not same_encoding(first, table())
    for change in ({"scale": torch.tensor(0.25)}, {"levels": torch.tensor([0, 1, 4])},
                   {"thresholds": torch.tensor([0.5, 2.5])}):  # fmt: skip
        assert not same_encoding(table(), table(**change))
    blocked = affine([[1.0, 2.0]], axis=1, block=2)
    assert is_blocked(blocked)
    assert not is_blocked(first)
    assert not is_per_tensor(affine([[1.0]], axis=1, block=4))


MOVES: list[tuple[Any, tuple[Any, ...], set[int]]] = [
    (aten.permute.default, ([2, 0, 3, 1],), set()),
    (aten.permute.default, ([-1, -3, 0, -2],), set()),
    (aten.transpose.int, (1, 3), set()),
    (aten.transpose.int, (-1, 0), set()),
    (aten.transpose.int, (-2, -3), set()),
    (aten.clone.default, (), set()),
    (aten.unsqueeze.default, (0,), set()),
    (aten.unsqueeze.default, (2,), set()),
    (aten.view.default, ([2, 3, 20],), {2, 3}),
    (aten.view.default, ([6, 4, 5],), {0, 1}),
    (aten.view.default, ([2, 12, 5],), {1, 2}),
    (aten.view.default, ([2, 3, 2, 2, 5],), {2}),
    (aten.view.default, ([120],), {0, 1, 2, 3}),
    (aten.view.default, ([1, 2, 3, 4, 5],), set()),
    (aten.slice.Tensor, (1, 0, 2), {1}),
    (aten.slice.Tensor, (-1, 1, 5), {3}),
    (aten.slice.Tensor, (0, 1), {0}),
    (aten.select.int, (1, 2), {1}),
    (aten.select.int, (-1, 0), {3}),
    (aten.select.int, (0, 1), {0}),
    (aten.flip.default, ([1],), {0, 1, 2, 3}),
    (aten.roll.default, ([1], [2]), {0, 1, 2, 3}),
]


@pytest.mark.parametrize(("target", "rest", "lost"), MOVES)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_a_channel_axis_is_followed_to_where_its_channels_are(target, rest, lost, axis):
    shape = (2, 3, 4, 5)
    place = torch.arange(shape[axis]).view(*(-1 if d == axis else 1 for d in range(4)))
    hand = Hand()
    node = hand.call(target, hand.given("x", place.expand(shape).float().clone()), *rest)
    followed, now = moved_axis(node, axis)
    assert followed is (axis not in lost)
    assert moved_axis(node, None) == (True, None)
    if followed:
        assert now is not None
        moved = node.meta["val"].movedim(now, 0)
        assert len(moved) == shape[axis]
        for channel, part in enumerate(moved):
            assert bool((part == channel).all())


def test_one_row_of_a_table_serves_all_elements_and_several_values_have_no_axis():
    one, two = (
        LevelEncoding(
            scale=torch.ones(n), levels=REGIONS.levels.expand(n, -1),
            thresholds=REGIONS.thresholds.expand(n, -1), name="t", storage_bits=4, axis=1,
        )
        for n in (1, 2)
    )  # fmt: skip
    assert is_per_tensor(one)
    assert not is_per_tensor(two)
    hand = Hand()
    split = hand.graph.call_function(aten.chunk.default, (hand.given("x", normal(4, 4)), 2))
    split.meta["val"] = list(normal(4, 4).chunk(2))
    assert moved_axis(hand.graph.call_function(aten.clone.default, (split,)), 0) == (False, None)


def test_a_matrix_is_turned_with_its_channels():
    hand = Hand()
    node = hand.call(aten.t.default, hand.given("x", normal(2, 3)))
    assert [moved_axis(node, axis) for axis in (0, 1)] == [(True, 1), (True, 0)]


CONV, UP = aten.conv1d.default, aten.conv_transpose1d.default
LINEAR, MATMUL = aten.linear.default, aten.matmul.default
SIX = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) / 7
FREE = torch.tensor([1.0, 3.0, 1.0, 5.0])
CASES: list[tuple[Any, ...]] = [
    # op, data, weight, their encodings, further arguments, groups of free scales or what is refused
    (LINEAR, (3, 4), (6, 4), affine(0.5, 3), affine(0.25, 0, grid=S4), (), 0),
    (LINEAR, (2, 3, 4), (6, 4), affine(0.5, 3), affine(SIX, 0, 0, S4), (), 0),
    (LINEAR, (2, 3, 4), (6, 4), affine(0.5, 3), affine(SIX, 0, -2, S4), (), 0),
    (LINEAR, (3, 6), (6, 6), affine(0.5, 3), affine(SIX, 0, 1, S4), (), "output channels"),
    (LINEAR, (3, 4), (6, 4), affine([1.0, 2.0, 0.5, 4.0], 3, -1), affine(SIX, 0, 0, S4), (), 0),
    (LINEAR, (3, 4), (6, 4), affine(FREE, 3, -1), affine(SIX, 0, 0, S4), (), 3),
    (LINEAR, (3, 4), (6, 4), affine([1.0, 1.0, 1.0], 3, 0), affine(0.5, 0, grid=S4), (), "foreign"),
    (LINEAR, (3, 17), (6, 17), affine(torch.arange(17) + 10.0, 3, 1), affine(1.0, 0, grid=S4), (),
     "17 free scales"),
    (LINEAR, (3, 16), (6, 16), affine(torch.arange(16) + 10.0, 3, 1), affine(1.0, 0, grid=S4), (),
     16),
    (LINEAR, (3, 2), (6, 2), affine([1.0, 2.0**24], 3, 1), affine(1.0, 0, grid=S4), (), 0),
    (LINEAR, (3, 2), (6, 2), affine([1.0, 2.0**25], 3, 1), affine(1.0, 0, grid=S4), (), 2),
    (CONV, (2, 4, 7), (6, 4, 3), affine(0.5, 3), affine(SIX, 0, 0, S4), (), 0),
    (CONV, (2, 4, 7), (6, 2, 3), affine(0.5, 3), affine(SIX, 0, 0, S4), ([2], [1], [1], 2), 0),
    (CONV, (2, 4, 7), (6, 4, 3), affine([1.0, 2.0, 0.5, 4.0], 3, 1), affine(SIX, 0, 0, S4), (), 0),
    (CONV, (2, 4, 7), (6, 4, 3), affine(FREE, 3, 1), affine(SIX, 0, 0, S4), ([2], [1]), 3),
    (CONV, (2, 4, 7), (6, 2, 3), affine(FREE, 3, 1), affine(SIX, 0, 0, S4), ([2], [1], [1], 2),
     "grouped convolution"),
    (UP, (2, 4, 7), (4, 6, 3), affine(0.5, 3), affine(SIX, 0, 1, S4), ([2],), 0),
    (UP, (2, 4, 7), (4, 6, 3), affine(0.5, 3), affine(SIX, 0, 1, S4), ([2], [1], [1], 2), 0),
    (UP, (2, 4, 7), (4, 6, 3), affine([1.0, 2.0, 0.5, 4.0], 3, 1), affine(SIX, 0, 1, S4), (), 0),
    (UP, (2, 6, 7), (6, 6, 3), affine(0.5, 3), affine(SIX, 0, 0, S4), (), "output channels"),
    (MATMUL, (2, 3, 4), (4, 6), affine(0.5, 3), affine(SIX, 0, 1, S4), (), 0),
    (MATMUL, (2, 3, 4), (4, 6), affine(0.5, 3), affine(SIX, 0, -1, S4), (), 0),
    (MATMUL, (2, 3, 4), (4, 6), affine(FREE, 3, 2), affine(SIX, 0, 1, S4), (), 3),
    (MATMUL, (2, 3, 4), (4, 6), affine([1.0, 2.0, 5.0], 3, 1), affine(0.5, 0, grid=S4), (), 0),
    (MATMUL, (2, 3, 6), (6, 4), affine(0.5, 3), affine(SIX, 0, 0, S4), (), "along the contraction"),
    (MATMUL, (2, 3, 4), (2, 4, 6), affine([1.0, 3.0], 3, 0), affine([2.0, 5.0], 0, 0, S4), (), 0),
    (LINEAR, (3, 4), (6, 4), affine(0.5, 3), affine(torch.rand(6, 2) + 1, 0, 1, S4, 2), (),
     "not quantized"),
]  # fmt: skip


def product(case: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    target, data, weight, x_coded, w_coded, rest, _ = case
    hand = Hand()
    x, w = hand.given("x", 3 * normal(*data)), hand.stored("w", normal(*weight, seed=1))
    node = hand.call(target, x, w, *([None, *rest] if target is not MATMUL else rest))
    hand.data_site(node).decide(x_coded, "test")
    hand.weight_site(node).decide(w_coded, "test")
    module, _, _ = hand.run(InsertQuantizers())
    return analyze(module), node, hand


@pytest.mark.parametrize("case", CASES, ids=[str(n) for n in range(len(CASES))])
def test_a_product_is_an_integer_times_one_scale_or_is_refused_with_the_reason(case):
    target, _, _, x_coded, w_coded, _rest, wanted = case
    found, node, _ = product(case)
    if isinstance(wanted, str):
        assert node not in found.products
        assert wanted in found.reasons[node]
        return
    form = found.products[node]
    assert len(form.groups) == wanted <= MAX_GROUPS
    x, w = 3 * normal(*case[1]), normal(*case[2], seed=1)
    ints = form.data.of_codes(x_coded.encode(x)).double()
    weights = form.weight.of_codes(w_coded.encode(w)).double()
    assert torch.equal(form.weight_levels.double(), weights)
    assert form.channel_axis == (1 if target in {CONV, UP} else -1)
    values = [x_coded.fake(x).double(), w_coded.fake(w).double()]
    exact = form.call(*values)
    axis = 1 if target in {CONV, UP} else ints.ndim - 1
    if form.shift is not None:
        along = form.shift.view(*(-1 if d == axis else 1 for d in range(ints.ndim)))
        ints = ints * 2.0 ** along.double()
    assert (form.shift is not None) is (x_coded.axis is not None and wanted == 0 and
                                        x_coded.axis % ints.ndim == axis)  # fmt: skip
    if not form.groups:
        accumulator = form.call(ints, weights)
        assert float(accumulator.abs().max()) <= form.bound
        assert form.exact_dtype is (torch.float32 if form.bound < FLOAT32_EXACT else torch.float64)
        assert torch.allclose(accumulator * form.scale.double(), exact, rtol=1e-5, atol=1e-5)
        return
    total = torch.zeros_like(exact)
    for members, scale in zip(form.groups, form.group_scales, strict=True):
        mask = torch.zeros(ints.shape[axis], dtype=torch.float64)
        mask[members] = 1.0
        part = ints * mask.view(*(-1 if d == axis else 1 for d in range(ints.ndim)))
        total = total + form.call(part, weights) * scale.double()
    assert torch.allclose(total, exact, rtol=1e-5, atol=1e-5)
    assert sorted(int(i) for m in form.groups for i in m) == list(range(ints.shape[axis]))


@pytest.mark.parametrize(("kind", "axis"), [(LINEAR, 1), (CONV, 1), (UP, 0), (MATMUL, 0)])
def test_the_contracted_axis_of_a_weight_is_where_data_channels_meet_it(kind, axis):
    case = next(c for c in CASES if c[0] is kind)
    _, node, hand = product(case)
    assert contraction_axis_of_weight(node, len(case[2])) == axis
    if kind is MATMUL:
        assert [contraction_axis_of_weight(node, n) for n in (1, 2, 3)] == [0, 0, 1]
    data, weight, bias = operands(node)
    assert bias is None
    assert data is node.args[0]
    assert weight is node.args[1]
    assert contraction_length(node, 0) == node.args[0].meta["val"].shape[-1]
    del hand


def test_bounds_of_two_computed_operands_count_their_common_length():
    hand = Hand()
    x, y = hand.given("x", normal(2, 3, 5)), hand.given("y", normal(2, 5, 4))
    node = hand.call(MATMUL, x, y)
    hand.data_site(node).decide(affine(0.5, 3), "test")
    hand.data_site(node, 1).decide(affine(0.25, 8), "test")
    found = analyze(hand.run(InsertQuantizers())[0])
    form = found.products[node]
    assert form.bound == 5 * 12 * 8 == dynamic_bound(5, (-3, 12), (-8, 7))
    assert form.weight_levels is None
    assert float(form.scale) == 0.125
    assert largest(7) == 7
    assert OPEN_LENGTH == 1048576


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bounds_sum_over_all_axes_but_one(axis):
    weight = torch.arange(-11, 13).reshape(2, 3, 4)
    rows = [[int(v) for v in part.flatten()] for part in weight.movedim(axis, 0)]
    for data in ((-3, 12), (-9, 2), (0, 5), (2, 5), (-7, -1)):
        most = max(abs(data[0]), abs(data[1]))
        assert magnitude(data) == most
        assert static_bound(weight, axis, data, None) == max(sum(map(abs, r)) for r in rows) * most
        bias = torch.arange(len(rows)) * 10 - 25
        wanted = max(sum(map(abs, r)) * most + abs(int(b)) for r, b in zip(rows, bias, strict=True))
        assert static_bound(weight, axis, data, bias) == wanted
        low, high = total_range(weight, axis, data)
        for n, row in enumerate(rows):
            ends = [min(data[0], 0), max(data[1], 0)]
            assert float(low[n]) == sum(min(w * e for e in ends) for w in row)
            assert float(high[n]) == sum(max(w * e for e in ends) for w in row)


def test_ops_that_only_clamp_tell_their_bounds():
    hand, inf = Hand(), float("inf")
    x = hand.given("x", normal(3))
    low = hand.given("low", torch.tensor(0.5))
    for target, rest, wanted in (
        (aten.relu.default, (), (0.0, inf)), (aten.relu6.default, (), (0.0, 6.0)),
        (aten.hardtanh.default, (), (-1.0, 1.0)), (aten.hardtanh.default, (-2, 3), (-2.0, 3.0)),
        (aten.clamp.default, (-1, 2), (-1.0, 2.0)), (aten.clamp.default, (None, 2), (-inf, 2.0)),
        (aten.clamp.default, (1,), (1.0, inf)), (aten.clamp_min.default, (1,), (1.0, inf)),
        (aten.clamp_max.default, (1,), (-inf, 1.0)), (aten.tanh.default, (), None),
    ):  # fmt: skip
        node = hand.call(target, x, *rest)
        assert clamp_bounds(node) == wanted
        assert is_function(node)
    for number in (1, 2.5):
        assert is_function(hand.call(aten.mul.Tensor, x, number))
    assert not is_function(hand.call(aten.mul.Tensor, x, low))
    assert not is_function(hand.call(aten.softmax.int, x, 0))
    bounded = hand.graph.call_function(aten.clamp.default, (x, low))
    assert clamp_bounds(bounded) is None


def test_clamps_add_up_and_become_codes():
    inf = float("inf")
    for a, b, c, d in itertools.product((-inf, -2.0, 1.0), (-1.0, 2.0), (-3.0, 0.0), (0.5, inf)):
        if a > b:
            continue
        found = Clamp(a, b).then(c, d)
        for v in (-5.0, -1.5, 0.2, 0.7, 1.5, 5.0):
            twice = min(max(min(max(v, a), b), c), d)
            assert min(max(v, found.low), found.high) == twice
    assert Clamp().is_open
    assert not Clamp(0.0).is_open
    target = affine([0.5, 0.25], [3, 8], axis=1)
    low, high = code_limits(Clamp(-1.0, 1.0), target, 2)
    assert (low.flatten().tolist(), high.flatten().tolist()) == ([1, 4], [5, 12])
    assert low.shape == (1, 2)
    low, high = code_limits(Clamp(), target, 2)
    assert (low.flatten().tolist(), high.flatten().tolist()) == ([0, 0], [15, 15])
    low, high = code_limits(Clamp(-100.0, 100.0), target, 2)
    assert (low.flatten().tolist(), high.flatten().tolist()) == ([0, 0], [15, 15])
    assert isinstance(low, Tensor)
