# SPDX-License-Identifier: Apache-2.0
"""The search over both ends of a clip range."""

import pytest
import torch

from qgraph.calibration.clip_grid import Schedule, search_clip

SHORT = Schedule(coarse=6, fine=3, rounds=3, smallest=2.0**-2.5)
BOWL = (-1.3, 2.1)


def bowl(lows, highs):
    """Smallest at `BOWL`."""
    return (lows / BOWL[0]).log2() ** 2 + (highs / BOWL[1]).log2() ** 2


def searched(low=-4.0, high=4.0, coarse=None, **options):
    """The range found, and the candidates of each call of the objective."""
    calls = []

    def objective(lows, highs):
        calls.append(list(zip(lows.tolist(), highs.tolist(), strict=True)))
        return bowl(lows, highs)

    return search_clip(objective, low, high, coarse=coarse, **options), calls


@pytest.mark.parametrize("schedule", [SHORT, Schedule(), Schedule(coarse=7)])
@pytest.mark.parametrize("cheap", [False, True])
def test_no_candidate_is_tried_twice_and_the_best_is_found(schedule, cheap):
    found, calls = searched(schedule=schedule, coarse=bowl if cheap else None)
    tried = [candidate for call in calls for candidate in call]
    assert len(set(tried)) == len(tried)
    assert len(calls) == schedule.rounds + (not cheap)
    assert found == min(tried, key=lambda ends: float(bowl(*map(torch.tensor, ends))))
    assert [a / b for a, b in zip(found, BOWL, strict=True)] == pytest.approx([1.0, 1.0], abs=0.08)


def test_a_cheap_first_round_that_misleads_costs_no_more_than_the_whole_range_would():
    def misleading(lows, highs):
        return (lows + 4.0).abs() + (highs - 0.8).abs()

    found, calls = searched(schedule=SHORT, coarse=misleading)
    assert (-4.0, 4.0) in calls[0]
    assert bowl(*map(torch.tensor, found)) <= bowl(torch.tensor(-4.0), torch.tensor(4.0))


def test_tied_ends_share_one_fraction_and_an_end_at_zero_stays():
    (low, high), calls = searched(low=-2.0, high=4.0, tied=True)
    assert low / high == pytest.approx(-0.5)
    assert all(a / b == pytest.approx(-0.5) for call in calls for a, b in call)
    for ends in ((0.0, 4.0), (-4.0, 0.0)):
        objective = lambda lows, highs: ((highs - lows) - 3.0).abs()  # noqa: E731
        low, high = search_clip(objective, *ends)
        assert high - low == pytest.approx(3.0, rel=0.08)
        assert 0.0 in (low, high)


def test_no_candidate_is_outside_the_exact_range():
    _, calls = searched(low=-1.0, high=1.5)
    assert all(-1.0 <= low <= 0.0 <= high <= 1.5 for call in calls for low, high in call)
