# SPDX-License-Identifier: Apache-2.0
"""Which search a table of thresholds gets, right at the limits of each."""

from __future__ import annotations

import itertools

import pytest
import torch

from qgraph.backends.integer.ranking import LARGEST_TABLE, half_steps
from qgraph.backends.onnx.levels import Runs, level_runs, padded, threshold_cells, threshold_runs
from qgraph.formats import LevelEncoding


def runs(*cuts: float) -> Runs | None:
    return threshold_runs(torch.tensor(cuts))


def test_runs_end_nearest_zero_and_step_by_powers_of_two() -> None:
    assert runs(0.5, 1.5, 2.5) == Runs((0.5,), (1.0,), (3,))
    assert runs(-2.5, -1.5, -0.5) == Runs((-0.5,), (1.0,), (3,))
    assert runs(-6, -2, 0, 0.5, 1) == Runs((-2, 0), (4.0, 0.5), (2, 3))
    assert runs(1, 3, 5, 6, 7) == Runs((1, 6), (2.0, 1.0), (3, 2))
    assert runs(7) == Runs((7,), (1.0,), (1,))
    assert runs(0, 3, 6) is None  # steps of three
    assert runs(0, 0.25) is None  # quarters
    assert runs(-0.5, 0.5) == Runs((-0.5, 0.5), (1.0, 1.0), (1, 1))


def test_four_runs_are_counted_and_five_are_not() -> None:
    assert runs(1, 2, 4, 6, 10, 14, 22, 30) == Runs((1, 4, 10, 22), (1, 2, 4, 8), (2, 2, 2, 2))
    assert runs(1, 2, 4, 6, 10, 14, 22, 30, 46) is None
    assert level_runs(torch.tensor([0, 1, 3, 6, 10])) == Runs((0.0,), (1, 2, 3, 4), (1, 1, 1, 1))
    assert level_runs(torch.tensor([0, 1, 3, 6, 10, 15])) is None


def test_numbers_are_counted_while_float32_holds_them_and_their_halves() -> None:
    assert runs(2.0**22, 2.0**22 + 0.5) is None
    assert runs(2.0**22 - 1, 2.0**22) is not None
    assert runs(-(2.0**22), -(2.0**22) + 1) is not None
    assert runs(-(2.0**22) - 1, -(2.0**22)) is None
    for top, fits in ((2**24 - 1, True), (2**24, False)):
        assert (level_runs(torch.tensor([top - 1, top])) is not None) == fits
        assert (level_runs(torch.tensor([-top, 1 - top])) is not None) == fits


