# SPDX-License-Identifier: Apache-2.0
"""Tables of the power-of-two base against whole numbers in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from qgraph.errors import ConfigError
from qgraph.formats.levels import LevelEncoding
from qgraph.formats.power_of_two import (
    TAUS,
    candidate_taus,
    fractions,
    level_of_code,
    power_of_two,
    power_table,
    tau_of,
)

WIDTHS = (2, 3, 4, 5, 6, 8, 16)


def level(code: int, tau: int) -> int:
    """2^15 * 2^(-r / tau), rounded, and halved once per octave, rounded half up."""
    octave, step = divmod(code, tau)
    first = round(2.0 ** (15 - step / tau))
    return (first + (1 << octave) // 2) // (1 << octave)


def coded(bits: int, tau: int) -> dict[int, list[int]]:
    """Codes by the level that they name; zero has the last code alone."""
    codes: dict[int, list[int]] = {}
    for code in range((1 << bits) - 1):
        if code <= 16 * tau and level(code, tau):
            codes.setdefault(level(code, tau), []).append(code)
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tau", TAUS)
def test_tables_hold_each_level_once_with_its_first_code_and_part_in_the_logarithm(bits, tau):
    codes, made = coded(bits, tau), power_table(bits, tau)
    levels = sorted(codes)
    assert made.tau == tau
    assert made.levels.tolist() == [0, *levels]
    assert made.codes.tolist() == [(1 << bits) - 1, *(codes[v][0] for v in levels)]
    below = 0
    for number, found in zip(levels, made.thresholds.tolist(), strict=True):
        middle = 2.0 ** (15 - (codes[number][-1] + 0.5) / tau)
        assert found == pytest.approx(min(max(middle, below + 0.25), number - 0.25), rel=1e-6)
        below = number


@pytest.mark.parametrize("tau", TAUS)
def test_the_levels_of_all_codes_are_those_of_whole_numbers(tau):
    codes = torch.arange(17 * tau)
    assert level_of_code(codes, tau).tolist() == [level(c, tau) for c in codes.tolist()]
    assert fractions(tau).tolist() == [level(c, tau) for c in range(tau)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_bases_are_worth_trying_whose_levels_are_half_of_all_codes_or_more(bits):
    wanted = [t for t in TAUS if len(coded(bits, t)) + 1 >= 1 << (bits - 1)]
    assert list(candidate_taus(bits)) == wanted


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tau", TAUS)
def test_the_base_and_the_top_are_read_back(bits, tau):
    made = power_of_two(bits, tau, torch.tensor([3.0, 0.25]), axis=1)
    assert (tau_of(made), made.bits, made.axis) == (tau, bits, 1)
    top = made.decode(torch.full((1, 2), made.levels.numel() - 1))
    assert top.tolist() == [[3.0, 0.25]]
    assert power_of_two(bits, tau, 1.0).scale.item() == 2.0**-15


def test_what_is_no_width_or_base_is_refused() -> None:
    for bits, tau in ((1, 1), (17, 1), (4, 0), (4, 3), (4, 32)):
        with pytest.raises(ConfigError, match="allowed"):
            power_table(bits, tau)
    other = LevelEncoding.nearest(
        "plain", torch.tensor(1.0), torch.tensor([0, 1, 2]), storage_bits=2
    )
    with pytest.raises(ConfigError, match="has no power-of-two base"):
        tau_of(other)
    assert math.log2(power_table(16, 16).levels[-1].item()) == 15
