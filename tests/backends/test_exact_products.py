# SPDX-License-Identifier: Apache-2.0
"""Requantized products against Python integers and one fp32 rounding per step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.backends import integer, reference
from qgraph.backends.integer.choice import _channel_slices
from qgraph.formats import AffineEncoding, IntGrid, code_dtype
from tests.backends.single_ops import int_bias, product_graph

aten = torch.ops.aten


def requantized(accumulator: int, x: float, w: float, y: float, grid: IntGrid, zero: int) -> int:
    """``clamp(round_half_even(fl(acc) * fl(fl(x w) / y)) + z)``, every step one fp32 rounding."""
    factor = np.float32(np.float32(x) * np.float32(w)) / np.float32(y)
    scaled = float(np.float32(accumulator) * factor)
    return min(max(round(scaled) + zero, grid.qmin), grid.qmax)


def codes(generator: torch.Generator, shape: tuple[int, ...], grid: IntGrid) -> Tensor:
    drawn = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator)
    return drawn.to(code_dtype(grid.qmin, grid.qmax))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.sampled_from([1, 2, 4]))
    return {
        "seed": draw(st.integers(0, 2**16)), "groups": groups, "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)), "dilation": draw(st.integers(1, 2)),
        "signed": draw(st.booleans()), "bits": draw(st.sampled_from([2, 4, 8])),
        "coarse": draw(st.sampled_from([0.02, 1.0, 40.0])), "bias": draw(st.booleans()),
    }  # fmt: skip


def exact_convolution(
    x: list[list[list[int]]], w: Tensor, groups: int, stride: int, padding: int, dilation: int
) -> dict[tuple[int, int, int], int]:
    """Accumulators of one image by the definition, in Python integers (x: levels [C][H][W])."""
    out, per_group, size, _ = w.shape
    height, width = len(x[0]), len(x[0][0])
    rows = (height + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    weights, found = w.tolist(), {}
    for o, i, j in itertools.product(range(out), range(rows), range(columns)):
        first = o // (out // groups) * per_group
        total = 0
        for c, a, b in itertools.product(range(per_group), range(size), range(size)):
            r, s = i * stride - padding + a * dilation, j * stride - padding + b * dilation
            if 0 <= r < height and 0 <= s < width:
                total += x[first + c][r][s] * weights[o][c][a][b]
        found[o, i, j] = total
    return found


@given(convolutions())
@settings(max_examples=25, deadline=None)
def test_convolutions_requantize_like_python_integers(case):
    generator = torch.Generator().manual_seed(case["seed"])
    grid = IntGrid(case["bits"], signed=case["signed"])
    w_grid, out_grid = IntGrid(8, signed=True), IntGrid(8, signed=case["signed"])
    zero = int(torch.randint(grid.qmin, grid.qmax + 1, (), generator=generator))
    x = codes(generator, (1, 4, 5, 6), grid)
    w = codes(generator, (4, 4 // case["groups"], 2, 2), w_grid)
    w_scale = torch.rand(4, generator=generator) * 0.01 + 0.001
    x_coded = AffineEncoding.per_tensor(0.037, zero, grid)
    y = 0.037 * 0.005 * 100 * case["coarse"]
    out = AffineEncoding.per_tensor(y, 3, out_grid)
    bias = torch.randint(-3000, 3000, (4,), generator=generator) if case["bias"] else None
    rest = ([case["stride"]] * 2, [case["padding"]] * 2, [case["dilation"]] * 2, case["groups"])
    module = product_graph(
        aten.conv2d.default, (x, x_coded), (w, AffineEncoding.symmetric(w_scale, w_grid, 0)),
        bias=None if bias is None else int_bias(bias, x_coded.scale * w_scale), rest=rest, out=out,
    )  # fmt: skip
    levels = (x[0].to(torch.int64) - zero).tolist()
    exact = exact_convolution(
        levels, w, case["groups"], case["stride"], case["padding"], case["dilation"]
    )
    for backend in (reference, integer):
        got = backend.lower(module)(x)[0][0].to(torch.int64)
        for (o, i, j), total in exact.items():
            start = 0 if bias is None else int(bias[o])
            expected = requantized(
                total + start, float(x_coded.scale), float(w_scale[o]), float(out.scale),
                out_grid, 3,
            )  # fmt: skip
            assert int(got[o, i, j]) == expected, (backend.__name__, o, i, j)


@pytest.mark.parametrize("signed", [True, False])
def test_ties_go_to_even_and_both_ends_saturate(signed):
    grid = IntGrid(8, signed=signed)
    x = torch.arange(-8, 8).reshape(16, 1).to(torch.int8)
    one = AffineEncoding.per_tensor(1.0, 0, IntGrid(8, signed=True))
    w = (torch.tensor([[1], [100]], dtype=torch.int8), one)
    zero = grid.qmin + 3
    out = AffineEncoding.per_tensor(2.0, zero, grid)
    module = product_graph(aten.linear.default, (x, one), w, out=out)
    expected = [
        [requantized(int(v) * k, 1.0, 1.0, 2.0, grid, zero) for k in (1, 100)] for v in x.flatten()
    ]
    for backend in (reference, integer):
        got = backend.lower(module)(x)[0].to(torch.int64)
        assert got.tolist() == expected
    assert {grid.qmin, grid.qmax} <= set(itertools.chain.from_iterable(expected))


@pytest.mark.parametrize("length", [600, 70_000])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("bias", [0, 1, -(2**30) + 1])
def test_sums_beyond_float32_and_beyond_int32_stay_exact(length, fixed, bias):
    grid, w_grid = IntGrid(8, signed=False), IntGrid(8, signed=True)
    x = torch.full((1, length), 255, dtype=torch.uint8)
    x[0, 0] = 254
    w = torch.full((2, length), 127, dtype=torch.int8)
    w[1] = -128
    coded = AffineEncoding.per_tensor(1.0, 0, grid)
    w_coded = AffineEncoding.symmetric(torch.ones(2), w_grid, 0)
    out = AffineEncoding.per_tensor(2.0**8, 0, IntGrid(16, signed=True))
    start = int_bias(torch.tensor([bias, bias]), torch.ones(2)) if bias else None
    module = product_graph(
        aten.linear.default, (x, coded), (w, w_coded), bias=start, out=out, fixed=fixed
    )
    totals = [sum(x[0].tolist()) * 127 + bias, sum(x[0].tolist()) * -128 + bias]
    expected = [requantized(t, 1.0, 1.0, 2.0**8, IntGrid(16, signed=True), 0) for t in totals]
    for backend in (reference, integer):
        inputs = (x,) if fixed else (x, w)
        assert backend.lower(module)(*inputs)[0][0].tolist() == expected


@pytest.mark.parametrize("length", [10, 600])
def test_an_accumulator_that_is_read_itself_comes_out_in_float32(length):
    x = torch.full((1, length), 255, dtype=torch.uint8)
    w = torch.full((2, length), 127, dtype=torch.int8)
    coded = AffineEncoding.per_tensor(1.0, 0, IntGrid(8, signed=False))
    w_coded = AffineEncoding.symmetric(torch.ones(2), IntGrid(8, signed=True), 0)
    module = product_graph(aten.linear.default, (x, coded), (w, w_coded), fixed=False)
    for backend in (reference, integer):
        found = backend.lower(module)(x, w)[0]
        assert found.dtype is torch.float32
        assert found.tolist() == [[float(np.float32(255 * 127 * length))] * 2]


def test_every_slice_of_channels_is_summed_exactly():
    weight = torch.ones(1, 128, 3, 3, dtype=torch.int8)
    weight[:, :64] = 127  # these alone exceed 2^24, the others do not
    slices = _channel_slices(weight, (0, 255))
    assert slices is not None
    assert [a for a, _ in slices] == [0, *(b for _, b in slices[:-1])]
    assert slices[-1][1] == 128
    for a, b in slices:
        assert 255 * int(weight[:, a:b].to(torch.int64).sum()) < 2**24


@pytest.mark.parametrize(("groups", "kernel"), [(1, (3, 3)), (2, (3, 3)), (1, (9,))])
@pytest.mark.parametrize("start", [0, 7, -(2**29)])
def test_convolutions_beyond_float32_are_summed_in_int32(groups, kernel, start):
    grid, w_grid = IntGrid(8, signed=False), IntGrid(8, signed=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(200, 256, (2, 160 * groups, *(4 + k for k in kernel)), generator=generator)
    w = torch.randint(90, 128, (2 * groups, 160, *kernel), generator=generator)
    w[1] *= -1
    coded = AffineEncoding.per_tensor(0.5, 3, grid)
    w_coded = AffineEncoding.symmetric(torch.full((2 * groups,), 0.25), w_grid, 0)
    bias = int_bias(torch.full((2 * groups,), start), torch.full((2 * groups,), 0.125))
    target, sizes = (aten.conv2d.default, 2) if len(kernel) == 2 else (aten.conv1d.default, 1)
    rest = ([1] * sizes, [1] * sizes, [1] * sizes, groups)
    out = AffineEncoding.per_tensor(2.0**9, 5, IntGrid(16, signed=True))
    module = product_graph(
        target, (x.to(torch.uint8), coded), (w.to(torch.int8), w_coded), bias=bias, rest=rest,
        out=out,
    )  # fmt: skip
    convolve = torch.nn.functional.conv2d if sizes == 2 else torch.nn.functional.conv1d
    exact = convolve(x.double() - 3, w.double(), None, *rest) + start  # exact below 2^53
    assert float(exact.abs().max()) > 2**24
    factor = np.float32(0.125) / np.float32(2.0**9)
    expected = torch.round(exact.float() * float(factor)).add(5).clamp(-(2**15), 2**15 - 1)
    for backend in (reference, integer):
        got = backend.lower(module)(x.to(torch.uint8))[0]
        assert torch.equal(got.to(torch.float32), expected), backend.__name__
    kinds = [str(row) for row in integer.lower(module).explain()]
    assert any("slices of the channels" in kind for kind in kinds) == (groups == 1 and start != 0)


@pytest.mark.parametrize("axis", [0, -2])
def test_negative_channel_axes_mean_the_same(axis):
    generator = torch.Generator().manual_seed(3)
    grid, w_grid = IntGrid(8, signed=False), IntGrid(8, signed=True)
    x, w = codes(generator, (3, 7), grid), codes(generator, (5, 7), w_grid)
    scale = torch.rand(5, generator=generator) + 0.5
    coded = AffineEncoding.per_tensor(0.5, 9, grid)
    w_coded = AffineEncoding.symmetric(scale, w_grid, axis)
    module = product_graph(aten.linear.default, (x, coded), (w, w_coded))
    exact = (x.to(torch.int64) - 9) @ w.to(torch.int64).t()
    expected = exact.to(torch.float32) * (coded.scale * scale)
    assert torch.equal(reference.lower(module)(x)[0], expected)
    assert torch.equal(integer.lower(module)(x)[0], expected)
