# SPDX-License-Identifier: Apache-2.0
"""Products in parts: groups of channels with scales of their own, slices that float32 can sum."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qgraph.backends import integer, reference
from qgraph.backends.integer.choice import _channel_slices
from qgraph.backends.integer.kernels import has_exact_u8_kernels
from qgraph.formats import AffineEncoding
from tests.backends.exact import check, coded, drawn, product_of, row_of

aten = torch.ops.aten
needs_kernels = pytest.mark.skipif(not has_exact_u8_kernels(), reason="no exact int8 kernels here")
TOP = 2**24
SCALES = torch.tensor([0.25, 0.011, 0.25, 1.7, 0.011])


def free(axis: int, zero: int = 0) -> AffineEncoding:
    """Three scales that no power of two ties, five channels."""
    zeros = zero * torch.arange(5)
    return AffineEncoding(scale=SCALES, zero_point=zeros, qmin=-128, qmax=127, axis=axis)


KERNELS = [
    ([], "onednn qlinear u8s8", "8-bit codes"),
    ([0], "onednn qlinear u8s8, float32 on levels", "8-bit codes; weight levels exceed int8"),
    ([1], "float32 on levels, onednn qlinear u8s8", "weight levels exceed int8; 8-bit codes"),
    ([0, 1, 3], "float32 on levels", "weight levels exceed int8"),
]


@needs_kernels
@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize(("large", "kernel", "reason"), KERNELS)
def test_every_kernel_of_a_product_by_groups_is_told_once(large, kernel, reason, zero) -> None:
    data, grid = free(2, zero), coded(-1000, 1000)
    w = torch.randint(-128, 128, (7, 5), generator=torch.Generator().manual_seed(1)).int()
    for channel in large:
        w[3, channel] = 999
    x = drawn(data, (2, 3, 5), 2)
    module = product_of(aten.linear.default, (x, data), (w, grid))
    row = row_of(module)
    assert row.kernel == kernel
    assert row.reason == reason
    assert not row.island
    total = torch.zeros(())
    for scale in sorted(set(SCALES.tolist())):
        inside = SCALES.eq(scale).double()
        part = ((x - data.zero_point).double() * inside) @ w.double().t()
        total = total + part.float() * (torch.tensor(scale) * grid.scale)
    for lower in (integer.lower, reference.lower):
        assert torch.equal(lower(module)(x)[0], total), lower
    fixed = integer.lower(module, mode="fixed_point")(x)[0]
    torch.testing.assert_close(fixed, total, rtol=2.0**-22, atol=2.0**-20)


def test_convolutions_by_groups_are_exact() -> None:
    data, grid = free(1, 3), coded(-128, 127)
    x, w = drawn(data, (2, 5, 6, 4), 3), drawn(grid, (7, 5, 3, 2), 4)
    rest = ([2, 1], [1, 0], [1, 2], 1)
    module = product_of(aten.conv2d.default, (x, data), (w, grid), None, rest)
    row = row_of(module)
    assert row.kernel == "float32 on levels"
    levels = (x - data.zero_point.view(-1, 1, 1)).double()
    total = torch.zeros(())
    for scale in sorted(set(SCALES.tolist())):
        inside = SCALES.eq(scale).double().view(-1, 1, 1)
        part = aten.conv2d.default(levels * inside, w.double(), None, *rest)
        total = total + part.float() * (torch.tensor(scale) * grid.scale)
    for lower in (integer.lower, reference.lower):
        assert torch.equal(lower(module)(x)[0], total), lower


def fewest(weight: Tensor, data: tuple[int, int]) -> list[tuple[int, int]] | None:
    """The fewest slices of which each, whatever the data, keeps its sums below 2^24."""
    channels = weight.shape[1]
    highest = [[sum(max(w * d for d in (*data, 0)) for w in taps) for taps in row]
               for row in weight.flatten(2).tolist()]  # fmt: skip
    lowest = [[-sum(min(w * d for d in (*data, 0)) for w in taps) for taps in row]
              for row in weight.flatten(2).tolist()]  # fmt: skip
    for count in range(1, channels + 1):
        edges = [round(i * channels / count) for i in range(count + 1)]
        slices = list(itertools.pairwise(edges))
        if all(sum(row[a:b]) < TOP for row in (*highest, *lowest) for a, b in slices):
            return slices
    return None


DATA = [(0, 255), (-255, 0), (-128, 127), (-100, 155), (-1, 254), (0, 2**16)]


@pytest.mark.parametrize("data", DATA)
def test_slices_are_as_few_as_both_signs_of_every_output_allow(data: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    largest = max(map(abs, data))
    seen = set()
    for outputs, channels, taps in ((1, 6, 1), (3, 7, 2), (4, 5, 3)):
        for share in (0.1, 0.9, 1.0, 1.9, 3.5, channels * 0.9, channels * 1.2):
            base = torch.randint(1, 9, (outputs, channels, taps, 1), generator=generator)
            for signs in ("plus", "minus", "one output", "mixed"):
                size = share * TOP / largest / channels / taps
                weight = (base * size / 4).round().to(torch.int64)
                weight = -weight if signs == "minus" else weight
                if signs == "one output":
                    weight[1:] = weight[1:] // 100
                if signs == "mixed":
                    weight[:, ::2] = -weight[:, ::2]
                found = _channel_slices(weight, data)
                assert found == fewest(weight, data), (share, signs)
                seen.add(None if found is None else len(found))
    assert len(seen) >= 4


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("row", [0, 1])
def test_the_largest_sum_of_any_output_decides_right_at_the_limit(sign: int, row: int) -> None:
    for size, wanted in ((2**23 - 1, [(0, 2)]), (2**23, [(0, 1), (1, 2)])):
        for data in ((0, 1), (-1, 0)):
            weight = torch.ones(2, 2, 1, 1, dtype=torch.int64)
            weight[row] = sign * size
            assert _channel_slices(weight, data) == wanted
            weight[row, 0] += sign * (2**23 - size) + sign * 2**23
            assert _channel_slices(weight, data) is None


@needs_kernels
@pytest.mark.parametrize(("side", "slices"), [(13, 1), (14, 2), (16, 2), (17, 3), (22, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_biases_are_added_to_as_few_slices_as_are_exact(
    side: int, slices: int, groups: int
) -> None:
    grid, stored = coded(0, 255), coded(-128, 127)
    w = torch.full((2 * groups, 3, side, side), 127, dtype=torch.int32)
    w[1] = torch.arange(side) - 5
    x = torch.full((2, 3 * groups, side, side + 1), 255, dtype=torch.int32)
    x[:, ::2, ::3] = 7
    rest, bias = ([1, 1], [0, 0], [1, 1], groups), torch.tensor([TOP + 1, -3] * groups)
    row, _ = check(aten.conv2d.default, (x, grid), (w, stored), bias, rest)
    inside = groups == 1 or slices == 1
    assert row.kernel == ("onednn qconv u8s8" if inside else "float64 on levels")
    if inside:
        lowered = integer.lower(product_of(aten.conv2d.default, (x, grid), (w, stored), bias, rest))
        names = [n for n in lowered.graph_module.graph.nodes if n.name.startswith("conv_u8")]
        assert len(names) == slices
