# SPDX-License-Identifier: Apache-2.0
"""Laws of the log-affine format: codes, monotone, idempotent, shifts of the exponent, gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration.log_affine_fit import (
    fit_log_affine,
    log_affine_encoding,
    soft_log_affine,
)
from qgraph.errors import ConfigError
from qgraph.formats.log_affine import (
    LARGE_TOP,
    LogAffine,
    log_affine,
    parameters_of,
    shift_steps,
    side_codes,
)

seeds = st.integers(0, 10_000)
widths = st.integers(2, 5)


def laplace(seed: int, channels: int = 3, count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(channels, count, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs()) * 0.1).float()


def numbers(seed: int, bits: int, *, zero: bool = False, channels: int = 2) -> LogAffine:
    """Parameters whose integer levels do not crowd: at most five octaves."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 << (bits - 1)
    octaves = 1 + 4 * torch.rand(channels, 2, generator=generator)
    top = torch.rand(channels, 1, generator=generator) * 6 - 5
    top = top + torch.rand(channels, 2, generator=generator) / 2
    slope = max(1, count - 1) / octaves
    return LogAffine(
        bits=bits, slope=slope, offset=(count - 1) - slope * top, centre=torch.zeros(channels),
        reserve_zero=zero,
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=widths, zero=st.booleans())
def test_encoding_is_monotone_idempotent_and_keeps_the_side(
    seed: int, bits: int, zero: bool
) -> None:
    zero = zero and bits > 2
    weight = laplace(seed, 2)
    encoding = log_affine(numbers(seed, bits, zero=zero))
    ordered = weight.sort(dim=1).values
    codes = encoding.encode(ordered)
    assert bool((codes.int().diff(dim=1) >= 0).all())
    assert int(codes.max()) < (1 << bits) - int(zero)
    made = encoding.decode(codes)
    assert torch.equal(encoding.encode(made), codes)
    away = (ordered != 0) & (made != 0)
    assert torch.equal(made.sign()[away], ordered.sign()[away])
    assert bool((made == 0).any()) <= zero
    assert bool((encoding.fake(torch.zeros(2, 1)) == 0).all()) == zero


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=widths)
def test_thresholds_take_the_decision_of_the_logarithm(seed: int, bits: int) -> None:
    parameters, weight = numbers(seed, bits), laplace(seed, 2)
    encoding = log_affine(parameters, top=LARGE_TOP)
    codes, side = side_codes(weight, parameters)
    count = parameters.count
    ranks = torch.where(side == 1, count + codes, count - 1 - codes)
    z = parameters.slope.gather(1, side) * weight.double().abs().log2()
    z = z + parameters.offset.gather(1, side)
    clear = ((z - z.floor()) - 0.5).abs() > 0.02  # beyond the rounding of levels and thresholds
    assert torch.equal(encoding.encode(weight).long()[clear], ranks[clear])


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=widths, zero=st.booleans())
def test_the_table_is_the_decoder_to_one_unit(seed: int, bits: int, zero: bool) -> None:
    zero = zero and bits > 2
    parameters = numbers(seed, bits, zero=zero)
    # Int8 levels near the centre may have been pushed apart by one.
    for top, units in ((None, 1.5 if bits <= 4 else 4.0), (LARGE_TOP, 0.501)):
        encoding = log_affine(parameters, top=top)
        distance = parameters.distances()[..., int(zero) :]
        middle = [torch.zeros(2, 1)] if zero else []
        exact = torch.cat([-distance[:, 0].flip(-1), *middle, distance[:, 1]], 1)
        made = encoding.levels * encoding.scale[:, None].double()
        assert bool(((made - exact).abs() <= units * encoding.scale[:, None]).all())
    assert int(log_affine(parameters).levels.abs().max()) <= 127


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=widths, shift=st.integers(-6, 6))
def test_scaling_by_a_power_of_two_moves_the_offset_only(seed: int, bits: int, shift: int) -> None:
    parameters, weight = numbers(seed, bits), laplace(seed, 2)
    moved = LogAffine(
        bits=bits, slope=parameters.slope, offset=parameters.offset - parameters.slope * shift,
        centre=parameters.centre,
    )  # fmt: skip
    first, second = log_affine(parameters), log_affine(moved)
    assert torch.equal(first.encode(weight), second.encode(weight * 2.0**shift))
    torch.testing.assert_close(second.scale, first.scale * 2.0**shift, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, bits=st.integers(2, 4), offset=st.integers(-3, 6))
