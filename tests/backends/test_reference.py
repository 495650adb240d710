# SPDX-License-Identifier: Apache-2.0
"""The reference backend against Python integers and numpy's float32, node by node."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qgraph.backends import integer, reference
from qgraph.backends.integer.module import fixed_point_reference
from qgraph.backends.semantics import analyze
from qgraph.formats import AffineEncoding
from tests.backends.exact import by_axis, coded, decode, drawn, encode, insert_product
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
Floats = np.ndarray


def free(count: int, axis: int, zeros: int = 9) -> AffineEncoding:
    """Scales that no power of two ties together, three different ones."""
    scale = torch.tensor([0.3, 0.011, 1.7])[torch.arange(count) % 3]
    zero = zeros * (torch.arange(count) % 2)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=-128, qmax=127, axis=axis)


def numbers(codes: Tensor, encoding: AffineEncoding) -> Floats:
    """int64 levels."""
    zero = encoding.zero_point.long()
    if encoding.axis is not None:
        zero = zero.view([-1 if d == encoding.axis else 1 for d in range(codes.ndim)])
    found: Floats = (codes.long() - zero).numpy()
    return found


CONV = ([2, 1], [1, 0], [1, 2], 1)
PRODUCTS: list[tuple[Any, tuple[int, ...], int, tuple[int, ...], tuple[Any, ...]]] = [
    (aten.linear.default, (2, 5, 6), 2, (4, 6), ()),
    (aten.conv2d.default, (2, 6, 5, 7), 1, (4, 6, 3, 2), CONV),
    (aten.conv1d.default, (2, 6, 9), 1, (4, 6, 3), ([2], [1], [1], 1)),
    (aten.conv_transpose2d.input, (2, 6, 3, 4), 1, (6, 4, 3, 2), ([2, 1], [1, 0], [1, 0], 1)),
]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("target", "shape", "axis", "weights", "rest"), PRODUCTS)
def test_groups_of_free_scales_are_summed_apart_and_then_the_bias(
    target, shape, axis, weights, rest, bias
) -> None:
    data = free(6, axis)
    x, w = drawn(data, shape, 1), drawn(coded(-128, 127), weights, 2)
    builder = SingleOp()
    nodes = [
        decode(builder, builder.placeholder("x", x), "x", data),
        decode(builder, builder.buffer("w", w), "w", coded(-128, 127)),
    ]
    offsets = torch.tensor([0.5, -3.25, 100.0, 7.0])
    args = [builder.buffer("b", offsets)] if bias else [None] if rest else []
    got = reference.lower(builder.finish(builder.call(target, *nodes, *args, *rest)))(x)[0]
    total: Any = 0
    for scale in sorted({float(s) for s in data.scale}):
        inside = (data.scale == scale).view([-1 if d == axis else 1 for d in range(x.ndim)])
        silenced = torch.from_numpy(numbers(x, data)) * inside
        part = target(silenced.double(), w.double(), *([None, *rest] if rest else []))
        factor = np.float32(scale) * np.float32(2.0**-10)
        total = total + part.numpy().astype(np.float32) * factor
    shaped = offsets.view([-1] + [1] * (x.ndim - 2)) if rest else offsets
    expected = total + shaped.numpy() if bias else total
    assert expected.dtype == np.float32
    assert (got.numpy() == expected).all()


@pytest.mark.parametrize(("target", "shape", "axis", "weights", "rest"), PRODUCTS)
@pytest.mark.parametrize("scale", [2.0**-20, 0.0371])
def test_a_bias_joins_the_integers_only_on_their_own_scale(
    target, shape, axis, weights, rest, scale
) -> None:
    grid = coded(-128, 127, 3)
    x, w = drawn(grid, shape, 3), drawn(coded(-128, 127), weights, 4)
    own = AffineEncoding(
        scale=torch.tensor(scale), zero_point=torch.tensor(0), qmin=-(2**31), qmax=2**31 - 1
    )
    codes = torch.tensor([2**24 - 1, -12345, 7, -1], dtype=torch.int32)
    builder = SingleOp()
    stored = [builder.placeholder("x", x), builder.buffer("w", w), builder.buffer("b", codes)]
    grids = (grid, coded(-128, 127), own)
    args = [
        decode(builder, node, name, encoding)
        for node, name, encoding in zip(stored, "xwb", grids, strict=True)
    ]
    got = reference.lower(builder.finish(builder.call(target, *args, *rest)))(x)[0].numpy()
    levels = torch.from_numpy(numbers(x, grid)).double()
    exact = target(levels, w.double(), *([None, *rest] if rest else [])).numpy()
    shape_of_bias = [-1] + [1] * (x.ndim - 2) if rest else [-1]
    added = codes.numpy().astype(np.float64).reshape(shape_of_bias)
    one = np.float32(2.0**-20)
    if scale == 2.0**-20:
        expected = (exact + added).astype(np.float32) * one
    else:
        expected = exact.astype(np.float32) * one + added.astype(np.float32) * np.float32(scale)
    assert (got == expected).all()


SHIFTED = [
    *(
        (target, shape, axis, weights, rest, True)
        for target, shape, axis, weights, rest in PRODUCTS
    ),
    *((aten.matmul.default, (2, 5, 6), 2, (6, 4), (), fixed) for fixed in (True, False)),
    *((aten.matmul.default, (2, 5, 6), 2, (2, 6, 4), (), fixed) for fixed in (True, False)),
    (aten.linear.default, (2, 5, 6), 2, (4, 6), (), False),
]


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize(("target", "shape", "axis", "weights", "rest", "fixed"), SHIFTED)
def test_channels_whose_scales_are_powers_of_two_apart_are_shifted(
    target, shape, axis, weights, rest, fixed, first
) -> None:
    steps = (torch.arange(6) + first) % 4
    data = AffineEncoding(
        scale=2.0**-10 * 2.0**-steps, zero_point=steps - 2, qmin=-128, qmax=127, axis=axis
    )
    x, w = drawn(data, shape, 5), drawn(coded(-128, 127), weights, 6)
    builder = SingleOp()
    node = insert_product(
        builder, target, (x, data), (w, coded(-128, 127)), None, rest, fixed=fixed
    )
    inputs = (x,) if fixed else (x, w)
    module = builder.finish(node)
    along = [-1 if d == axis else 1 for d in range(x.ndim)]
    levels = torch.from_numpy(numbers(x, data)).double() * (2.0 ** (3 - steps.double())).view(along)
    exact = target(levels, w.double(), *([None, *rest] if rest else []))
    wanted = exact.float() * data.scale.min() * 2.0**-10
    for lower in (reference.lower, integer.lower, fixed_point_reference):
        assert torch.equal(lower(module)(*inputs)[0], wanted), lower


def test_one_multiplication_not_two_roundings_makes_the_codes() -> None:
    """Accumulators are picked for which dividing the materialised value gives another code."""
    s, out = np.float32(0.0123) * np.float32(0.0077), np.float32(0.00031)
    sums = np.arange(-(2**17), 2**17)
    once = np.round(sums.astype(np.float32) * (s / out))
    twice = np.round(sums.astype(np.float32) * s / out)
    picked = sums[(once != twice) & (np.abs(once) < 30000)][:40]
    assert len(picked) >= 10
    wide = AffineEncoding(
        scale=torch.tensor(0.0123), zero_point=torch.tensor(0), qmin=-(2**17), qmax=2**17
    )
    one = AffineEncoding(
        scale=torch.tensor(0.0077), zero_point=torch.tensor(0), qmin=-128, qmax=127
    )
    target = AffineEncoding(
        scale=torch.tensor(float(out)), zero_point=torch.tensor(5), qmin=-32768, qmax=32767
    )
    x, w = torch.from_numpy(picked).int().view(-1, 1), torch.ones(1, 1, dtype=torch.int32)
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, wide), (w, one))
    got = reference.lower(builder.finish(encode(builder, node, "out", target)))(x)[0]
    wanted = np.round(picked.astype(np.float32) * (s / out)) + 5
    assert got.flatten().tolist() == wanted.astype(int).tolist()
    blocked = AffineEncoding(
        scale=target.scale.expand(4, 1), zero_point=target.zero_point.expand(4, 1),
        qmin=-32768, qmax=32767, axis=0, block=(len(picked) + 3) // 4,
    )  # fmt: skip
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, wide), (w, one))
    got = reference.lower(builder.finish(encode(builder, node, "out", blocked)))(x)[0]
    wanted = np.round(picked.astype(np.float32) * s / out) + 5
    assert got.flatten().tolist() == wanted.astype(int).tolist()


MOVES: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.transpose.int, (0, 2)), (aten.permute.default, ([2, 0, 1],)),
    (aten.reshape.default, ([6, 4],)), (aten.slice.Tensor, (1, 1, 3)),
    (aten.slice.Tensor, (2, 1, 4, 2)), (aten.select.int, (0, 1)), (aten.unsqueeze.default, (1,)),
    (aten.flatten.using_ints, (0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize(("target", "rest"), MOVES, ids=[str(t) for t, _ in MOVES])
def test_pending_sums_move_with_their_scales(target, rest, by_channel) -> None:
    grid, weights = coded(-128, 127), by_axis(4, 0) if by_channel else coded(-128, 127)
    x, w = drawn(grid, (2, 3, 5), 7), drawn(weights, (4, 5), 8)
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, grid), (w, weights))
    moved = builder.call(aten.relu.default, builder.call(target, node, *rest))
    got = reference.lower(builder.finish(moved))(x)[0]
    plain = (x.double() @ w.double().t()).float() * (weights.scale * 2.0**-10)
    assert torch.equal(got, target(plain, *rest).clamp_min(0))


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pending_sums_are_split_with_their_scales(axis: int, by_channel: bool) -> None:
    grid, weights = coded(-128, 127), by_axis(4, 0) if by_channel else coded(-128, 127)
    x, w = drawn(grid, (3, 5, 6), 7), drawn(weights, (4, 6), 8)
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, grid), (w, weights))
    split = builder.call(aten.split.Tensor, node, 2, axis)
    parts = [builder.call(operator.getitem, split, i) for i in range(2)]
    builder.graph.output(tuple(parts))
    builder.module.recompile()
    got = reference.lower(builder.module)(x)
    plain = (x.double() @ w.double().t()).float() * (weights.scale * 2.0**-10)
    for ours, theirs in zip(got, plain.split(2, axis)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_an_observer_sees_codes_and_what_it_returns_goes_on() -> None:
    grid = coded(0, 255, 7)
    x = torch.linspace(-0.01, 0.2, 24).view(2, 3, 4)
    builder = SingleOp()
    first = encode(builder, builder.placeholder("x", x), "first", grid)
    double = builder.call(aten.mul.Tensor, decode(builder, first, "first", grid), 2.0)
    second = encode(builder, double, "second", grid)
    model = reference.lower(builder.finish(decode(builder, second, "second", grid)))
    expected = {"first": torch.round(x * 1024).add(7).clamp(0, 255)}
    doubled = ((expected["first"] - 7) * 2 + 7).clamp(0, 255)
    seen: dict[str, Tensor] = {}

    def watch(node: Any, codes: Tensor) -> Tensor:
        seen[node.name] = codes
        return codes + 1 if node is first else codes

    got = model.run((x,), {}, watch)[0]
    assert torch.equal(seen[first.name].float(), expected["first"])
    assert torch.equal(model(x)[0], (doubled - 7) / 1024)
    wanted = (((expected["first"] + 1 - 7) * 2 + 7).clamp(0, 255) - 7) / 1024
    assert torch.equal(got, wanted)
    assert set(seen) == {first.name, second.name}


@pytest.mark.parametrize("size", [[7, 5], [3, 9]])
def test_levels_are_resampled_before_their_scale(size: list[int]) -> None:
    grid = AffineEncoding(scale=torch.tensor(0.0371), zero_point=torch.tensor(20), qmin=0, qmax=255)
    x = drawn(grid, (2, 3, 4, 6), 9)
    builder = SingleOp()
    read = decode(builder, builder.placeholder("x", x), "x", grid)
    node = builder.call(aten.upsample_bilinear2d.default, read, size, False)
    got = reference.lower(builder.finish(node))(x)[0]
    expected = aten.upsample_bilinear2d.default((x - 20).float(), size, False) * grid.scale
    assert torch.equal(got, expected)


@pytest.mark.parametrize("view", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_float_ops_see_one_layout_however_their_input_lies(view: tuple[int, ...]) -> None:
    grid = coded(-128, 127, 5)
    codes = drawn(grid, (3, 4, 5, 7), 10)
    read = (codes - 5).float() * 2.0**-10
    lying = codes.permute(view).contiguous().permute(torch.tensor(view).argsort().tolist())
    assert torch.equal(lying, codes)
    for target, rest in ((aten.softmax.int, (1,)), (aten.mean.dim, ([1, 2],)),
                         (aten.layer_norm.default, ([7],))):  # fmt: skip
        builder = SingleOp()
        node = decode(builder, builder.placeholder("x", codes), "x", grid)
        model = reference.lower(builder.finish(builder.call(target, node, *rest)))
        assert torch.equal(model(lying)[0], target(read, *rest))


@pytest.mark.parametrize(("steps", "growth"), [((0, 0, 0), 1), ((0, 1, 1), 2), ((3, 0, 2), 8)])
def test_bounds_of_computed_operands_grow_with_the_largest_shift(steps, growth) -> None:
    scale = 2.0**-12 * 2.0 ** torch.tensor(steps)
    data = AffineEncoding(scale=scale, zero_point=torch.zeros(3), qmin=-128, qmax=127, axis=2)
    x, w = drawn(data, (2, 5, 3), 1), drawn(coded(-128, 127), (3, 4), 2)
    builder = SingleOp()
    node = insert_product(builder, aten.matmul.default, (x, data), (w, coded(-128, 127)),
                          fixed=False)  # fmt: skip
    (form,) = analyze(builder.finish(node)).products.values()
    assert form.bound == growth * 3 * 128 * 128


@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_of_a_bias_are_kept_where_each_channel_has_its_scale(per_channel: bool) -> None:
    grid, weights = coded(-128, 127), by_axis(4, 0) if per_channel else coded(-128, 127)
    x, w = drawn(grid, (3, 6), 1), drawn(weights, (4, 6), 2)
    bias = torch.tensor([5, -7, 0, 2**25 + 1])
    builder = SingleOp()
    node = insert_product(builder, aten.linear.default, (x, grid), (w, weights), bias)
    (form,) = analyze(builder.finish(node)).products.values()
    assert form.bias is None
    assert form.bias_codes is not None
    assert form.bias_codes.tolist() == bias.tolist()


@pytest.mark.parametrize("channels", [2, 4])
def test_scales_by_channel_of_a_grouped_convolution_stay_in_float(channels: int) -> None:
    data = by_axis(channels, 1)
    x, w = drawn(data, (2, channels, 4, 3), 1), drawn(coded(-128, 127), (4, channels // 2, 1, 1), 2)
    builder = SingleOp()
    rest = ([1, 1], [0, 0], [1, 1], 2)
    node = insert_product(
        builder, aten.conv2d.default, (x, data), (w, coded(-128, 127)), None, rest
    )
    module = builder.finish(node)
    found = analyze(module)
    assert not found.products
    assert found.reasons[node] == "channel groups of scales in a grouped convolution"
    wanted = aten.conv2d.default(data.decode(x), w * 2.0**-10, None, *rest)
    assert torch.equal(reference.lower(module)(x)[0], wanted)
