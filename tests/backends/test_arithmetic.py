# SPDX-License-Identifier: Apache-2.0
"""The shared arithmetic against numpy's float32, one rounding a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qgraph.backends.arithmetic import (
    Clamp,
    Function,
    code_limits,
    code_table,
    combine_partials,
    materialize,
    multiplier,
    requantize,
    value_table,
)
from qgraph.formats import AffineEncoding

INF = float("inf")
PAIRS = [(a, b) for a, b in itertools.product((-INF, -3.0, -1.0, 0.0, 2.0, 4.0, INF), repeat=2)]
INTERVALS = [(a, b) for a, b in PAIRS if a <= b]
VALUES = (-INF, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, INF)


def targets() -> list[AffineEncoding]:
    """Per tensor and per channel; unsigned, signed, 12 bits."""
    found = []
    for qmin, qmax, zeros in ((0, 255, (7, 0, 255)), (-128, 127, (-128, 127, 3)),
                              (-2048, 2047, (5, -9, 0))):  # fmt: skip
        scales = torch.tensor([0.37, 0.011, 1.9])
        zero = torch.tensor(zeros)
        found.append(AffineEncoding(scale=scales[0], zero_point=zero[0], qmin=qmin, qmax=qmax))
        found.append(AffineEncoding(scale=scales, zero_point=zero, qmin=qmin, qmax=qmax, axis=1))
    return found


def per_channel(values: Tensor) -> np.ndarray:
    """Numbers of three channels, of axis 1 of three."""
    numbers: np.ndarray = values.expand(3).numpy().reshape(1, 3, 1)
    return numbers


def clipped(codes: np.ndarray, target: AffineEncoding) -> np.ndarray:
    return np.clip(codes, target.qmin, target.qmax).astype(np.int64)


@pytest.mark.parametrize("first", INTERVALS)
def test_two_clamps_in_turn_are_one(first: tuple[float, float]) -> None:
    for second in INTERVALS:
        both = Clamp(*first).then(*second)
        for value in VALUES:
            expected = min(max(min(max(value, first[0]), first[1]), second[0]), second[1])
            assert min(max(value, both.low), both.high) == expected, (first, second, value)
        assert both.is_open == (first == second == (-INF, INF))


@pytest.mark.parametrize("target", targets())
def test_bounds_are_encoded_like_values_and_open_ones_are_the_ends(target: AffineEncoding) -> None:
    bounds = (-INF, -1e30, -3.3, -0.185, 0.0, 0.185, 0.555, 6.0, 1e30, INF)
    for low, high in itertools.combinations_with_replacement(bounds, 2):
        found = code_limits(Clamp(low, high), target, 3)
        for bound, limit in zip((low, high), found, strict=True):
            with np.errstate(over="ignore"):
                scaled = np.float32(bound) / per_channel(target.scale)
            codes = clipped(
                np.round(scaled.astype(np.float64)) + per_channel(target.zero_point), target
            )
            if bound in {-INF, INF}:
                codes = np.full_like(codes, target.qmin if limit is found[0] else target.qmax)
            assert limit.dtype is torch.int32
            assert limit.ndim == (0 if target.axis is None else 3)
            assert (limit.expand(1, 3, 1).numpy() == codes).all(), (bound, limit, codes)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("clamp", [None, Clamp(), Clamp(0.0), Clamp(-2.5, 6.0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_accumulators_are_requantized_by_one_multiplication(target, clamp, dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    accumulator = torch.randint(-3000, 3000, (2, 3, 400), generator=generator)
    scales = torch.tensor([0.004, 0.0007, 0.0031]).view(1, 3, 1)
    given = accumulator.to(dtype)
    got = requantize(given, scales, target, clamp)
    assert torch.equal(given, accumulator.to(dtype))
    factor = scales.numpy() / per_channel(target.scale)
    assert factor.dtype == np.float32
    found = multiplier(scales, target, 3)
    assert (found.numpy() == factor).all()
    floats = accumulator.numpy().astype(np.float32) * factor
    codes = clipped(np.round(floats) + per_channel(target.zero_point), target)
    low, high = (t.expand(1, 3, 1).numpy() for t in code_limits(clamp or Clamp(), target, 3))
    assert (got.numpy() == np.clip(codes, low, high)).all()
    assert got.dtype is {255: torch.uint8, 127: torch.int8, 2047: torch.int16}[target.qmax]


def test_materialized_values_are_clamped_where_a_clamp_waits() -> None:
    accumulator, scale = torch.arange(-9, 9).view(2, 1, 9), torch.tensor([0.3, 0.7]).view(2, 1, 1)
    plain = accumulator.numpy().astype(np.float32) * scale.numpy()
    for clamp, bounds in (
        (None, (-INF, INF)), (Clamp(), (-INF, INF)), (Clamp(0.0), (0.0, INF)),
        (Clamp(high=1.5), (-INF, 1.5)), (Clamp(-1.0, 1.5), (-1.0, 1.5)),
    ):  # fmt: skip
        got = materialize(accumulator, scale, clamp)
        assert got.dtype is torch.float32
        assert (got.numpy() == np.clip(plain, np.float32(bounds[0]), np.float32(bounds[1]))).all()


def test_partial_products_are_added_group_by_group() -> None:
    parts = [torch.tensor([2**24, 5, -7]), torch.tensor([1, 6, 8]), torch.tensor([1, -9, 10])]
    scales = [torch.tensor(1.0), torch.tensor([1.0, 0.1, 0.3]), torch.tensor(1.0)]
    for count in (1, 2, 3):
        total = np.zeros(3, dtype=np.float32)
        for part, scale in zip(parts[:count], scales[:count], strict=True):
            total = total + part.numpy().astype(np.float32) * scale.numpy()
        assert combine_partials(parts[:count], scales[:count]).numpy().tolist() == total.tolist()


def test_chains_are_evaluated_in_order_with_their_arguments() -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 1.5])
    functions: list[Function] = [
        (torch.add, (1.0,), {"alpha": 3.0}), (torch.mul, (2.0,), {}),
        (torch.clamp, (), {"max": 8.5}),
    ]  # fmt: skip
    expected = [2.0, 5.0, 6.0, 8.5]
    assert value_table(values, functions).tolist() == expected
    assert value_table(values, ()).tolist() == values.tolist()
    half = AffineEncoding(scale=torch.tensor(0.5), zero_point=torch.tensor(2), qmin=0, qmax=15)
    assert code_table(values, functions, half).tolist() == [6, 12, 14, 15]
