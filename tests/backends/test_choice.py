# SPDX-License-Identifier: Apache-2.0
"""Every kernel gives the exact product, and is chosen exactly where it can."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qgraph.backends import integer
from qgraph.backends.integer import choice
from qgraph.backends.integer.kernels import has_exact_u8_kernels
from qgraph.formats import AffineEncoding, Encoding
from tests.backends.exact import (
    accumulator,
    by_axis,
    check,
    coded,
    drawn,
    levels,
    product_of,
    row_of,
    table,
    values,
)

aten = torch.ops.aten
needs_kernels = pytest.mark.skipif(not has_exact_u8_kernels(), reason="no exact int8 kernels here")

# name: encoding, 8-bit planes it is the sum of (0: its codes are bytes already)
DATA: dict[str, tuple[Encoding, int]] = {
    "bytes": (coded(0, 255, 7), 0),
    "signed bytes": (coded(-128, 127, -5), 0),
    "5 bits": (coded(-16, 15, 3), 0),
    "words": (coded(-(2**15), 2**15 - 1, -300), 2),
    "unsigned words": (coded(0, 2**16 - 1, 40_000), 2),
    "12 bits": (coded(0, 4095, 700), 2),
    "small table": (table(-128, -7, 0, 3, 99, 127), 1),
    "wide table": (table(-4000, -9, 0, 1, 300, 5000), 2),
    "widest table": (table(-90_000, -9, 0, 1, 300, 100_000), 3),
}
WEIGHTS: dict[str, tuple[int, int, int]] = {  # code range, planes
    "8 bits": (-128, 127, 1), "9 bits": (-256, 255, 2), "16 bits": (-(2**15), 2**15 - 1, 3),
}  # fmt: skip
# name: op, shapes of data and weight, output axis of the weight, rest, int8 kernel, has planes
OPS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], int, tuple[Any, ...], str, bool]] = {
    "linear": (aten.linear.default, (2, 4, 11), (3, 11), 0, (), "onednn qlinear u8s8", True),
    "matmul": (aten.matmul.default, (2, 4, 11), (11, 3), 1, (), "onednn qlinear u8s8", True),
    "conv2d": (
        aten.conv2d.default, (2, 4, 9, 8), (6, 2, 3, 2), 0, ([2, 1], [1, 2], [1, 2], 2),
        "onednn qconv u8s8", True,
    ),
    "conv1d": (
        aten.conv1d.default, (2, 4, 11), (6, 2, 3), 0, ([2], [1], [2], 2), "onednn qconv u8s8",
        False,
    ),
    "patches back": (
        aten.conv_transpose2d.input, (2, 4, 3, 5), (4, 3, 2, 2), 1, ([2, 2],),
        "onednn qconv u8s8 + shuffle", False,
    ),
    "overlapping": (
        aten.conv_transpose2d.input, (2, 4, 3, 5), (4, 3, 3, 2), 1, ([2, 1], [1, 0], [1, 0]), "",
        False,
    ),
}  # fmt: skip


def floats(sums: float) -> str:
    return "float32 on levels" if sums < 2**24 else "float64 on levels"


@needs_kernels
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("op", OPS)
def test_every_operand_width_has_its_kernel_and_the_exact_product(op: str, data: str) -> None:
    target, shape, weight_shape, axis, rest, native, has_planes = OPS[op]
    encoding, planes = DATA[data]
    x = drawn(encoding, shape, 1)
    for name, (low, high, digits) in WEIGHTS.items():
        w_coded = by_axis(weight_shape[axis], axis, low, high)
        w = drawn(w_coded, weight_shape, 2)
        with_bias = op != "matmul"
        start = torch.arange(weight_shape[axis]) * 7 - 7 if with_bias else None
        row, fixed = check(target, (x, encoding), (w, w_coded), start, rest)
        reach = float(levels(x, encoding).abs().max())
        taps = w.double().abs().movedim(axis, 0).flatten(1).sum(1).max()
        sums = reach * float(taps) + 7 * weight_shape[axis]
        wanted = floats(sums)
        if not planes and digits == 1 and native:
            wanted = native
        elif has_planes and max(planes, 1) * digits <= 3:
            wanted = f"onednn u8s8 x {max(planes, 1) * digits} planes"
        if sums < 2**23 or sums > 2**25 or "onednn" in wanted:
            assert row.kernel == wanted, name
        fast = op in {"linear", "matmul"} and not planes and digits == 1
        wide = "int32 on levels" if sums < 2**30 else "int64 on levels"
        if sums < 2**30 or sums > 2**32 or fast:
            assert fixed.kernel == ("_int_mm" if fast else wide), name
        assert row.data == encoding.describe()


def linear(w: list[list[int]], bias: list[int] | None, encoding: AffineEncoding) -> tuple[str, str]:
    """Kernels of a linear in both modes, its product checked at both ends of the data's range."""
    weight = torch.tensor(w, dtype=torch.int32)
    x = torch.stack([torch.full(weight.shape[1:], v) for v in (encoding.qmin, encoding.qmax)])
    x = torch.cat([x, torch.where(weight > 0, encoding.qmax, encoding.qmin)]).to(torch.int32)
    w_coded = coded(min(int(weight.min()), -1), max(int(weight.max()), 1))
    start = None if bias is None else torch.tensor(bias)
    rows = check(aten.linear.default, (x, encoding), (weight, w_coded), start)
    return rows[0].kernel, rows[1].kernel


