# SPDX-License-Identifier: Apache-2.0
"""The fixed-point walk: constants, tables, sizes and wide sums, to the last bits."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from qgraph.backends import integer
from qgraph.backends.fixed_point import LIMIT, ONE
from qgraph.backends.integer.fixed_kernels import convolve, convolve_transposed
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph.trace import trace
from tests.backends.exact import by_axis, coded, decode, drawn, table
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
UNIT = 2.0**-24


@pytest.mark.parametrize("count", [2**16 - 1, 2**16])
@pytest.mark.parametrize("top", [2**31 - 1, 2**31])
def test_large_constants_are_stored_in_int32_where_they_fit(count: int, top: int) -> None:
    b = SingleOp()
    x, values = torch.zeros(count), torch.zeros(count, dtype=torch.float64)  # holds 31 bits
    values[3], values[4] = -(top * UNIT), 0.5
    y = b.call(aten.add.Tensor, b.placeholder("x", x), b.buffer("c", values))
    lowered = integer.lower(b.finish(y), mode="fixed_point")
    stored = [v for n, v in lowered.graph_module.named_buffers() if v.numel() == count]
    narrow = count == 2**16 and top < 2**31
    assert [v.dtype for v in stored] == [torch.int32 if narrow else torch.int64]
    assert stored[0][3:5].tolist() == [-top, ONE // 2]
    assert torch.equal(lowered(x)[0].double(), values.float().double())


def test_constants_beyond_the_range_saturate() -> None:
    b = SingleOp()
    x = torch.tensor([1.0, -1.0, 0.0])
    stored = b.buffer("c", torch.tensor([float("inf"), -1e30, 2.0]))
    (found,) = integer.lower(
        b.finish(b.call(aten.maximum.default, b.placeholder("x", x), stored)), mode="fixed_point"
    )(x)
    assert found.tolist() == [LIMIT / ONE, -1.0, 2.0]


TABLES: dict[str, Encoding] = {
    "one scale": coded(-8, 7, 3), "columns": by_axis(6, 1), "bytes": coded(0, 255, 100),
    "columns with zero points": AffineEncoding(
        scale=2.0 ** -torch.arange(6.0, 12), zero_point=torch.tensor([0, 1, 2, 3, 4, 5]), qmin=-8,
        qmax=7, axis=1,
    ),
    "levels": table(-90, -3, 0, 5, 1000), "rows": by_axis(5, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2)])
def test_rows_of_coded_tables_are_gathered_and_scaled(name: str, shape: tuple[int, ...]) -> None:
    encoding = TABLES[name]
    codes = drawn(encoding, (5, 6), 1)
    index = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(2))
    b = SingleOp()
    node = b.placeholder("i", index)
    held = decode(b, b.buffer("codes", codes), "t", encoding)
    y = b.call(aten.embedding.default, held, node)
    module = b.finish(b.call(aten.mul.Tensor, y, 1.0))
    for mode in ("onnxruntime", "fixed_point"):
        lowered = integer.lower(module, mode=mode)
        assert torch.equal(lowered(index)[0], encoding.decode(codes)[index]), mode
    assert bool(lowered.explain().islands) == (name == "rows")


def test_rows_of_float_tables_are_gathered_by_computed_places() -> None:
    index, table = torch.tensor([[0, 2], [3, 1]]), torch.arange(30.0).view(5, 6) / 64 - 0.2
    b = SingleOp()
    place = b.call(aten.add.Tensor, b.placeholder("i", index), 1)  # a number, no fixed point
    rows = b.call(aten.embedding.default, b.buffer("t", table), place)
    (found,) = integer.lower(b.finish(rows), mode="fixed_point")(index)
    torch.testing.assert_close(found, table[index + 1], atol=UNIT, rtol=0)


@pytest.mark.parametrize(("op", "bound"), [
    (aten.gt.Scalar, 0.5), (aten.ge.Scalar, 0.5), (aten.lt.Scalar, -0.25), (aten.le.Scalar, -0.25),
    (aten.eq.Scalar, 0.5), (aten.ne.Scalar, -1),
])  # fmt: skip
def test_values_are_compared_with_numbers_in_fixed_point(op: Any, bound: float) -> None:
    x = torch.tensor([-1.0, -0.25, -0.25 - UNIT, 0.0, 0.25, 0.5, 0.5 + 2 * UNIT, 1.0])
    b = SingleOp()
    y = b.call(op, b.call(aten.neg.default, b.placeholder("x", -x)), bound)
    lowered = integer.lower(b.finish(y), mode="fixed_point")
    assert torch.equal(lowered(-x)[0], op(x, bound))
    assert not lowered.explain().islands


class Resized(nn.Module):
    """Higher and wider: by sizes of its own, or by factors that torch applies."""

    def __init__(self, mode: str, factors: tuple[float, float], *, by_size: bool) -> None:
        super().__init__()
        self.mode, self.factors, self.by_size = mode, factors, by_size

    def forward(self, x: Tensor) -> Tensor:
        corners = None if self.mode == "nearest" else False
        if self.by_size:
            high, wide = self.factors
            size = (x.shape[2] * int(high), x.shape[3] * int(wide))
            return F.interpolate(torch.neg(x), size, mode=self.mode, align_corners=corners)
        factors = list(self.factors)
        return F.interpolate(
            torch.neg(x), scale_factor=factors, mode=self.mode, align_corners=corners
        )


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("axes", [(2, 3), (2,), (3,)])
def test_open_sizes_are_computed_when_it_runs(
    mode: str, by_size: bool, axes: tuple[int, ...]
) -> None:
    model = Resized(mode, (2.0, 3.0), by_size=by_size).eval()
    sizes = {axis: Dim(f"s{axis}", min=2, max=64) for axis in axes}
    module = trace(model, torch.randn(2, 3, 4, 5), dynamic_shapes={"x": sizes})
    lowered = integer.lower(module, mode="fixed_point")
    assert not lowered.explain().islands
    for high, wide in ((4, 5), (7, 3), (3, 9)):
        x = torch.randn(2, 3, high if 2 in axes else 4, wide if 3 in axes else 5)
        torch.testing.assert_close(lowered(x), model(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("factors", "shape"), [
    ((1.5, 2.0), (4, 7)), ((1.5, 2.0), (5, 6)), ((2.0, 1.5), (5, 7)), ((3.0, 2.0), (5, 7)),
])  # fmt: skip
@pytest.mark.parametrize("open_sizes", [False, True])
def test_factors_that_are_no_ratio_of_sizes_sample_where_torch_does(
    mode: str, factors: tuple[float, float], shape: tuple[int, int], open_sizes: bool
) -> None:
    model, x = Resized(mode, factors, by_size=False).eval(), torch.randn(2, 3, *shape)
    sizes = {axis: Dim(f"s{axis}", min=2, max=64) for axis in (2, 3)} if open_sizes else None
    module = trace(model, x, dynamic_shapes=None if sizes is None else {"x": sizes})
    lowered = integer.lower(module, mode="fixed_point")
    torch.testing.assert_close(lowered(x), model(x), atol=2e-5, rtol=1e-5)
    whole = [
        f.is_integer() or not (open_sizes or size % 2)
        for f, size in zip(factors, shape, strict=True)
    ]
    assert bool(lowered.explain().islands) == (not all(whole))


@pytest.mark.parametrize("op", [aten.linear.default, aten.conv1d.default, aten.conv2d.default,
                                aten.conv_transpose2d.input])  # fmt: skip
@pytest.mark.parametrize("integers", [True, False])
def test_float_biases_are_added_along_the_channels(op: Any, integers: bool) -> None:
    shapes: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {
        aten.linear.default: ((2, 3, 4), (5, 4)), aten.conv1d.default: ((2, 4, 6), (5, 4, 3)),
        aten.conv2d.default: ((2, 4, 6, 7), (5, 4, 3, 2)),
        aten.conv_transpose2d.input: ((2, 4, 3, 5), (4, 5, 3, 2)),
    }  # fmt: skip
    data, weight = shapes[op]
    x_grid, grid = coded(0, 255, 9), coded(-8, 7)
    x, w = drawn(x_grid, data, 3), drawn(grid, weight, 4)
    bias = torch.arange(5.0) / 4 - 0.5 if integers else torch.arange(5.0) / 3
    b = SingleOp()
    read = decode(b, b.placeholder("x", x), "x", x_grid)
    args = (read, decode(b, b.buffer("w", w), "w", grid), b.buffer("bias", bias))
    module = b.finish(b.call(op, *args))
    exact = op(x_grid.decode(x).double(), grid.decode(w).double(), bias.double())
    for mode in ("onnxruntime", "fixed_point"):
        (found,) = integer.lower(module, mode=mode)(x)
        torch.testing.assert_close(found.double(), exact, atol=2 * UNIT, rtol=2.0**-22)


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-8, 2.0**-6, 2.0**-3])
def test_sums_that_may_need_more_than_32_bits_are_scaled_right(scale: float) -> None:
    grid = AffineEncoding(
        scale=torch.tensor(scale), zero_point=torch.tensor(0), qmin=-(2**15), qmax=2**15 - 1
    )
    x = torch.zeros(4, 70_000, dtype=torch.int32)
    x[:, 0] = torch.tensor([5, -3, 100, 1])
    b = SingleOp()
    w = torch.full((1, 70_000), 127, dtype=torch.int8)
    read = decode(b, b.placeholder("x", x), "x", grid)
    one = AffineEncoding(scale=torch.tensor(1.0), zero_point=torch.tensor(0), qmin=-128, qmax=127)
    module = b.finish(b.call(aten.linear.default, read, decode(b, b.buffer("w", w), "w", one)))
    (found,) = integer.lower(module, mode="fixed_point")(x)
    assert torch.equal(found[:, 0].double(), x[:, 0].double() * 127 * scale)


def test_parts_of_a_split_and_comparisons_stay_integers() -> None:
    b = SingleOp()
    x = torch.randn(3, 6)
    parts = b.call(aten.split.Tensor, b.placeholder("x", x), 2, 1)
    first, last = (b.call(operator.getitem, parts, k) for k in (0, 2))
    results = [
        b.call(aten.add.Tensor, first, last), b.call(aten.le.Tensor, first, last),
        b.call(aten.argmin.default, last, 1), b.call(aten.ne.Scalar, first, 0.0),
    ]  # fmt: skip
    b.graph.output(tuple(results))
    b.module.recompile()
    lowered = integer.lower(b.module, mode="fixed_point")
    total, less, place, other = lowered(x)
    torch.testing.assert_close(total, x[:, :2] + x[:, 4:], atol=UNIT, rtol=1e-6)
    assert torch.equal(less, x[:, :2] <= x[:, 4:])
    assert torch.equal(place, x[:, 4:].argmin(1))
    assert other.all()
    assert not lowered.explain().islands


@pytest.mark.parametrize("groups", [1, 2])
def test_integer_convolutions_of_one_axis_equal_the_float_ops(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (2, 4, 7), generator=generator, dtype=torch.int32)
    w = torch.randint(-9, 9, (6, 4 // groups, 3), generator=generator, dtype=torch.int32)
    v = torch.randint(-9, 9, (4, 6 // groups, 3), generator=generator, dtype=torch.int32)
    for stride, padding, dilation in ((1, 0, 1), (2, 1, 2), ([3], [2], [1]), ([1], 2, [3])):
        got = convolve(x, w, None, stride, padding, dilation, groups)
        wanted = F.conv1d(x.double(), w.double(), None, stride, padding, dilation, groups)
        assert torch.equal(got.double(), wanted)
        extra = 0 if stride == 1 else [1] if isinstance(stride, list) and stride[0] > 1 else 0
        got = convolve_transposed(x, v, None, stride, padding, extra, groups, dilation)
        rest = (None, stride, padding, extra, groups, dilation)
        assert torch.equal(got.double(), F.conv_transpose1d(x.double(), v.double(), *rest))


def test_arguments_left_out_are_those_of_the_float_ops() -> None:
    x, weight = torch.arange(60).reshape(1, 2, 5, 6) % 7, torch.arange(48).reshape(2, 4, 2, 3) % 5
    for ours, theirs, w in (
        (convolve, F.conv2d, weight.transpose(0, 1)),
        (convolve_transposed, F.conv_transpose2d, weight),
    ):
        found, wanted = ours(x.int(), w.int()), theirs(x.double(), w.double())
        assert torch.equal(found.double(), wanted)
