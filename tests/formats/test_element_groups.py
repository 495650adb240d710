# SPDX-License-Identifier: Apache-2.0
"""Element groups against their definition: lists of numbers, one group after the other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.element_groups import element_groups, magnitude_thresholds

laws = settings(max_examples=15, deadline=None)


def recursion(elements: list[float], rounds: int) -> list[float]:
    """Mean + 3 std (of a sample) of what is left above the last threshold."""
    found: list[float] = []
    while len(found) < rounds - 1 and len(elements) > 1:
        threshold = float(np.mean(elements) + 3 * np.std(elements, ddof=1))
        elements = [x for x in elements if x > threshold]
        if not elements:
            break
        found.append(threshold)
    return found


@st.composite
def histograms(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
    tail = list(itertools.accumulate(draw(st.lists(st.integers(50, 4000), max_size=4))))
    counts = draw(st.lists(st.integers(1, 60), min_size=len(sizes), max_size=len(sizes)))
    rare = draw(st.lists(st.integers(1, 3), min_size=len(tail), max_size=len(tail)))
    return [*sizes, *(sizes[-1] + t for t in tail)], [*counts, *rare]


@laws
@given(histograms(), st.integers(1, 6))
def test_thresholds_are_the_recursion_on_the_elements_themselves(drawn, rounds):
    sizes, counts = drawn
    elements = [float(s) for s, n in zip(sizes, counts, strict=True) for _ in range(n)]
    got = magnitude_thresholds(torch.tensor(sizes).double(), torch.tensor(counts), rounds=rounds)
    assert got.tolist() == pytest.approx(recursion(elements, rounds), rel=1e-9)
    assert got.dtype is torch.float64


def test_ten_groups_are_the_most_and_a_single_element_is_not_split() -> None:
    spread = 10.0 ** torch.arange(15).double(), 1000.0 ** torch.arange(15, 0, -1).double()
    assert len(magnitude_thresholds(*spread)) == 9
    assert len(magnitude_thresholds(*spread, rounds=3)) == 2
    assert not len(magnitude_thresholds(torch.tensor([5.0]), torch.tensor([1])))
    assert not len(magnitude_thresholds(torch.tensor([5.0]), torch.tensor([9])))
    two = magnitude_thresholds(torch.tensor([1.0, 100.0]), torch.tensor([40, 1]))
    assert two.tolist() == pytest.approx(recursion([1.0] * 40 + [100.0], 10))


CASES = {
    "both sides": ([1.0, 5.0], -20.0, 30.0), "one threshold": ([0.7], -3.0, 2.0),
    "positive": ([0.5, 2.0, 9.0], 0.0, 40.0), "negative": ([0.5, 2.0], -7.0, 0.0),
    "short below": ([1.0, 4.0], -2.5, 11.0), "five groups": ([1.0, 3.0, 9.0, 27.0], -90.0, 60.0),
}  # fmt: skip


def made(case: str, bits: int) -> tuple[LevelEncoding, list[float], tuple[float, float]]:
    thresholds, low, high = CASES[case]
    encoding = element_groups(torch.tensor(thresholds).double(), low, high, bits)
    return encoding, [0.0, *thresholds, math.inf], (low, high)


def values_of(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 997, dtype=torch.float64).float()


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("case", CASES)
def test_an_element_keeps_its_sign_and_moves_by_half_a_step_of_its_own_group(case, bits):
    encoding, edges, (low, high) = made(case, bits)
    unit = float(encoding.scale)
    x = values_of(low, high)
    for value, got in zip(x.tolist(), encoding.fake(x).tolist(), strict=True):
        at = next(i for i in range(len(edges) - 1) if abs(value) <= edges[i + 1])
        step = (min(high, edges[at + 1]) - max(low, -edges[at + 1])) / ((1 << bits) - 1)
        slack = unit * abs(value) / step  # steps are rounded to multiples of the unit
        # at the ends of a group its grid may have no level on the value's other side
        assert abs(got - value) <= step + slack + 1e-6
        at_the_end = at > 0 and (value > high - step or value < low + step)
        near = at_the_end or any(abs(abs(value) - e) <= step for e in edges[:-1])
        if not near:
            assert abs(got - value) <= step / 2 + slack + 1e-6
        assert got * value >= 0


@pytest.mark.parametrize("bits", [4, 7])
@pytest.mark.parametrize("case", CASES)
def test_groups_part_at_their_thresholds_on_both_sides(case, bits):
    encoding, edges, (low, high) = made(case, bits)
    levels, unit = encoding.levels.tolist(), float(encoding.scale)
    for sign, end in ((1.0, high), (-1.0, -low)):
        for edge in edges[1:-1]:
            if edge >= end * 0.9 or any(abs(v * sign * unit - edge) < 1e-5 for v in levels):
                continue  # where a level is the edge, the threshold lies beside it
            at = torch.tensor(edge * sign).float()
            step = torch.tensor(1e-4 * edge * sign)
            inner, outer = (float(encoding.fake(at + s)) * sign for s in (-step, step))
            assert inner < edge < outer


def test_edges_that_are_levels_belong_to_the_lower_group_and_part_it_from_the_upper() -> None:
    encoding = element_groups(torch.tensor([15.0, 30.0]).double(), 0.0, 60.0, 4)
    assert encoding.fake(torch.arange(15.0, 40.0)).unique().tolist() == [
        15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40,
    ]  # fmt: skip
    x = torch.tensor([14.5, 15.0, 15.25, 16.5, 29.5, 30.0, 30.25, 34.0, 34.5])
    assert encoding.fake(x).tolist() == [14, 15, 16, 16, 30, 30, 32, 32, 36]


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_without_thresholds_there_is_one_affine_grid(bits):
    low, high = -1.0, 3.0
    encoding = element_groups(torch.zeros(0, dtype=torch.float64), low, high, bits)
    step = (high - low) / ((1 << bits) - 1)
    plain = AffineEncoding.per_tensor(step, round(-low / step), IntGrid(bits, signed=False))
    x = values_of(low * 2, high * 2) + 1e-4
    torch.testing.assert_close(encoding.fake(x), plain.fake(x))
    assert (encoding.bits, encoding.name) == (bits, "1 element groups")
    assert encoding.levels.numel() == 1 << bits


@pytest.mark.parametrize(("groups", "extra"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (9, 4)])
def test_the_number_of_the_group_takes_its_own_bits(groups, extra):
    thresholds = torch.tensor([2.0**i for i in range(groups - 1)]).double()
    encoding = element_groups(thresholds, -500.0, 600.0, 6)
    assert encoding.storage_bits == 6 + extra
    assert encoding.name == f"{groups} element groups"
    assert encoding.levels.numel() <= 1 << encoding.storage_bits


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("case", CASES)
def test_levels_are_what_the_grids_of_the_groups_hold_between_their_edges(case, bits):
    encoding, edges, (low, high) = made(case, bits)
    first = min(high, edges[1]) - max(low, -edges[1])
    unit = first / ((1 << bits) - 1) / 16
    assert float(encoding.scale) == pytest.approx(unit)
    wanted, known = {0}, {0}
    for at in range(len(edges) - 1):
        a, b = max(low, -edges[at + 1]), min(high, edges[at + 1])
        step = (b - a) / ((1 << bits) - 1)
        multiple = max(1, round(step / unit))
        assert at or multiple == 16
        for code in range(1 << bits):
            level = (code - round(-a / step)) * multiple
            size = abs(level) * unit
            if all(abs(size - edge) > 1e-6 for edge in edges) or at == 0:
                known.add(level)
                if at == 0 or edges[at] < size <= edges[at + 1]:
                    wanted.add(level)
    assert wanted <= set(encoding.levels.tolist())
    assert not (set(encoding.levels.tolist()) - wanted) & known
    assert len(set(encoding.levels.tolist()) - wanted) <= 2 * len(edges)


@pytest.mark.parametrize(
    ("low", "high"),
    [(math.nan, 1.0), (-1.0, math.inf), (-math.inf, 1.0), (0.0, math.nan), (0.0, 0.0)],
)
def test_ranges_that_are_none_are_refused(low, high):
    with pytest.raises(ConfigError, match="not both ends 0"):
        element_groups(torch.tensor([1.0]).double(), low, high, 8)
    with pytest.raises(ConfigError, match="integers from 2"):
        element_groups(torch.tensor([1.0]).double(), -1.0, 1.0, 1)