def spread(total: int, most: int = 127) -> list[int]:
    """Weights of at most `most` that add up to a total."""
    whole, rest = divmod(total, most)
    return [most] * whole + [rest]


@needs_kernels
@pytest.mark.parametrize(
    ("number", "fits"), [(-128, True), (127, True), (-129, False), (128, False)]
)
def test_weights_fill_int8_and_no_more(number: int, fits: bool) -> None:
    kernels = linear([[number, 5, 1], [0, 1, 2]], None, coded(0, 255, 3))
    assert kernels == (
        ("onednn qlinear u8s8", "_int_mm") if fits
        else ("onednn u8s8 x 2 planes", "int32 on levels")
    )  # fmt: skip


TOP = 2**24
FITS: dict[str, tuple[list[list[int]], list[int], bool]] = {
    "the largest sum": ([[10, -1]], [TOP - 2550 - 1], True),
    "the largest sum, one more": ([[10, -1]], [TOP - 2550], False),
    "the smallest sum": ([[-10, 1]], [2550 - TOP + 1], True),
    "the smallest sum, one less": ([[-10, 1]], [2550 - TOP], False),
    "positive weights": ([spread(65_793)], [-300], True),
    "positive weights, one more": ([spread(65_794)], [-300], False),
    "negative weights": ([[-v for v in spread(65_793)]], [300], True),
    "negative weights, one less": ([[-v for v in spread(65_794)]], [300], False),
    "one channel of two": ([[1, 1], [10, -1]], [0, TOP - 2550], False),
    "no bias at all": ([spread(70_000)], [0], True),
}


@needs_kernels
@pytest.mark.parametrize("name", FITS)
def test_a_bias_starts_the_float_kernel_while_all_sums_are_exact(name: str) -> None:
    w, bias, fits = FITS[name]
    assert linear(w, bias, coded(0, 255))[0] == ("onednn qlinear u8s8" if fits else "_int_mm")


@needs_kernels
@pytest.mark.parametrize("over", [0, 1])
def test_zero_points_by_channel_go_into_the_bias_and_count_there(over: int) -> None:
    encoding = AffineEncoding(
        scale=torch.full((2,), 2.0**-10), zero_point=torch.tensor([1, 3]), qmin=0, qmax=255, axis=1
    )
    bias = TOP - 1 - 5100 + 40 + over  # codes reach 5100, the zero points take 40 off
    kernel, fixed = linear([[10, 10]], [bias], encoding)
    assert kernel == ("_int_mm" if over else "onednn qlinear u8s8")
    assert fixed == "_int_mm"


