# SPDX-License-Identifier: Apache-2.0
"""Digits to base 256 are the number, each fits int8, and there are as few as possible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qgraph.backends.integer.kernels import has_exact_u8_kernels
from qgraph.backends.integer.planes import digits
from qgraph.formats import AffineEncoding
from tests.backends.exact import check, coded, drawn

aten = torch.ops.aten
needs_kernels = pytest.mark.skipif(not has_exact_u8_kernels(), reason="no exact int8 kernels here")


def reach(count: int) -> tuple[int, int]:
    """The smallest and largest number of so many digits in -128 ... 127."""
    units = sum(256**p for p in range(count))
    return -128 * units, 127 * units


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5))
@example([0, 0])
@example([127, -128])
@example([128])
@example([-129])
@example([2**15 - 1, -(2**15)])
@settings(max_examples=40, deadline=None)
def test_digits_are_int8_add_up_and_are_as_few_as_possible(numbers: list[int]) -> None:
    found = [digit.tolist() for digit in digits(torch.tensor(numbers))]
    assert all(-128 <= d <= 127 for digit in found for d in digit)
    for at, number in enumerate(numbers):
        assert sum(256**p * digit[at] for p, digit in enumerate(found)) == number
    few = next(n for n in range(1, 9) if all(reach(n)[0] <= v <= reach(n)[1] for v in numbers))
    assert len(found) == few


@needs_kernels
@pytest.mark.parametrize("bias", [[0, 0, 0], [0, 6, -(2**22)]])
@pytest.mark.parametrize("zero", [-(2**15), -257, -1, 0, 255, 256, 2**15 - 1])
def test_images_of_words_are_padded_with_both_bytes_of_the_zero_point(
    zero: int, bias: list[int]
) -> None:
    encoding, w_coded = coded(-(2**15), 2**15 - 1, zero), coded(-128, 127)
    x, w = drawn(encoding, (2, 2, 5, 4), 1), drawn(w_coded, (3, 2, 3, 2), 2)
    rest = ([1, 2], [2, 1], [1, 1], 1)
    row, _ = check(aten.conv2d.default, (x, encoding), (w, w_coded), torch.tensor(bias), rest)
    assert row.kernel == "onednn u8s8 x 2 planes"


@needs_kernels
def test_images_with_zero_points_by_channel_have_no_planes() -> None:
    encoding = AffineEncoding(
        scale=torch.full((2,), 2.0**-10), zero_point=torch.tensor([3, 200]), qmin=0, qmax=255,
        axis=1,
    )  # fmt: skip
    x = drawn(encoding, (2, 2, 5, 4), 3)
    for low in (-128, -256):
        w_coded = coded(low, 127)
        w = drawn(w_coded, (3, 2, 3, 2), 4)
        row, _ = check(aten.conv2d.default, (x, encoding), (w, w_coded), None, ([1, 1], [1, 1]))
        assert row.kernel == "float32 on levels"


@needs_kernels
def test_words_with_zero_points_by_channel_have_no_planes() -> None:
    encoding = AffineEncoding(
        scale=torch.full((2,), 2.0**-10), zero_point=torch.tensor([3, 200]), qmin=0, qmax=4095,
        axis=1,
    )  # fmt: skip
    w_coded = coded(-128, 127)
    x, w = drawn(encoding, (5, 2), 3), drawn(w_coded, (3, 2), 4)
    row, _ = check(aten.linear.default, (x, encoding), (w, w_coded))
    assert row.kernel == "float32 on levels"
