# SPDX-License-Identifier: Apache-2.0
"""Quantizers and kernels of the fixed-point mode where all numbers are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qgraph.backends import integer
from qgraph.formats import AffineEncoding, LevelEncoding
from tests.backends.exact import (
    by_axis,
    check,
    coded,
    decode,
    drawn,
    encode,
    insert_product,
    product_of,
    row_of,
)
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
ENDS = [(-128, 127), (0, 255), (-8, 7), (-2048, 2047)]


def target(ends: tuple[int, int], axis: int | None, step: float) -> AffineEncoding:
    """Five channels (or one scale) whose steps double, with zero points of their own."""
    qmin, qmax = ends
    count = torch.arange(5 if axis is not None else 1)
    scale, zero = step * 2.0**count, qmin + (count * 3 + 2) % (qmax - qmin)
    if axis is None:
        scale, zero = scale[0], zero[0]
    return AffineEncoding(scale=scale, zero_point=zero, qmin=qmin, qmax=qmax, axis=axis)


def codes(values: Tensor, grid: AffineEncoding) -> Tensor:
    """Codes of exact values, halves upwards as fixed point rounds them."""
    shape = [-1 if d == grid.axis else 1 for d in range(values.ndim)]
    shape = shape if grid.axis is not None else []
    scale, zero = grid.scale.double().view(shape), grid.zero_point.view(shape)
    found = torch.floor(values.double() / scale + 0.5) + zero
    return found.clamp(grid.qmin, grid.qmax).int()


def found_codes(module: Any, *inputs: Tensor) -> Tensor:
    """Codes of the only activation quantizer in fixed point."""
    seen: dict[str, Tensor] = {}
    lowered = integer.lower(module, mode="fixed_point")
    lowered.run(inputs, {}, seen.setdefault)
    (only,) = seen.values()
    return only


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_sums_are_requantized_along_any_axis_also_behind_a_move(ends, axis, moved, clamp) -> None:
    if moved and axis is None and clamp:
        return
    grid, weights = coded(-128, 127, 5), by_axis(5, 0, -8, 7)
    x, w = drawn(grid, (5, 5, 6), 1), drawn(weights, (5, 6), 2)
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, grid), (w, weights))
    values = ((x - 5).double() @ w.double().t()) * weights.scale.double() * 2.0**-10
    if moved:
        node = builder.call(aten.transpose.int, node, 0, 2)
        values = values.transpose(0, 2)
    if clamp:
        node, values = builder.call(aten.relu.default, node), values.clamp_min(0)
    out = target(ends, axis, 2.0**-15)
    module = builder.finish(decode(builder, encode(builder, node, "out", out), "out", out))
    assert torch.equal(found_codes(module, x), codes(values, out))
    got = integer.lower(module, mode="fixed_point")(x)[0]
    assert torch.equal(got, out.decode(codes(values, out)))


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_fixed_point_values_are_quantized_along_any_axis(ends, axis) -> None:
    steps = torch.randint(-(2**16), 2**16, (5, 5, 5), generator=torch.Generator().manual_seed(3))
    x = steps * 2.0**-12
    out = target(ends, axis, 2.0**-6)
    builder = SingleOp()
    node = builder.call(aten.neg.default, builder.placeholder("x", x))
    module = builder.finish(decode(builder, encode(builder, node, "out", out), "out", out))
    assert torch.equal(found_codes(module, x), codes(-x, out))


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("count", [3, 7, 300])
def test_ranks_of_values_count_the_thresholds_below_them(axis: int | None, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(-2000, 2000, (count,), generator=generator).unique()
    scale = 2.0**-8 * 2.0 ** torch.arange(4.0) if axis is not None else torch.tensor(2.0**-8)
    rows = levels.repeat(4, 1) + torch.arange(4).view(-1, 1) if axis is not None else levels
    out = LevelEncoding.nearest("any", scale, rows, storage_bits=16, axis=axis)
    x = torch.randint(-(2**16), 2**16, (4, 4, 4), generator=generator) * 2.0**-11
    x.view(-1)[:9] = -(out.thresholds.reshape(-1)[:9] * 2.0**-8)[: x.numel()].repeat(9)[:9]
    builder = SingleOp()
    node = builder.call(aten.neg.default, builder.placeholder("x", x))
    module = builder.finish(decode(builder, encode(builder, node, "out", out), "out", out))
    cuts = out.thresholds.double() * scale.double().view(-1, 1) if axis is not None else (
        out.thresholds.double() * scale.double()
    )  # fmt: skip
    wanted = torch.empty(x.shape, dtype=torch.int32)
    for place in torch.cartesian_prod(*[torch.arange(4)] * 3).tolist():
        row = cuts[place[axis]] if axis is not None else cuts
        wanted[tuple(place)] = int((row < -float(x[tuple(place)])).sum())
    assert torch.equal(found_codes(module, x), wanted)


def test_places_of_extrema_and_masks_are_what_they_are_in_floats() -> None:
    x = torch.tensor([[0.5, -2.0, 3.25], [3.25, 0.0, 3.0], [-1.0, -7.5, -1.5]])
    for op, rest in (
        (aten.argmax.default, (1, False)), (aten.argmin.default, (0, True)),
        (aten.argmax.default, ()), (aten.any.dim, (1,)), (aten.all.dim, (0,)),
        (aten.amax.default, ([1],)),
        (aten.eq.Scalar, (0,)), (aten.gt.Scalar, (0,)), (aten.le.Scalar, (0,)),
        (aten.lt.Scalar, (0,)), (aten.ge.Scalar, (0,)), (aten.ne.Scalar, (0,)),
    ):  # fmt: skip
        builder = SingleOp()
        node = builder.call(aten.neg.default, builder.placeholder("x", x))
        module = builder.finish(builder.call(op, node, *rest))
        lowered = integer.lower(module, mode="fixed_point")
        got, wanted = lowered(x)[0], op(-x, *rest)
        assert got.dtype is wanted.dtype
        assert torch.equal(got, wanted), op
        assert not lowered.explain().islands, op


KERNELS: list[tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...], str]] = [
    (aten.linear.default, (2, 3, 6), (4, 6), (), "_int_mm"),
    (aten.matmul.default, (2, 3, 6), (6, 4), (), "_int_mm"),
    (aten.matmul.default, (2, 3, 6), (2, 6, 4), (), "int32 on levels"),
    (aten.bmm.default, (2, 3, 6), (2, 6, 4), (), "int32 on levels"),
    (aten.conv2d.default, (2, 3, 6, 5), (4, 3, 2, 3), ([1, 2], [1, 0], [2, 1], 1),
     "int32 on levels"),
    (aten.conv1d.default, (2, 3, 6), (4, 3, 2), ([2], [1], [1], 1), "int32 on levels"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "weights", "rest", "kernel"), KERNELS)
@pytest.mark.parametrize("bias", [False, True])
def test_matrices_of_codes_run_in_int8_and_all_else_on_levels(
    op, shape, weights, rest, kernel, bias
) -> None:
    if bias and op in {aten.matmul.default, aten.bmm.default}:
        return
    grid, stored = coded(0, 255, 77), coded(-128, 127)
    x, w = drawn(grid, shape, 5), drawn(stored, weights, 6)
    start = torch.tensor([7, -9, 0, 1234]) if bias else None
    assert check(op, (x, grid), (w, stored), start, rest)[1].kernel == kernel


@pytest.mark.parametrize(("shape", "weights"), [((3, 6), (6, 4)), ((2, 3, 6), (2, 6, 4))])
def test_scales_along_the_contraction_shift_the_data_of_computed_operands(shape, weights) -> None:
    grid, plain = by_axis(6, len(shape) - 1), coded(-128, 127, 9)
    x, w = drawn(grid, shape, 5), drawn(plain, weights, 6)
    check(aten.matmul.default, (x, grid), (w, plain), fixed=False)
    for bits in (2**3, 2**7):  # scales of 1 and of that many
        wide = AffineEncoding(
            scale=torch.tensor([1.0, bits, 1.0, bits, bits, 1.0]) * 2.0**-14,
            zero_point=torch.zeros(6), qmin=-128, qmax=127, axis=len(shape) - 1,
        )  # fmt: skip
        check(aten.matmul.default, (x, wide), (w, plain), fixed=False)


@pytest.mark.parametrize(("columns", "dtype"), [(2**17 - 1, "int32"), (2**17, "int64")])
def test_sums_of_exactly_two_to_the_31_take_64_bits(columns: int, dtype: str) -> None:
    grid = coded(-128, 127)
    x = torch.full((1, columns), -128, dtype=torch.int32)
    w = torch.full((1, columns), -128, dtype=torch.int32)
    module = product_of(aten.linear.default, (x, grid), (w, grid))
    assert row_of(module, "fixed_point").kernel == f"{dtype} on levels"
    wanted = min(columns * 2.0**14 * 2.0**-20, 2.0**14)
    assert float(integer.lower(module, mode="fixed_point")(x)[0]) == wanted


@pytest.mark.parametrize("slope", [0.9, 0.01, 1.0, 0.5])
def test_what_is_positive_passes_a_leaky_rectifier_unchanged(slope: float) -> None:
    x = torch.arange(-5, 6) * 2.0**-24
    builder = SingleOp()
    node = builder.call(aten.neg.default, builder.placeholder("x", x))
    module = builder.finish(builder.call(aten.leaky_relu.default, node, slope))
    got = integer.lower(module, mode="fixed_point")(x)[0]
    assert torch.equal(got[:6], -x[:6])
    assert got[6:].tolist() == [-(int(i * slope + 0.5 - 1e-9)) * 2.0**-24 for i in range(1, 6)]


def test_pools_to_one_place_average_each_channel_apart() -> None:
    for op, shape, size in ((aten.adaptive_avg_pool2d.default, (2, 3, 4, 8), [1, 1]),
                            (aten.adaptive_avg_pool1d.default, (2, 3, 8), [1]),
                            (aten.avg_pool2d.default, (2, 3, 4, 8), [2]),
                            (aten.avg_pool2d.default, (2, 3, 4, 8), [4, 2])):  # fmt: skip
        x = torch.randint(-999, 999, shape, generator=torch.Generator().manual_seed(8)) * 2.0**-10
        builder = SingleOp()
        node = builder.call(aten.neg.default, builder.placeholder("x", x))
        module = builder.finish(builder.call(op, node, size))
        assert torch.equal(integer.lower(module, mode="fixed_point")(x)[0], op(-x, size)), op


def test_sums_finer_than_fixed_point_are_rounded_once_also_behind_a_move() -> None:
    fine = AffineEncoding(
        scale=torch.tensor(2.0**-13), zero_point=torch.tensor(0), qmin=-128, qmax=127
    )
    out = target((-128, 127), None, 2.0**-25)  # half a unit of fixed point
    x, w = torch.arange(-6, 6, dtype=torch.int32).view(4, 3), torch.eye(3, dtype=torch.int32)
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, fine), (w, fine))
    node = builder.call(aten.transpose.int, node, 0, 1)
    module = builder.finish(decode(builder, encode(builder, node, "out", out), "out", out))
    assert torch.equal(found_codes(module, x), codes(x.double().t() * 2.0**-26, out))