@needs_kernels
@pytest.mark.parametrize("weights", [[[10, -20], [3, 4]], [[200, -256], [255, 1]]])
@pytest.mark.parametrize("bias", [[0, 9], [0, -TOP], None])
@pytest.mark.parametrize("steps", [None, (0, 0), (0, 2)])
def test_zero_points_are_taken_off_in_every_kernel(
    weights: list[list[int]], bias: list[int] | None, steps: tuple[int, ...] | None
) -> None:
    encoding = coded(0, 255, 77)
    if steps is not None:
        encoding = AffineEncoding(
            scale=2.0 ** torch.tensor(steps) / 2**10, zero_point=torch.tensor([200, 3]),
            qmin=0, qmax=255, axis=1,
        )  # fmt: skip
    kernel, _ = linear(weights, bias, encoding)
    wide = steps == (0, 2) and weights[0][0] == 10  # 4 times -20 still is an int8
    beyond = bias is not None and min(bias) < -9
    if weights[0][0] == 10 or wide:
        assert kernel == ("_int_mm" if beyond else "onednn qlinear u8s8")
    else:
        assert kernel == "onednn u8s8 x 2 planes"


@needs_kernels
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_int8_kernels_run_while_their_raw_sums_fit_int32(zero: int) -> None:
    reach = max(zero, 255 - zero)
    for kernel, factor, mode in ((0, reach + 255, "u8s8"), (1, 2 * reach + 510, "_int_mm")):
        most = (2**31 - 1) // factor  # of the weights' magnitudes
        for total, fits in ((most, True), (most + 1, False)):
            w = [spread(total), [1] * len(spread(total))]
            found = linear(w, None, coded(0, 255, zero))[kernel]
            assert (mode in found and "planes" not in found) == fits, (total, found)


@pytest.mark.parametrize(("bias", "fits"), [(63, True), (64, False)])
def test_twice_the_raw_and_the_shifted_sums_stay_below_int32_in_fixed_point(
    bias: int, fits: bool
) -> None:
    weights = spread(2_105_376)  # 255 of each, twice: 2^30 - 64
    found = linear([weights], [bias], coded(0, 255))[1]
    assert found == ("_int_mm" if fits else "int32 on levels")


@needs_kernels
@pytest.mark.parametrize("rows", [3, 70_000])
def test_the_right_operand_of_a_product_is_summed_along_its_rows(rows: int) -> None:
    w = torch.full((rows, 2), 127, dtype=torch.int32)
    module = product_of(
        aten.matmul.default, (torch.zeros(1, rows).int(), coded(0, 255, 128)),
        (w, coded(-128, 127)),
    )  # fmt: skip
    assert ("qlinear" in row_of(module).kernel) == (rows == 3)
    assert ("_int_mm" in row_of(module, "fixed_point").kernel) == (rows == 3)


@needs_kernels
@pytest.mark.parametrize(("zero", "low_zero"), [(0, 0), (255, 255), (-1, 255), (256, 0)])
def test_planes_are_multiplied_while_each_sum_is_exact(zero: int, low_zero: int) -> None:
    reach = max(low_zero, 255 - low_zero)
    most = (TOP - 1) // reach
    for total, fits in ((most, True), (most + 1, False)):
        found = linear([spread(total)], [9], coded(-(2**15), 2**15 - 1, zero))
        assert found[0] == ("onednn u8s8 x 2 planes" if fits else "float64 on levels")


@pytest.mark.parametrize(("total", "dtype"), [(65_535, "int32"), (65_536, "int64")])
def test_fixed_point_products_take_the_narrowest_integers_that_hold_them(
    total: int, dtype: str
) -> None:
    found = linear([spread(total), [0] * len(spread(total))], None, coded(-(2**15), 2**15 - 1))
    assert found[1] == f"{dtype} on levels"


TRANSPOSED: dict[str, tuple[tuple[int, int], tuple[Any, ...], bool]] = {
    "windows side by side": ((2, 2), ([2, 2],), True),
    "windows of three": ((3, 3), ([3, 3], [0, 0], [0, 0], 1, [1, 1]), True),
    "gaps between windows": ((2, 2), ([3, 3],), False),
    "gaps in one direction": ((2, 2), ([2, 3],), False),
    "other sizes": ((2, 3), ([2, 3],), False),
    "windows that overlap": ((3, 3), ([2, 2],), False),
    "padding": ((2, 2), ([2, 2], [1, 0]), False),
    "a longer result": ((2, 2), ([2, 2], [0, 0], [1, 0]), False),
    "spread windows": ((2, 2), ([2, 2], [0, 0], [0, 0], 1, [1, 2]), False),
    "groups": ((2, 2), ([2, 2], [0, 0], [0, 0], 2), False),
}