HALVES = [n / 2 for n in range(-4, 5)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_runs_stand_for_the_thresholds_that_they_were_made_of(count: int) -> None:
    for cuts in itertools.combinations(HALVES, count):
        found = runs(*cuts)
        if found is None:
            continue
        rebuilt = [
            end + (step * k if end >= 0 else -step * k)
            for end, step, length in zip(found.ends, found.steps, found.counts, strict=True)
            for k in range(length)
        ]  # fmt: skip
        assert sorted(rebuilt) == list(cuts), "each run starts at its end and leads away from zero"
        assert all(length > 0 for length in found.counts)


def test_levels_are_added_up_while_their_whole_span_is_exact() -> None:
    top = 2**23
    for low, high, fits in (
        (-top, top - 1, True), (-top, top, False), (1 - 2 * top, 2 * top - 2, False),
        (-(2**31), -1, False), (2 * top, 2 * top + 1, False),
    ):  # fmt: skip
        for levels in ([low, high], [low, low + 3, high]):
            found = level_runs(torch.tensor(levels, dtype=torch.int32))
            assert (found is not None) == fits, levels


CELLS = [  # thresholds a whole step apart: dtype and number of the cell around zero
    ((-126.0, 125.0), torch.uint8, 128), ((-127.0, 125.0), torch.uint16, 2**15),
    ((-126.0, 126.0), torch.uint16, 2**15), ((2.0, 253.0), torch.uint8, 0),
    ((2.0, 254.0), torch.uint16, 0), ((1.0, 100.0), torch.uint8, 128),
    ((1.0, 200.0), torch.uint16, 2**15), ((-32766.0, 32765.0), torch.uint16, 2**15),
    ((-32767.0, 5.0), None, 0), ((0.0, 32766.0), None, 0),
    ((2.0, 65533.0), torch.uint16, 0), ((2.0, 65534.0), None, 0),
]  # fmt: skip


@pytest.mark.parametrize(("ends", "dtype", "zero"), CELLS)
def test_cells_are_as_few_as_reach_both_ends(
    ends: tuple[float, float], dtype: torch.dtype | None, zero: int
) -> None:
    for width in (1.0, 0.25, 2.0**10):
        low, high = ends
        cuts = torch.tensor([low, low + 1, high - 1.5, high]) * width
        found = threshold_cells(cuts)
        if dtype is None:
            assert found is None
            continue
        assert found is not None
        assert (found.width, found.zero.dtype, int(found.zero)) == (width, dtype, zero)
        assert len(found.below) == torch.iinfo(dtype).max + 1
        assert (int(found.below[0]), int(found.below[-1])) == (0, 4)
        assert found.below.dtype is torch.uint8


def test_cells_are_as_wide_as_the_narrowest_gap_allows() -> None:
    for gap, width in ((1.0, 1.0), (1.9, 1.0), (2.0, 2.0), (0.7, 0.5), (0.5, 0.5)):
        found = threshold_cells(torch.tensor([0.0, gap, gap + 3]))
        assert found is not None
        assert found.width == width
    one = threshold_cells(torch.tensor([5.0]))
    assert one is not None
    assert one.width == 1.0
    assert threshold_cells(torch.tensor([1.0, 1.0])) is None
    for power, fits in ((-40, False), (-39, True), (39, True), (40, False)):
        cuts = torch.tensor([0.0, 2.0**power])
        assert (threshold_cells(cuts) is not None) == fits


@pytest.mark.parametrize("count", [255, 256, 257])
def test_ranks_of_cells_are_bytes_while_the_last_one_fits(count: int) -> None:
    found = threshold_cells(torch.arange(count) + 0.5)
    assert found is not None
    assert found.below.dtype is (torch.uint8 if count < 256 else torch.int16)
    assert (int(found.below[0]), int(found.below[-1])) == (0, count)


@pytest.mark.parametrize("count", range(1, 18))
def test_searches_take_as_few_steps_as_tell_all_ranks_apart(count: int) -> None:
    table, steps = padded(torch.arange(count * 2.0).reshape(2, count))
    assert table.shape == (2, 2**steps - 1)
    assert 2 ** (steps - 1) < count + 1 <= 2**steps
    assert torch.isinf(table[:, count:]).all()


def levels(cuts: list[float], axis: int | None = None) -> LevelEncoding:
    values = torch.tensor(cuts)
    between = torch.cat([values[:1].floor() - 1, values.floor() + 1]).to(torch.int64)
    return LevelEncoding(
        name="any", scale=torch.tensor(1.0), levels=between, thresholds=values, storage_bits=8,
        axis=axis,
    )  # fmt: skip


@pytest.mark.parametrize("first", [0.0, -5.0, 3.5])
def test_half_steps_reach_one_beyond_each_end(first: float) -> None:
    encoding = levels([first, first + 1, first + 7])
    steps = half_steps(encoding)
    assert steps is not None
    assert steps.low == round(2 * first) - 1
    assert steps.high == round(2 * first) + 14 + 1
    assert len(steps.ranks) == steps.high - steps.low + 1
    assert steps.cuts is None
    off = half_steps(levels([first + 0.25, first + 1.25, first + 7.25]))
    assert off is not None
    assert off.cuts is not None
    assert len(off.cuts) == len(off.ranks) == 14 + 3
    assert off.ranks.dtype is torch.uint8


def test_half_steps_are_made_up_to_a_table_of_a_quarter_million() -> None:
    assert LARGEST_TABLE == 512 * 512
    reach = LARGEST_TABLE // 2 - 1.5  # two more half steps belong to the ends
    assert half_steps(levels([0.0, reach])) is not None
    assert half_steps(levels([0.0, reach + 0.5])) is None
    vector = LevelEncoding(
        name="v", scale=torch.tensor([1.0]), levels=torch.tensor([0, 1]),
        thresholds=torch.tensor([0.5]), storage_bits=8, axis=0,
    )  # fmt: skip
    assert half_steps(vector) is not None
    scales = LevelEncoding.nearest(
        "s", torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), storage_bits=8, axis=0
    )
    assert half_steps(scales) is None
