# SPDX-License-Identifier: Apache-2.0
"""Laws of the power-of-two base (P6 to P8 of the method): monotone, idempotent, exact zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ConfigError
from qgraph.formats.power_of_two import (
    FRACTION,
    TAUS,
    candidate_taus,
    fractions,
    level_of_code,
    power_of_two,
    power_table,
    tau_of,
)

FORMATS = [(bits, tau) for bits in (3, 4, 5, 6, 8) for tau in candidate_taus(bits)]
formats = st.sampled_from(FORMATS)
values = st.lists(st.floats(0.0, 2.0, width=32), min_size=1, max_size=40).map(torch.tensor)


def test_bases_with_too_few_distinct_levels_are_dropped() -> None:
    assert candidate_taus(4) == (1, 2, 4, 8, 16)
    assert candidate_taus(6) == (4, 8, 16)
    assert candidate_taus(8) == (16,)


@pytest.mark.parametrize(("bits", "tau"), FORMATS)
def test_codes_fit_the_width_and_one_is_zero(bits: int, tau: int) -> None:
    table = power_table(bits, tau)
    assert table.levels.numel() <= 1 << bits
    assert int(table.levels[0]) == 0
    assert int(table.codes[0]) == (1 << bits) - 1
    assert int(table.levels[-1]) == 1 << FRACTION
    assert table.codes.unique().numel() == table.codes.numel()
    assert 0 <= int(table.codes.min()) <= int(table.codes.max()) < 1 << bits


@pytest.mark.parametrize(("bits", "tau"), FORMATS)
def test_every_level_is_a_table_entry_and_a_shift(bits: int, tau: int) -> None:
    table = power_table(bits, tau)
    for level, code in zip(table.levels[1:].tolist(), table.codes[1:].tolist(), strict=True):
        octave, step = divmod(code, tau)
        half = (1 << octave) >> 1
        assert level == (int(fractions(tau)[step]) + half) >> octave
        assert abs(level - 2.0 ** (FRACTION - code / tau)) <= 1.0


@pytest.mark.parametrize("tau", TAUS)
def test_table_entries_are_rounded_to_half_a_unit(tau: int) -> None:
    exact = torch.exp2(FRACTION - torch.arange(tau).double() / tau)
    assert float((fractions(tau) - exact).abs().max()) <= 0.5
    assert torch.equal(
        level_of_code(torch.arange(0, 4 * tau, tau), tau), 2 ** torch.arange(15, 11, -1)
    )


@settings(max_examples=60, deadline=None)
@given(formats, values, st.floats(2.0**-12, 1.0, width=32))
def test_encoding_is_monotone_idempotent_and_in_range(
    form: tuple[int, int], x: torch.Tensor, top: float
) -> None:
    encoding = power_of_two(*form, top)
    x = x.sort().values
    codes = encoding.encode(x)
    assert bool((codes[1:].int() >= codes[:-1].int()).all())
    assert int(codes.max()) < encoding.levels.numel()
    once = encoding.fake(x)
    assert torch.equal(encoding.fake(once), once)
    assert torch.equal(encoding.encode(encoding.decode(codes)), codes)


@settings(max_examples=60, deadline=None)
@given(formats, values, st.floats(2.0**-12, 1.0, width=32))
def test_relative_error_is_half_a_step_of_the_logarithm(
    form: tuple[int, int], x: torch.Tensor, top: float
) -> None:
    bits, tau = form
    encoding = power_of_two(bits, tau, top)
    units = x / encoding.scale
    inside = (units > float(encoding.thresholds[0])) & (units <= 2.0**FRACTION)
    x, units = x[inside].double(), units[inside].double()
    error = (encoding.fake(x) - x).abs() / x
    bound = 2.0 ** (1 / (2 * tau)) - 1 + 1.01 / units  # levels are integers
    assert bool((error <= bound + 1e-6).all())


@settings(max_examples=30, deadline=None)
@given(formats, st.integers(-8, 8), values)
def test_scaling_by_a_power_of_two_commutes(
    form: tuple[int, int], power: int, x: torch.Tensor
) -> None:
    factor = 2.0**power
    plain, scaled = power_of_two(*form, 0.5), power_of_two(*form, 0.5 * factor)
    assert torch.equal(scaled.fake(x * factor), plain.fake(x) * factor)


@pytest.mark.parametrize(("bits", "tau"), FORMATS)
def test_zero_top_and_beyond(bits: int, tau: int) -> None:
    encoding = power_of_two(bits, tau, 0.75)
    found = encoding.fake(torch.tensor([0.0, 1e-30, 0.75, 1.0]))
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:].tolist() == [0.75, 0.75]
    assert tau_of(encoding) == tau


def test_coarse_levels_are_among_fine_ones_where_they_overlap() -> None:
    for tau in (1, 2, 4, 8):
        coarse, fine = power_table(6, tau).levels, power_table(6, 2 * tau).levels
        overlap = coarse[coarse >= fine[1]]
        assert bool(torch.isin(overlap, fine).all())


def test_plain_logarithm_is_tau_one() -> None:
    x = torch.exp2(-torch.arange(0, 14).float())
    encoding = power_of_two(4, 1, 1.0)
    assert torch.equal(encoding.fake(x), x)
    between = x * 2.0**-0.5
    assert torch.equal(encoding.fake(between * 1.001), x)
    assert torch.equal(encoding.fake(between * 0.999)[:-1], x[1:])


def test_integer_products_equal_the_fake_quantized_ones() -> None:
    torch.manual_seed(0)
    probabilities = torch.randn(3, 50).mul(3).softmax(-1)
    values = torch.randint(-128, 128, (50, 4))
    for bits, tau in FORMATS:
        encoding = power_of_two(bits, tau, 1.0)
        levels = encoding.level(encoding.encode(probabilities)).long()
        exact = (levels @ values).double() * encoding.scale.double()
        reference = encoding.fake(probabilities).double() @ values.double()
        torch.testing.assert_close(exact, reference, rtol=1e-12, atol=0.0)
        assert int((levels @ values).abs().max()) < 2 ** (FRACTION + 8 + 6)


def test_wrong_bases_are_refused() -> None:
    with pytest.raises(ConfigError, match="tau is 3"):
        power_of_two(4, 3, 1.0)
    with pytest.raises(ConfigError):
        power_of_two(4, 1, 0.0)