@needs_kernels
@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("bias", [[0, 0, 0], [0, 5, -3], [0, 0, TOP]])
def test_only_windows_that_tile_the_result_are_shuffled(name: str, bias: list[int]) -> None:
    size, rest, tiles = TRANSPOSED[name]
    encoding, w_coded = coded(0, 255, 7), coded(-128, 127)
    groups = rest[3] if len(rest) > 3 else 1
    x, w = drawn(encoding, (2, 4, 3, 5), 3), drawn(w_coded, (4, 3, *size), 4)
    start = torch.tensor(bias * groups)
    row, _ = check(aten.conv_transpose2d.input, (x, encoding), (w, w_coded), start, rest)
    assert ("shuffle" in row.kernel) == (tiles and max(bias) < TOP)


@needs_kernels
def test_one_number_stands_for_both_directions_and_zero_biases_cost_nothing() -> None:
    encoding, w_coded = coded(-8, 7, 2), by_axis(4, 0)
    x, w = drawn(encoding, (1, 3, 6, 7), 5), drawn(w_coded, (4, 3, 2, 2), 6)
    for rest in (([2], [1], [2]), ([1, 1],), ()):
        for bias in (None, torch.zeros(4), torch.tensor([0, 0, 9, 0])):
            row, _ = check(aten.conv2d.default, (x, encoding), (w, w_coded), bias, rest)
            assert row.kernel == "onednn qconv u8s8"
            assert row.reason == "8-bit codes"


@needs_kernels
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", [1, 23])
def test_a_bias_beyond_float32_is_added_in_int32_if_slices_of_channels_are_exact(
    groups: int, side: int
) -> None:
    encoding, w_coded = coded(0, 255), coded(-128, 127)
    w = torch.full((2 * groups, 3, side, side), 127, dtype=torch.int32)
    w[0] = -5
    x = torch.full((2, 3 * groups, side, side + 1), 255, dtype=torch.int32)
    bias = torch.tensor([TOP + 1, 3] * groups)
    rest = ([1, 1], [0, 0], [1, 1], groups)
    row, _ = check(aten.conv2d.default, (x, encoding), (w, w_coded), bias, rest)
    exact = side == 1  # 23 x 23 taps of one channel alone are too many
    assert row.kernel == ("onednn qconv u8s8" if exact else "float64 on levels")
    assert ("slices of the channels" in row.reason) == exact


def sums_fit(weight: Tensor, low: int, high: int) -> bool:
    """Whether complete sums of all output channels stay below 2^24, in Python integers."""
    for channel in weight.flatten(1).tolist():
        ends = [sum(max(v * low, v * high) for v in channel)]
        ends += [sum(min(v * low, v * high) for v in channel)]
        if max(map(abs, ends)) >= 2**24:
            return False
    return True


@pytest.mark.parametrize("data", [(0, 255), (-255, 0), (-100, 155)])
@pytest.mark.parametrize("channels", [1, 5, 8])
@pytest.mark.parametrize("taps", [10, 90, 130, 259, 400, 700])
def test_channels_are_cut_in_as_few_slices_as_possible(
    data: tuple[int, int], channels: int, taps: int
) -> None:
    generator = torch.Generator().manual_seed(taps)
    weight = torch.randint(-128, 128, (3, channels, taps, 1), generator=generator)
    weight[1] = 127
    weight[2, 0] = -127
    found = choice._channel_slices(weight, data)
    fitting = []
    for count in range(1, channels + 1):
        edges = [round(i * channels / count) for i in range(count + 1)]
        parts = [weight[:, a:b] for a, b in itertools.pairwise(edges)]
        if all(sums_fit(part, *data) for part in parts):
            fitting.append(list(itertools.pairwise(edges)))
    assert found == (fitting[0] if fitting else None)