def test_at_slope_one_both_decoders_agree(seed: int, bits: int, offset: int) -> None:
    ones = torch.ones(2, 2)
    parameters = LogAffine(bits=bits, slope=ones, offset=ones * offset, centre=torch.zeros(2))
    exact = log_affine(parameters, top=1 << 14)
    shifted = replace(parameters, decoder="shift")
    shift = log_affine(shifted, step=torch.full((2,), 2.0**-offset))
    weight = laplace(seed, 2)
    assert torch.equal(exact.encode(weight), shift.encode(weight))
    assert torch.equal(exact.fake(weight), shift.fake(weight))
    assert torch.equal(shift.levels[0].abs().unique(), 2 ** torch.arange(1 << (bits - 1)))


def best_error(weight: Tensor, bits: int) -> float:
    rows = weight.double()
    parameters = fit_log_affine(weight, bits)
    codes, side = side_codes(weight, parameters)
    made = parameters.distances()[torch.arange(len(rows))[:, None], side, codes]
    return float((made * (2 * side - 1) - rows).square().sum())


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_more_bits_never_fit_worse(seed: int) -> None:
    weight = laplace(seed, 2, 120)
    errors = [best_error(weight, bits) for bits in (2, 3, 4, 5)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))


def test_peaked_weights_gain_over_uniform_ones() -> None:
    """Figures of the method notes: 16.6 dB for Laplace weights at 4 bits, 18.3 for Gaussian."""
    weight = laplace(7, 1, 20_000)
    noise = (log_affine_encoding(weight, 4).fake(weight) - weight).square().sum()
    assert 10 * math.log10(float(weight.square().sum() / noise)) == pytest.approx(16.6, abs=0.25)
    weight = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    noise = (log_affine_encoding(weight, 4).fake(weight) - weight).square().sum()
    assert 10 * math.log10(float(weight.square().sum() / noise)) == pytest.approx(18.4, abs=0.25)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=st.integers(2, 4))
def test_gradients_are_those_of_the_notes(seed: int, bits: int) -> None:
    count = 1 << (bits - 1)
    rows = laplace(seed, 1, 60).double()
    parameters = numbers(seed, bits, channels=1)
    log_slope = parameters.slope.log().requires_grad_()
    offset = parameters.offset.clone().requires_grad_()
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).double()
    soft_log_affine(rows, log_slope, offset, parameters.centre, count).backward(grad)
    side = (rows >= 0).long()
    k, a = parameters.slope.gather(1, side), parameters.offset.gather(1, side)
    z = k * rows.abs().log2() + a
    q = torch.round(z).clamp(0, count - 1)
    d = torch.exp2((q - a) / k) * (2 * side - 1)
    inside = torch.round(z) == q
    by_k = torch.where(inside, d * math.log(2) * (z - q) / k**2, -d * math.log(2) * (q - a) / k**2)
    by_a = torch.where(inside, 0.0, -d * math.log(2) / k)
    factor = (rows.shape[1] * max(1, count - 1)) ** -0.5
    for at in (0, 1):
        mine = side == at
        assert offset.grad is not None
        assert log_slope.grad is not None
        expected = float((by_a * grad)[mine].sum()) * factor
        assert float(offset.grad[0, at]) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        expected = float((by_k * grad * k)[mine].sum()) * factor
        assert float(log_slope.grad[0, at]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_soft_values_are_the_hard_ones() -> None:
    weight, parameters = laplace(3, 2).double(), numbers(3, 4)
    soft = soft_log_affine(
        weight, parameters.slope.log(), parameters.offset, parameters.centre, parameters.count
    )
    codes, side = side_codes(weight, parameters)
    hard = parameters.distances()[torch.arange(2)[:, None], side, codes] * (2 * side - 1)
    torch.testing.assert_close(soft, hard)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, bits=st.integers(3, 5), zero=st.booleans())
