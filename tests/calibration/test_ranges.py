# SPDX-License-Identifier: Apache-2.0
"""Range choice: the closed form is right, the search finds the best, ties and edges behave."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import (
    ChannelHistogram,
    Histogram,
    Range,
    affine_parameters,
    choose_range,
    choose_range_for_output,
    weight_parameters,
    weight_scales,
)
from qgraph.calibration.clip_grid import pick, search_clip
from qgraph.calibration.output_ranges import BRIEF, THOROUGH, Effort, clamped_, sketch
from qgraph.calibration.ranges import METHODS, error_integral
from qgraph.errors import CalibrationError, ConfigError
from qgraph.formats import AffineEncoding, IntGrid


def observed(x: torch.Tensor) -> tuple[Histogram, Range]:
    histogram, extrema = Histogram(rate=1), Range()
    histogram.update(x)
    extrema.update(x)
    return histogram, extrema


Ends = tuple[float, float]


def fake(
    x: torch.Tensor, ends: Ends, bits: int, *, signed: bool = False, symmetric: bool = False
) -> torch.Tensor:
    grid = IntGrid(bits, signed)
    scale, zero = affine_parameters(*ends, grid.qmin, grid.qmax, symmetric=symmetric)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax).fake(x)


def error(x: torch.Tensor, ends: Ends, bits: int, **options: bool) -> float:
    return float((fake(x, ends, bits, **options) - x).double().square().mean())


@given(st.floats(-5, 5), st.floats(0.01, 3.0), st.integers(-6, 0), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_error_integral_equals_a_fine_numeric_integral(x, scale, qlow, qhigh):
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * x
    quantized = (t / scale).round().clamp(qlow, qhigh) * scale
    numeric = float((quantized - t).square().mean()) * x
    s = torch.tensor([[scale]], dtype=torch.float64)
    point = torch.tensor([x], dtype=torch.float64)
    closed = float(error_integral(point, s, qlow * s, qhigh * s))
    assert closed == pytest.approx(numeric, rel=1e-3, abs=1e-6)


def tensors(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 4000, generator=generator)
    return {
        "normal": x,
        "gelu": torch.nn.functional.gelu(2 * x),
        "heavy": x * torch.exp(1.5 * torch.randn(8, 4000, generator=generator)),
        "positive": x.abs() + 0.5,
        "negative": -x.square(),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy", "positive", "negative"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_range_is_as_good_as_an_exhaustive_search(kind, bits):
    x = tensors(kind)
    histogram, extrema = observed(x)
    low, high = extrema.bounds()
    low, high = min(low, 0.0), max(high, 0.0)
    chosen = choose_range(histogram, extrema, bits=bits)
    assert low <= chosen[0] <= 0 <= chosen[1] <= high
    fractions = [2 ** (-k / 6) for k in range(30)]
    sparse = [1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02] if low and high else [1.0]
    best = min(error(x, (low * a, high * b), bits) for a in sparse for b in fractions)
    if not high:
        best = min(error(x, (low * b, 0.0), bits) for b in fractions)
    assert error(x, chosen, bits) <= 1.03 * best
    assert error(x, chosen, bits) <= error(x, (low, high), bits) * 1.001


@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy", "positive", "negative"])
def test_the_brief_search_of_a_histogram_finds_what_the_whole_one_does(kind):
    x = tensors(kind)
    found = [
        error(x, choose_range(*observed(x), bits=8, schedule=effort.histogram), 8)
        for effort in (BRIEF, THOROUGH)
    ]
    assert found[0] <= 1.001 * found[1]


@pytest.mark.parametrize("signed", [True, False])
def test_symmetric_ranges_search_one_fraction(signed):
    x = tensors("heavy") if signed else tensors("heavy").relu()
    histogram, extrema = observed(x)
    options = {"signed": signed, "symmetric": True}
    chosen = choose_range(histogram, extrema, bits=4, **options)
    low, high = extrema.bounds()
    best = min(
        error(x, (low * 2 ** (-k / 8), high * 2 ** (-k / 8)), 4, **options) for k in range(50)
    )
    assert error(x, chosen, 4, **options) <= 1.02 * best


@pytest.mark.parametrize("method", ["minmax", "percentile", *METHODS])
@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 4), torch.full((3, 4), 2.5), torch.full((3, 4), -2.5), torch.tensor([[1e-30]]),
     torch.tensor([[3e38, -3e38]]), torch.tensor([[1e-45, 0.0]])],
    ids=["zeros", "constant", "negative", "tiny", "huge", "subnormal"],
)  # fmt: skip
def test_degenerate_values_give_a_finite_positive_scale(method, x):
    histogram, extrema = observed(x)
    low, high = choose_range(histogram, extrema, bits=8, method=method)
    assert extrema.bounds()[0] >= low or low <= 0
    for symmetric in (False, True):
        scale, zero_point = affine_parameters(low, high, -128, 127, symmetric=symmetric)
        assert math.isfinite(float(scale))
        assert float(scale) >= 2.0**-63
        assert -128 <= int(zero_point) <= 127
        if not x.any():
            assert float(scale) == 1.0


def test_values_on_a_grid_keep_the_largest_range():
    x = torch.tensor([[0.0, 1.0, 2.0, 255.0]])
    histogram, extrema = observed(x)
    assert choose_range(histogram, extrema, bits=16) == (0.0, 255.0)


def test_equal_losses_go_to_the_largest_range_and_undefined_ones_never_win():
    extent = torch.tensor([1.0, 4.0, 2.0, 9.0, 16.0])
    loss = torch.tensor([3.0, 3.0, 3.0 * (1 + 1e-12), 3.1, float("nan")], dtype=torch.float64)
    assert pick(loss, extent) == 1
    low, high = search_clip(lambda lows, highs: torch.zeros_like(lows), -3.0, 5.0)
    assert (low, high) == (-3.0, 5.0)


def test_one_outlier_is_clipped_at_few_bits_and_weighed_once_when_sampled():
    x = torch.nn.functional.gelu(torch.randn(8, 24576))
    x[0, 7] = 60.0
    histogram, extrema = Histogram(rate=16), Range()
    histogram.update(x)
    extrema.update(x)
    low, high = choose_range(histogram, extrema, bits=4)
    grid = [2 ** (k / 8) for k in range(48)]
    assert error(x, (low, high), 4) <= 1.05 * min(error(x, (-0.17, h), 4) for h in grid)


def test_percentile_leaves_the_asked_mass_outside():
    x = torch.randn(4, 50_000)
    low, high = choose_range(*observed(x), bits=8, method="percentile", percentile=99.0)
    assert float((x > high).float().mean()) == pytest.approx(0.005, rel=0.1)
    assert float((x < low).float().mean()) == pytest.approx(0.005, rel=0.1)
    full = choose_range(*observed(x), bits=8, method="percentile", percentile=100.0)
    assert full == pytest.approx((float(x.min()), float(x.max())))


def test_entropy_clips_a_heavy_tail_and_keeps_a_flat_density():
    flat, heavy = torch.rand(4, 20_000), tensors("heavy")
    for x, clipped in ((flat, False), (heavy, True)):
        histogram, extrema = Histogram(64, rate=1), Range()
        histogram.update(x)
        extrema.update(x)
        _, high = choose_range(histogram, extrema, bits=4, method="entropy")
        assert (high < 0.7 * float(x.max())) == clipped


def test_channel_histograms_choose_nearly_the_same_range():
    x = torch.randn(2000, 8) * torch.linspace(0.5, 2, 8)
    pooled = ChannelHistogram(positions=0)
    pooled.update(x)
    histogram, extrema = observed(x)
    ours = choose_range(pooled, extrema, bits=4)
    assert error(x, ours, 4) <= 1.03 * error(x, choose_range(histogram, extrema, bits=4), 4)


def test_range_choice_names_what_is_wrong():
    histogram, extrema = observed(torch.ones(1, 2))
    with pytest.raises(ConfigError, match="unknown range method 'msee'; did you mean 'mse'"):
        choose_range(histogram, extrema, bits=8, method="msee")
    with pytest.raises(ConfigError, match="percentile=0"):
        choose_range(histogram, extrema, bits=8, method="percentile", percentile=0.0)
    with pytest.raises(CalibrationError, match="0 samples"):
        choose_range(Histogram(), Range(), bits=8)


@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_affine_grids_cover_their_range_and_hold_zero(low, high, bits, signed, symmetric):
    grid = IntGrid(bits, signed)
    if symmetric and not signed:
        low = 0.0
    scale, zero = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=symmetric)
    s, z = float(scale), int(zero)
    assert grid.qmin <= z <= grid.qmax
    slack = s * (0.5 + 1e-3)
    assert (grid.qmin - z) * s <= low + slack
    assert (grid.qmax - z) * s >= high - slack
    assert not symmetric or z == 0


@pytest.mark.parametrize(("low", "high"), [(2.0, 3.0), (-3.0, -2.0), (1e-3, 1e-3)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_on_one_side_of_zero_are_widened_to_hold_it(low, high, symmetric):
    grid = IntGrid(8, signed=True)
    scale, zero = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=symmetric)
    s, z = float(scale), int(zero)
    assert (grid.qmin - z) * s <= min(low, 0.0) + s
    assert (grid.qmax - z) * s >= max(high, 0.0) - s


def test_affine_parameters_refuse_impossible_ranges():
    for ends in ((float("nan"), 1.0), (0.0, float("inf")), (1.0, -1.0)):
        with pytest.raises(ConfigError, match="finite ends, low <= high"):
            affine_parameters(*ends, 0, 255, symmetric=False)
    with pytest.raises(ConfigError, match="needs 0 among its codes"):
        affine_parameters(0.0, 1.0, 1, 255, symmetric=True)
    scale, zero = affine_parameters(torch.tensor([-1.0, 0.0]), 1.0, 0, 15, symmetric=False)
    assert scale.shape == zero.shape == (2,)


def output_loss(rows: torch.Tensor, weight: torch.Tensor, ends: Ends, bits: int) -> float:
    return float(((fake(rows, ends, bits) - rows) @ weight.T).double().square().sum())


def test_relative_errors_keep_one_massive_row_from_deciding_alone():
    generator = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.gelu(torch.randn(256, 32, generator=generator))
    rows[0] *= 60.0
    weight = torch.randn(48, 32, generator=generator)
    found = {}
    for relative in (0.0, 1.5):
        ends = choose_range_for_output(
            rows, weight, low=float(rows.min()), high=float(rows.max()), bits=6, relative=relative
        )
        output = (fake(rows, ends, 6) - rows) @ weight.T
        found[relative] = float(
            (output.square().sum(1) / (rows @ weight.T).square().sum(1)).median()
        )
    assert found[1.5] < 0.2 * found[0.0]


@pytest.mark.parametrize("is_gram", [False, True])
def test_output_aware_range_keeps_what_the_layer_amplifies(is_gram):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(128, 32, generator=generator)
    rows[:, 3] *= 12.0
    weight = torch.randn(48, 32, generator=generator) * 0.1
    weight[:, 3] = 2.0
    low, high = float(rows.min()), float(rows.max())
    given_weight = weight.T @ weight if is_gram else weight
    ours = choose_range_for_output(
        rows, given_weight, low=low, high=high, bits=4, relative=0.0, is_gram=is_gram,
        effort=Effort(projections=None),
    )  # fmt: skip
    local = choose_range(*observed(rows), bits=4)
    assert output_loss(rows, weight, ours, 4) < 0.9 * output_loss(rows, weight, local, 4)
    grid = [2 ** (-k / 4) for k in range(12)]
    best = min(output_loss(rows, weight, (low * a, high * b), 4) for a in grid for b in grid)
    assert output_loss(rows, weight, ours, 4) <= 1.05 * best
    assert low <= ours[0] <= 0 <= ours[1] <= high


@pytest.mark.parametrize("seed", range(4))
def test_the_brief_search_of_8_bits_finds_what_a_thorough_one_does(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.gelu(torch.randn(128, 96, generator=generator))
    rows[:, 3] *= 20.0
    weight = torch.randn(200, 96, generator=generator)
    weight[:, 3] *= 2e-4  # large, and hardly read: worth a clip
    low, high = float(rows.min()), float(rows.max())
    losses = {
        effort: output_loss(rows, weight, choose_range_for_output(
            rows, weight, low=low, high=high, bits=8, relative=0.0, effort=effort
        ), 8)
        for effort in (BRIEF, THOROUGH, Effort(projections=None))
    }  # fmt: skip
    assert losses[BRIEF] <= 1.3 * min(losses.values())
    assert losses[BRIEF] <= 0.5 * output_loss(rows, weight, (low, high), 8)


def test_the_sketch_estimates_output_energy():
    weight, errors = torch.randn(300, 40), torch.randn(500, 40)
    exact = (errors @ weight.T).square().sum()
    rough = (errors @ sketch(weight, 64).T).square().sum()
    assert float(rough / exact) == pytest.approx(1.0, abs=0.15)
    assert sketch(weight, 300) is weight


def test_output_aware_range_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"rows \[2, 3\] and weight \[4, 5\]"):
        choose_range_for_output(torch.ones(2, 3), torch.ones(4, 5), low=0.0, high=1.0, bits=8)
    with pytest.raises(CalibrationError, match="no rows"):
        choose_range_for_output(torch.ones(0, 3), torch.ones(4, 3), low=0.0, high=1.0, bits=8)
    zeros = choose_range_for_output(torch.zeros(2, 3), torch.ones(4, 3), low=0, high=0, bits=8)
    assert zeros == (0, 0)


def weight_error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: IntGrid, moment: torch.Tensor
) -> torch.Tensor:
    s, z = scale[:, None], zero[:, None]
    fake_w = ((w / s).round() + z).clamp(grid.qmin, grid.qmax).sub(z) * s
    return ((fake_w - w).square() * moment).sum(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_weight_clip_is_as_good_as_an_exhaustive_search_per_channel(bits, symmetric, weighted):
    w = torch.randn(6, 40) * torch.exp(0.5 * torch.randn(6, 40))
    moment = torch.rand(40) + 0.1 if weighted else torch.ones(40)
    grid = IntGrid(bits, signed=True, narrow=symmetric)
    scale, zero = weight_parameters(
        w, bits=bits, symmetric=symmetric, narrow=symmetric,
        second_moment=moment if weighted else None,
    )  # fmt: skip
    found = weight_error(w, scale, zero, grid, moment)
    best = torch.full((6,), float("inf"))
    for k in range(90):
        ends = (w.amin(1).clamp(max=0) * (1 - k / 100), w.amax(1).clamp(min=0) * (1 - k / 100))
        if symmetric:
            top = torch.maximum(ends[1], -ends[0])
            ends = (-top, top)
        other = affine_parameters(*ends, grid.qmin, grid.qmax, symmetric=symmetric)
        best = torch.minimum(best, weight_error(w, *other, grid, moment))
        if k == 0:
            assert bool((found <= best * (1 + 1e-5)).all())
    assert float(found.sum()) <= 1.05 * float(best.sum())


def test_without_a_clip_every_channel_keeps_its_largest_weight():
    w = torch.randn(6, 400)
    scale, _ = weight_parameters(w, bits=4, clip=False)
    assert torch.allclose(scale * 7, w.abs().amax(1))
    assert bool((weight_parameters(w, bits=4)[0] < scale).all())


def test_weight_scales_follow_the_output_axis_of_transposed_convolutions():
    w = torch.randn(5, 3, 2, 2)
    along_one = weight_scales(w, axis=1, bits=4)
    assert along_one.shape == (3,)
    assert torch.equal(along_one, weight_scales(w.movedim(1, 0).contiguous(), bits=4))


def test_weights_that_fit_exactly_keep_the_largest_range_and_zero_channels_scale_one():
    w = torch.tensor([[0.0, 1.0, -7.0], [0.0, 0.0, 0.0], [0.5, 1.0, 3.5]])
    assert weight_scales(w, bits=4).tolist() == [1.0, 1.0, 0.5]


def test_weight_search_refuses_bad_input():
    with pytest.raises(ConfigError, match="holds 1 non-finite"):
        weight_scales(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ConfigError, match="does not fit channels of 4 weights"):
        weight_scales(torch.ones(2, 4), second_moment=torch.ones(3))
    conv = torch.randn(4, 2, 3, 3)
    assert weight_scales(conv, second_moment=torch.tensor([1.0, 2.0])).shape == (4,)


def test_broadcast_bounds_clamp_as_the_plain_op_does():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    low, high = -torch.rand(3, 1, 1), torch.rand(3, 1, 1)
    assert torch.equal(clamped_(x.clone(), low, high), x.clamp(low, high))