@needs_kernels
@pytest.mark.parametrize("most", [127, 128])
def test_free_scales_take_one_product_each(most: int) -> None:
    encoding = AffineEncoding(
        scale=torch.tensor([1.0, 1.5, 1.0, 1.5, 1.75, 1.0]) / 1024,
        zero_point=torch.tensor([3, 5, 7, 9, 0, 255]), qmin=0, qmax=255, axis=2,
    )  # fmt: skip
    w_coded = coded(-128, most)
    x, w = drawn(encoding, (2, 4, 6), 7), drawn(w_coded, (3, 6), 8)
    module = product_of(aten.linear.default, (x, encoding), (w, w_coded))
    lifted = x.double() - encoding.zero_point.double()
    total = torch.zeros(2, 4, 3)
    for scale in encoding.scale.unique():
        members = (encoding.scale == scale).double()
        total += ((lifted * members) @ w.double().T).float() * (scale * w_coded.scale)
    for mode in ("onnxruntime", "fixed_point"):
        found = integer.lower(module, mode=mode)(x)[0]
        torch.testing.assert_close(found, total, atol=2e-7, rtol=1e-7)
    assert torch.equal(integer.lower(module)(x)[0], total)
    first = "" if most == 127 else "float32 on levels, "
    assert row_of(module).kernel == f"{first}onednn qlinear u8s8"
    first = "" if most == 127 else "int32 on levels, "
    assert row_of(module, "fixed_point").kernel == f"{first}_int_mm"


@pytest.mark.parametrize("steps", [(0, 0, 0, 0, 0), (0, 1, 4, 2, 0), (0, 9, 14, 0, 24)])
@pytest.mark.parametrize("fixed", [True, False])
def test_scales_tied_by_powers_of_two_shift_levels(steps: tuple[int, ...], fixed: bool) -> None:
    encoding = AffineEncoding(
        scale=2.0**-20 * 2.0 ** torch.tensor(steps), zero_point=torch.tensor([3, 0, 255, 9, 1]),
        qmin=0, qmax=255, axis=2,
    )  # fmt: skip
    w_coded = coded(-8, 7)
    x, w = drawn(encoding, (2, 3, 5), 9), drawn(w_coded, (5, 4), 10)
    x[..., 4] = 2  # sums stay exact in fixed point
    wanted = values(aten.matmul.default, (x, encoding), (w, w_coded))
    module = product_of(aten.matmul.default, (x, encoding), (w, w_coded), fixed=fixed)
    inputs = (x,) if fixed else (x, w)
    assert torch.equal(integer.lower(module)(*inputs)[0], wanted)
    found = integer.lower(module, mode="fixed_point")(*inputs)[0]
    torch.testing.assert_close(found, wanted, atol=2.0**-24, rtol=1e-6)


@needs_kernels
def test_products_of_two_computed_operands_stay_in_floats_that_hold_them() -> None:
    for bits, kernel in ((8, "float32 on levels"), (16, "float64 on levels")):
        encoding = coded(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 5)
        x, w = drawn(encoding, (2, 3, 5), 11), drawn(encoding, (2, 5, 4), 12)
        row, fixed = check(aten.matmul.default, (x, encoding), (w, encoding), fixed=False)
        assert (row.kernel, row.reason) == (kernel, "both operands are computed")
        assert fixed.kernel == f"int{32 if bits == 8 else 64} on levels"


@needs_kernels
@pytest.mark.parametrize("axes", [1, 2])
def test_a_constant_vector_is_a_product_of_one_column(axes: int) -> None:
    encoding, w_coded = coded(0, 255, 7), coded(-128, 127)
    x, w = drawn(encoding, (2, 3, 5)[-axes:], 15), drawn(w_coded, (5,), 16)
    row, fixed = check(aten.matmul.default, (x, encoding), (w, w_coded))
    assert row.kernel == "float32 on levels"
    assert row.accumulator_bits == (int(w.abs().sum()) * 248).bit_length() + 1
    assert fixed.kernel == "int32 on levels"


def test_a_machine_without_exact_kernels_computes_in_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "has_exact_u8_kernels", lambda: False)
    for name, (encoding, planes) in DATA.items():
        x, w_coded = drawn(encoding, (2, 5), 13), by_axis(3, 0)
        w = drawn(w_coded, (3, 5), 14)
        assert float(accumulator(aten.linear.default, (x, encoding), (w, w_coded)).abs().max()) > 0
        row, _ = check(aten.linear.default, (x, encoding), (w, w_coded), torch.arange(3))
        assert "on levels" in row.kernel, (name, planes)
        assert row.reason == "no exact int8 kernels on this machine"