def test_parameters_are_read_back_from_the_table(seed: int, bits: int, zero: bool) -> None:
    parameters = numbers(seed, bits, zero=zero)
    found = parameters_of(log_affine(parameters, top=LARGE_TOP))
    assert found.reserve_zero == zero
    torch.testing.assert_close(found.slope, parameters.slope, rtol=0.02, atol=0)
    away = (found.distances() / parameters.distances())[..., int(zero) :].log2()
    assert float(away.abs().max()) < 0.05


def test_edge_cases() -> None:
    zero, constant = torch.zeros(1, 8), torch.full((1, 8), 0.3)
    assert bool(torch.isfinite(log_affine_encoding(zero, 4).fake(zero)).all())
    assert float(log_affine_encoding(zero, 4).fake(zero).abs().max()) < 1e-30
    torch.testing.assert_close(
        log_affine_encoding(constant, 4).fake(constant), constant, rtol=0.05, atol=0
    )
    one_sided = laplace(1).abs()
    encoding = log_affine_encoding(one_sided, 4)
    assert bool((encoding.fake(one_sided) >= 0).all())
    # the side without weights takes the other's numbers
    assert torch.equal(encoding.levels, -encoding.levels.flip(-1))
    per_tensor = log_affine_encoding(laplace(2), 4, axis=None)
    assert per_tensor.levels.ndim == 1
    with pytest.raises(ConfigError, match="non-finite"):
        fit_log_affine(torch.tensor([[1.0, float("nan")]]), 4)
    with pytest.raises(ConfigError, match="exact zero"):
        fit_log_affine(laplace(1), 2, reserve_zero=True)
    with pytest.raises(ConfigError, match="at most 4 bits"):
        fit_log_affine(laplace(1), 5, decoder="shift")


def test_the_best_shift_is_near_ratio_two_of_the_notes() -> None:
    weight = laplace(5, 1, 20_000)
    encoding = log_affine_encoding(weight, 4, decoder="shift")
    noise = (encoding.fake(weight) - weight).square().sum()
    assert 10 * math.log10(float(weight.square().sum() / noise)) == pytest.approx(14.2, abs=0.4)
    step = shift_steps(weight, fit_log_affine(weight, 4, decoder="shift"))
    assert torch.equal(encoding.scale, step)


def test_a_centre_moves_all_levels() -> None:
    weight = laplace(9) + 1.0
    found = fit_log_affine(weight, 4, centred=True)
    encoding = log_affine(found)
    plain = log_affine_encoding(weight, 4)
    moved = (encoding.fake(weight) - weight).square().sum()
    assert float(moved) < 0.3 * float((plain.fake(weight) - weight).square().sum())


def one_channel(**changed: object) -> LogAffine:
    """Plain parameters with some of them replaced."""
    whole: dict[str, object] = {
        "bits": 4, "slope": torch.ones(1, 2), "offset": torch.full((1, 2), 5.0),
        "centre": torch.zeros(1), **changed,
    }  # fmt: skip
    return LogAffine(**whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"decoder": "shit"}, "did you mean 'shift'"),
        ({"offset": torch.full((1, 2), float("nan"))}, "offset is not finite"),
        ({"slope": torch.tensor([[1.0, 0.0]])}, "slope must be positive, got 0"),
        ({"bits": 2, "reserve_zero": True}, "use 3 or more"),
        ({"decoder": "shift", "centre": torch.ones(1)}, "centre 0"),
        ({"decoder": "shift", "bits": 5}, "at most 4 bits"),
    ],
)
def test_numbers_that_make_no_format_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        one_channel(**changed)


def test_tables_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 channels need an axis"):
        log_affine(numbers(0, 4), axis=None)
    with pytest.raises(ConfigError, match="needs a step"):
        log_affine(one_channel(decoder="shift"))
    with pytest.raises(ConfigError, match="no log-affine format"):
        parameters_of(replace(log_affine(one_channel()), name="another"))


def test_codes_and_sides_are_those_of_the_distance_from_the_centre() -> None:
    parameters = numbers(3, 4)
    weight = torch.round(laplace(3, 2) * 256) / 256  # exact in fp32, also shifted
    moved = replace(parameters, centre=torch.tensor([0.5, -0.25]))
    shifted = weight + torch.tensor([[0.5], [-0.25]])
    for a, b in zip(side_codes(weight, parameters), side_codes(shifted, moved), strict=True):
        assert torch.equal(a, b)
