# SPDX-License-Identifier: Apache-2.0
"""Each private op's ONNX form, evaluated by itself, gives what the op means."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qgraph.backends.onnx import ops
from qgraph.backends.onnx.levels import level_runs, padded, threshold_cells, threshold_runs
from qgraph.formats.levels import midpoints
from tests.backends import onnx_in_torch

FORMS = ops.translations()
X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(8)) * 20


def array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def agree(op: Any, *args: Any) -> Tensor:
    """The ONNX form and the torch kernel give the same; so do shape and dtype without a kernel."""
    wanted = op(*args)
    result = FORMS[op](*(array(a) for a in args))
    found = torch.from_numpy(np.array(getattr(result, "value", result)))
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted), op
    mode = FakeTensorMode()
    given = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    fake = op(*given)
    assert (fake.shape, fake.dtype) == (wanted.shape, wanted.dtype)
    return wanted


def around(cuts: Tensor) -> Tensor:
    """Values at, just below and just above thresholds, and far away."""
    up, down = (torch.nextafter(cuts, torch.tensor(s)) for s in (float("inf"), -float("inf")))
    return torch.cat([cuts, up, down, torch.tensor([-1e9, 1e9, 0.0]), X.flatten()])


def test_every_op_has_a_form_and_a_meaning_here() -> None:
    assert len(FORMS) == len(onnx_in_torch._KERNELS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_values_are_quantized_and_clipped(dtype: torch.dtype) -> None:
    zero = torch.tensor(3, dtype=dtype)
    for low, high in itertools.product((None, 1), (None, 9)):
        ends = [None if v is None else torch.tensor(v, dtype=dtype) for v in (low, high)]
        codes = agree(ops.QUANTIZE, X, torch.tensor(0.7), zero, *ends, None)
        assert low is None or int(codes.min()) == low
        assert high is None or int(codes.max()) == high
    for axis in (0, 1, 2, -1):
        count = X.shape[axis]
        scale, zeros = torch.arange(1.0, count + 1), torch.arange(count).to(dtype)
        agree(ops.QUANTIZE, X, scale, zeros, None, None, axis)


def test_codes_are_dequantized_by_channel_and_block() -> None:
    codes = torch.arange(60).reshape(3, 4, 5).to(torch.uint8)
    agree(ops.DEQUANTIZE, codes, torch.tensor(0.7), torch.tensor(3, dtype=torch.uint8), None, None)
    agree(ops.DEQUANTIZE, codes, torch.tensor(0.7), None, None, None)
    for axis in (0, 1, 2):
        count = codes.shape[axis]
        scale, zeros = torch.arange(1.0, count + 1), torch.arange(count).to(torch.uint8)
        agree(ops.DEQUANTIZE, codes, scale, zeros, axis, None)
    agree(ops.DEQUANTIZE, codes, torch.rand(3, 2, 5), torch.ones(3, 2, 5, dtype=torch.uint8), 1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_products_take_rows_of_weights(bias: bool) -> None:
    x, w = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3) - 5
    agree(ops.GEMM, x, w, torch.arange(4.0) if bias else None)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8, 15, 16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_search_counts_the_thresholds_below(count: int, rows: int) -> None:
    cuts = (torch.randn(rows, count, generator=torch.Generator().manual_seed(count)) * 9).sort(1)[0]
    table, steps = padded(cuts)
    assert table.shape[-1] == 2**steps - 1 < 2 * max(count, 1)
    scale = torch.tensor(0.5)
    if rows == 1:
        units = around(cuts[0])
        found = agree(ops.RANK, units * scale, scale, table.flatten(), None, steps)
        assert torch.equal(found.long(), torch.bucketize(units, cuts[0]))
        return
    offsets = (torch.arange(rows, dtype=torch.int32) * table.shape[-1]).view(1, rows, 1)
    found = agree(ops.RANK, X, scale, table.flatten(), offsets, steps)
    for row in range(rows):
        assert torch.equal(found[:, row].long(), torch.bucketize(X[:, row] / scale, cuts[row]))


TABLES: dict[str, list[int]] = {
    "one step": [*range(9)], "two regions": [*range(8), *range(8, 64, 8)],
    "both signs": [*range(-8, 8), *range(8, 128, 8)],
    "below zero": [*range(-64, -8, 8), *range(-8, 0)],
    "off zero": [*range(5, 9), *range(12, 30, 4)],
    "off zero below": [*range(-28, -11, 4), *range(-8, -4)],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_runs_are_counted_and_added_up(name: str) -> None:
    levels = torch.tensor(TABLES[name])
    cuts = midpoints(levels)
    runs = threshold_runs(cuts)
    assert runs is not None
    units, scale = around(cuts), torch.tensor(0.25)
    args = (list(runs.ends), list(runs.steps), list(runs.counts))
    found = agree(ops.RANK_RUNS, units * scale, scale, *args)
    assert torch.equal(found.long(), torch.bucketize(units, cuts))
    steps = level_runs(levels)
    assert steps is not None
    ranks = torch.arange(len(levels)).repeat(2, 1)
    for dtype in (torch.int32, torch.uint8):
        values = agree(
            ops.LOOKUP_RUNS, ranks.to(dtype), scale, steps.ends[0], list(steps.steps),
            list(steps.counts),
        )  # fmt: skip
        assert torch.equal(values[0], levels * scale)


@pytest.mark.parametrize("cuts", [[-900.0, -3, 0.5, 7, 1000], [2.5, 90, 200], [0.25]])
def test_cells_and_one_comparison_count_the_thresholds_below(cuts: list[float]) -> None:
    thresholds = torch.tensor(cuts)
    cells = threshold_cells(thresholds)
    assert cells is not None
    following = torch.cat([thresholds, torch.tensor([float("inf")])])
    units, scale = around(thresholds), torch.tensor(0.5)
    found = agree(
        ops.RANK_CELLS, (units * scale).view(3, -1), scale, torch.tensor(cells.width), cells.zero,
        cells.below, following,
    )  # fmt: skip
    assert torch.equal(found.flatten().long(), torch.bucketize(units, thresholds))


@pytest.mark.parametrize("by_row", [True, False])
def test_entries_are_looked_up(by_row: bool) -> None:
    table = torch.randn(20)
    ranks = torch.arange(20, dtype=torch.int32).reshape(2, 2, 5) % 5
    offsets = torch.tensor([0, 5], dtype=torch.int32).view(1, 2, 1) if by_row else None
    agree(ops.LOOKUP, ranks, table, offsets)


@pytest.mark.parametrize("offset", [0, -8])
def test_bytes_hold_two_codes(offset: int) -> None:
    packed = torch.arange(0, 256, 7, dtype=torch.uint8)[:36].reshape(2, 3, 6)
    found = agree(ops.UNPACK_NIBBLES, packed, offset)
    assert found.shape == (2, 3, 12)
    assert found.min() == offset
    assert found.max() == offset + 15
