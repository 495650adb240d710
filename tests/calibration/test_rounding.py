# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration.rounding import (
    FakeAffine,
    FakeFixed,
    Rounding,
    coins,
    penalty,
    select,
)
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.formats.dual_region import dual_region
from qgraph.formats.power_of_two import power_of_two

METHODS = ("adaround", "ste")


def weight_and_encoding(seed, bits, *, ties=True):
    """Extremes at half steps give ties; some values lie outside the range."""
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    weight[:, 0] = 0.0
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - (0.5 if ties else 1.7))
    return weight, AffineEncoding.symmetric(scale, IntGrid(bits, signed=True), 0)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 6), ties=st.booleans())
def test_the_start_is_round_to_nearest_bit_for_bit(method, seed, bits, ties):
    weight, encoding = weight_and_encoding(seed, bits, ties=ties)
    rounding = Rounding(weight, encoding, method)
    assert torch.equal(rounding.codes(), encoding.encode(weight))
    assert torch.equal(rounding.weight(rounding.hard()), encoding.fake(weight))


def test_the_start_respects_ties_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    encoding = AffineEncoding.symmetric(torch.ones(1), IntGrid(4, signed=True), 0)
    rounding = Rounding(weight, encoding)
    assert rounding.codes().tolist() == [[0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 6))
def test_codes_stay_next_to_the_floor_and_in_range_whatever_is_learned(method, seed, bits):
    weight, encoding = weight_and_encoding(seed, bits, ties=False)
    rounding = Rounding(weight, encoding, method)
    noise = torch.Generator().manual_seed(seed + 1)
    rounding.variable.data += 10 * torch.randn(weight.shape, generator=noise)
    codes = rounding.codes().to(torch.int32)
    floor = torch.floor(weight / encoding.scale[:, None]).clamp(encoding.qmin, encoding.qmax)
    assert bool(((codes - floor == 0) | (codes - floor == 1)).all())
    assert int(codes.min()) >= encoding.qmin
    assert int(codes.max()) <= encoding.qmax
    assert torch.equal(rounding.weight(rounding.hard()), encoding.decode(rounding.codes()))


@pytest.mark.parametrize("encoding", [power_of_two(4, 2, 2.0), dual_region(4, 2, high=2.0)])
def test_tables_of_levels_round_the_same_way(encoding):
    values = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 2.4
    rounding = Rounding(values, encoding)
    assert torch.equal(rounding.codes(), encoding.encode(values))
    assert torch.equal(rounding.weight(rounding.hard()), encoding.fake(values))
    rounding.variable.data.neg_()
    assert torch.equal(rounding.weight(rounding.hard()), encoding.decode(rounding.codes()))
    other = rounding.codes().int() - encoding.encode(values).int()
    assert int(other.abs().max()) == 1


def test_freezing_is_progressive_final_and_idempotent():
    weight, encoding = weight_and_encoding(0, 4)
    rounding = Rounding(weight, encoding)
    rounding.freeze(0.5)
    share = float(rounding.frozen.float().mean())
    assert 0.5 <= share < 0.7
    assert 0.0 < rounding.undecided() <= 0.5
    before = rounding.codes()
    rounding.freeze(1.0)
    assert rounding.undecided() == 0.0
    assert torch.equal(rounding.share(), rounding.hard())
    assert torch.equal(rounding.codes(), before)
    rounding.variable.data.neg_()
    assert torch.equal(rounding.codes(), before)


def test_the_penalty_vanishes_at_both_ends_and_peaks_between():
    assert float(penalty(torch.tensor([0.0, 1.0]), 7.0)) == 0.0
    assert float(penalty(torch.tensor([0.5]), 7.0)) == 1.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8))
def test_the_fused_quantizer_computes_what_the_dialect_does(seed, bits):
    x = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    grid = IntGrid(bits, signed=False)
    encoding = AffineEncoding.per_tensor(0.3, grid.qmax // 2, grid)
    limits = grid.qmin, grid.qmax
    got = FakeAffine.apply(x, torch.zeros(()), encoding.scale, grid.qmax // 2, limits, None)
    assert torch.equal(got, encoding.fake(x))
    assert torch.equal(FakeFixed.apply(x, encoding, None), encoding.fake(x))


def test_gradients_are_straight_through_inside_and_those_of_lsq_for_the_step():
    x = torch.tensor([-9.0, 0.4, 0.7, 9.0], requires_grad=True)
    log_step = torch.zeros((), requires_grad=True)
    out = FakeAffine.apply(x, log_step, torch.tensor(0.5), 4.0, (0, 15), None)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    levels = torch.tensor([-4.0, 1.0 - 0.8, 1.0 - 1.4, 11.0])
    factor = 1 / (4 * 15) ** 0.5
    torch.testing.assert_close(log_step.grad, levels.sum() * 0.5 * factor)


def test_dropped_elements_stay_float_and_pass_their_gradient():
    x = torch.tensor([-9.0, 0.4], requires_grad=True)
    keep = torch.tensor([True, False])
    out = FakeAffine.apply(x, torch.zeros(()), torch.tensor(0.5), 4.0, (0, 15), keep)
    out.sum().backward()
    assert out.tolist() == [-9.0, 0.5]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0]


def test_coins_are_fair_and_repeatable():
    toss = coins(torch.Size([1000, 33]), torch.Generator().manual_seed(1), 0.25)
    assert 0.24 < float(toss.float().mean()) < 0.26
    assert torch.equal(toss, coins(torch.Size([1000, 33]), torch.Generator().manual_seed(1), 0.25))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.sampled_from([None, 2.0, 5.5, 20.0]))
def test_the_fused_weight_has_the_gradients_of_its_formula(seed: int, beta: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 9, generator=generator)
    scale = torch.rand(6, generator=generator) / 4 + 0.05
    weight[:, 0] = 3 * scale  # exactly on a level: free to leave it
    encoding = AffineEncoding(
        scale=scale, zero_point=torch.zeros(6, dtype=torch.int32), qmin=-8, qmax=7, axis=0
    )
    rounding = Rounding(weight, encoding)
    rounding.freeze(0.3)
    wanted = torch.randn(6, 9, generator=generator)
    share = rounding.share()
    plain = (rounding.weight(share) * wanted).sum()
    if beta is not None:
        plain = plain + 0.3 * penalty(share, beta)
    made, pull = rounding.soft(beta)
    fused = (made * wanted).sum() + 0.3 * pull
    assert torch.equal(made, rounding.weight(rounding.share()))
    (expected,) = torch.autograd.grad(plain, rounding.variable)
    (found,) = torch.autograd.grad(fused, rounding.variable)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.abs().max()) > 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), turned=st.booleans())
def test_selecting_by_bits_is_where(seed: int, turned: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 7, 5, generator=generator)
    first[0, 0], second[1, 1], first[2, 2], second[3, 3] = torch.inf, -torch.inf, torch.nan, -0.0
    keep = torch.rand(7, 5, generator=generator) < 0.5
    if turned:
        first, second, keep = first.t(), second.t(), keep.t()
    for dtype in (torch.float32, torch.float64):
        a, b = first.to(dtype), second.to(dtype)
        expected, found = torch.where(keep, a, b), select(keep, a, b)
        assert found.dtype == dtype
        assert torch.equal(expected.isnan(), found.isnan())
        assert torch.equal(expected.nan_to_num(9.0), found.nan_to_num(9.0))
        assert torch.equal(expected.signbit(), found.signbit())
