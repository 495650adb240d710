# SPDX-License-Identifier: Apache-2.0
"""Formats given by a table, per-channel activations and per-row tables take the same decisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.levels import Runs, level_runs, padded, threshold_cells, threshold_runs
from qgraph.backends.onnx.prepare import pack_nibbles
from qgraph.backends.onnx.session import Session
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.formats import power_of_two as formats
from qgraph.formats.levels import midpoints
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.trace import trace
from qgraph.passes.insert_quantizers import parameter_nodes
from tests.backends.builders import quantize
from tests.backends.site_formats import free_bytes
from tests.backends.test_onnx_export import codes_of


class Through(nn.Module):
    """A value that the test quantizes, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.sigmoid(x))
        return y


def with_encoding(encoding: Encoding, x: Tensor) -> GraphModule:
    """Quantize the linear's input with the encoding given."""
    module = trace(Through().eval(), x)
    linear = next(n for n in module.graph.nodes if str(n.target) == "aten.linear.default")
    value = linear.args[0]
    affine = isinstance(encoding, AffineEncoding)
    parameters = parameter_nodes(module, "x", encoding, before=linear)
    codes = insert_call(
        module,
        QUANTIZE if affine else QUANTIZE_LEVELS,
        value,
        *parameters,
        like=value,
        before=linear,
    )
    decoded = insert_call(
        module,
        DEQUANTIZE if affine else DEQUANTIZE_LEVELS,
        codes,
        *parameters,
        like=value,
        before=linear,
    )
    linear.replace_input_with(value, decoded)
    module.recompile()
    return module


def dual(scale: Tensor, axis: int | None = None) -> LevelEncoding:
    levels = torch.tensor([*range(8), *range(8, 64, 8)])
    return LevelEncoding.nearest("dual region", scale, levels, storage_bits=4, axis=axis)


def signed_dual(scale: Tensor) -> LevelEncoding:
    levels = torch.tensor([*range(-8, 8), *range(8, 128, 8)])
    return LevelEncoding.nearest("dual region", scale, levels, storage_bits=5)


def power_of_two(scale: Tensor, axis: int | None = None) -> LevelEncoding:
    levels = torch.tensor([0, *sorted({round(2**15 * 2 ** (-c / 2)) for c in range(15)})])
    return LevelEncoding.nearest("power of two", scale, levels, storage_bits=4, axis=axis)


def by_channel() -> LevelEncoding:
    levels = torch.stack([torch.arange(5) * (c + 1) for c in range(6)])
    return LevelEncoding.nearest(
        "log affine", torch.rand(6) / 9 + 0.01, levels, storage_bits=3, axis=2
    )


def wide() -> LevelEncoding:
    """Too many octaves for a grid of cells, too many steps for runs: the search is binary."""
    levels = torch.tensor([0, *(3**k for k in range(15))])
    return LevelEncoding.nearest("wide", torch.tensor(2.0**-21), levels, storage_bits=4)


ENCODINGS: dict[str, Callable[[], Encoding]] = {
    "wide": wide,
    "dual region": lambda: dual(torch.tensor(1 / 64)),
    "signed dual region": lambda: signed_dual(torch.tensor(1 / 128)),
    "dual region per channel": lambda: dual(torch.rand(6) / 99 + 0.005, axis=2),
    "power of two": lambda: power_of_two(torch.tensor(2.0**-15)),
    "power of two per channel": lambda: power_of_two(2.0**-15 / (torch.arange(6) + 1), axis=2),
    "log affine per channel": by_channel,
    "grouped affine": lambda: AffineEncoding(
        scale=torch.tensor([1, 1, 2, 2, 4, 4]) / 512, zero_point=torch.full((6,), 3),
        qmin=0, qmax=255, axis=2,
    ),
    "signed 8 bits": lambda: AffineEncoding.per_tensor(4e-3, -90, IntGrid(8, signed=True)),
    "signed 5 bits": lambda: AffineEncoding.per_tensor(4e-2, -11, IntGrid(5, signed=True)),
    "12 bits": lambda: AffineEncoding.per_tensor(3e-4, 100, IntGrid(12, signed=False)),
    "signed 12 bits": lambda: AffineEncoding.per_tensor(3e-4, -900, IntGrid(12, signed=True)),
    "signed 16 bits": lambda: AffineEncoding(
        scale=torch.tensor(1e-4), zero_point=torch.tensor(-7), qmin=-(2**15), qmax=2**15 - 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_format_takes_the_same_decisions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 7, 6) * 3
    module = with_encoding(ENCODINGS[name](), x)
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    (expected,) = codes_of(module, [x]).values()
    (got,) = session.codes(x).values()
    assert np.abs(expected - got).max() <= 1
    assert (expected != got).mean() <= 0.01, "sigmoid may differ by an ulp, decisions may not"
    torch.testing.assert_close(session(x), module(x), atol=2e-2, rtol=1e-2)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40, unique=True), st.integers(-60, 60))
@settings(max_examples=50, deadline=None)
def test_padded_search_counts_the_thresholds_below(cuts: list[int], value: int) -> None:
    thresholds = torch.tensor(sorted(cuts), dtype=torch.float32)
    table, steps = padded(thresholds)
    assert len(table) == 2**steps - 1
    position = 0
    for step in (1 << k for k in reversed(range(steps))):
        position += step * int(value > table[position + step - 1])
    assert position == sum(c < value for c in cuts)


@given(
    st.lists(st.floats(-3e4, 3e4, width=32), min_size=1, max_size=40, unique=True),
    st.lists(st.floats(-4e4, 4e4, width=32), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_cells_and_one_comparison_take_the_decisions_of_comparisons(
    cuts: list[float], values: list[float]
) -> None:
    thresholds = torch.tensor(sorted(cuts))
    cells = threshold_cells(thresholds)
    if cells is None:
        return
    near = [torch.nextafter(thresholds, torch.tensor(s * float("inf"))) for s in (1.0, -1.0)]
    edges = (torch.arange(-40, 40) + 0.5) * cells.width
    units = torch.cat([thresholds, *near, edges, torch.tensor(values), torch.tensor([0.0, 1e30])])
    top = torch.iinfo(cells.zero.dtype).max
    index = (torch.round(units / cells.width) + float(cells.zero)).clamp(0, top).long()
    ranks = cells.below[index].long()
    following = torch.cat([thresholds, torch.tensor([float("inf")])])[ranks]
    assert torch.equal(ranks + (units > following), torch.bucketize(units, thresholds))


def test_logarithmic_tables_of_four_bits_need_few_cells() -> None:
    for tau, dtype in ((4, torch.uint8), (16, torch.uint8), (1, torch.uint16)):
        cells = threshold_cells(formats.power_of_two(4, tau, 1.0).thresholds)
        assert cells is not None
        assert cells.zero.dtype is dtype
    assert threshold_cells(formats.power_of_two(8, 16, 1.0).thresholds) is not None
    assert threshold_cells(torch.tensor([0.0, 2.0**-30, 1.0])) is None


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40))
def test_nibbles_unpack_to_the_codes(codes: list[int]) -> None:
    codes = codes[: len(codes) // 2 * 2]
    packed = pack_nibbles(torch.tensor([codes], dtype=torch.int8)).to(torch.int32)
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1) - 8
    assert pairs[0].tolist() == codes


def counted(runs: Runs, units: Tensor) -> Tensor:
    """What `rank_runs` computes, op by op in fp32."""
    total = torch.zeros_like(units)
    for end, step, count in zip(runs.ends, runs.steps, runs.counts, strict=True):
        if end >= 0:
            total += torch.ceil((units - end) * (1 / step)).clamp(0, count)
        else:
            total += count - (torch.floor((end - units) * (1 / step)) + 1).clamp(0, count)
    return total.to(torch.int64)


@given(st.integers(0, 6), st.integers(2, 60), st.integers(0, 60), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_counting_by_runs_takes_the_decisions_of_comparisons(
    shift: int, fine: int, negative: int, coarse: int
) -> None:
    positive = sorted({*range(fine), *(c << shift for c in range(coarse))})
    levels = torch.tensor([*range(-negative, 0), *positive])
    thresholds = midpoints(levels)
    runs = threshold_runs(thresholds)
    if runs is None:
        return
    near = [torch.nextafter(thresholds, torch.tensor(s * float("inf"))) for s in (1.0, -1.0)]
    tiny = torch.tensor([0.0, 1e-30, -1e-30, 2**-24, -(2**-24), 1e9, -1e9])
    units = torch.cat([thresholds, *near, tiny, torch.randn(200) * 40])
    assert torch.equal(counted(runs, units), torch.bucketize(units, thresholds))


def test_dual_regions_are_two_runs_and_logarithms_are_none() -> None:
    runs = threshold_runs(dual(torch.tensor(1.0)).thresholds)
    assert runs is not None
    assert runs.steps == (1.0, 8.0)
    assert threshold_runs(power_of_two(torch.tensor(1.0)).thresholds) is None
    assert level_runs(torch.tensor([-3, -2, -1, 0, 4, 8])) == Runs((-3.0,), (1.0, 4.0), (3, 2))


class Between(nn.Module):
    """Integer kernels whose quantized result is read with a scale per channel."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.make(x))
        return y


PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ x.transpose(1, 2)[..., :6],
    "add": lambda x: x + x.flip(0),
    "softmax": lambda x: torch.softmax(x, -1),
    "sigmoid": torch.sigmoid,
    "cat": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_scales_per_channel_survive_behind_every_integer_kernel(name: str, tmp_path: Path) -> None:
    """With an axis on QuantizeLinear, onnxruntime fails on these, or rounds to wrong codes."""
    torch.manual_seed(3)
    x = torch.randn(3, 7, 6)
    module = quantize(Between(PRODUCERS[name]), (x,), free_bytes)
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    expected, got = codes_of(module, [x]), session.codes(x)
    assert expected.keys() == got.keys()
    for key, codes in expected.items():
        assert np.abs(codes - got[key]).max() <= 1
        assert (codes != got[key]).mean() <= 0.02, key
    torch.testing.assert_close(session(x), module(x), atol=2e-2, rtol=1e-2)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.table(ids)
        return y


def quantized_table(encoding: AffineEncoding, ids: Tensor) -> GraphModule:
    """The table of a lookup as codes."""
    module = trace(Table().eval(), ids)
    gather = next(n for n in module.graph.nodes if "embedding" in str(n.target))
    parameters = parameter_nodes(module, "table", encoding, before=gather)
    weight = gather.args[0]
    codes = insert_call(module, QUANTIZE, weight, *parameters, like=gather, before=gather)
    decoded = insert_call(module, DEQUANTIZE, codes, *parameters, like=gather, before=gather)
    gather.replace_input_with(weight, decoded)
    module.recompile()
    return module


def test_unsigned_codes_of_a_stored_tensor_keep_both_ends_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(2)
    encoding = AffineEncoding.per_tensor(5e-3, 117, IntGrid(8, signed=False))
    ids = torch.arange(40).reshape(5, 8)
    module = quantized_table(encoding, ids)
    expected = module(ids)
    codes = encoding.encode(expected)
    assert (int(codes.min()), int(codes.max())) == (0, 255)
    export(module, tmp_path / "m.onnx")
    assert torch.equal(Session(tmp_path / "m.onnx", threads=1)(ids), expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("container", ["int8", "native"])
def test_tables_are_gathered_as_codes(axis: int | None, container: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    ids = torch.randint(0, 40, (3, 5))
    count = {None: (), 0: (40,), 1: (8,)}[axis]
    scale = torch.rand(count) * 0.1 + 0.2
    encoding = AffineEncoding(
        scale=scale, zero_point=torch.zeros_like(scale), qmin=-8, qmax=7, axis=axis
    )
    module = quantized_table(encoding, ids)
    info = export(module, tmp_path / "m.onnx", container=container)
    torch.testing.assert_close(Session(tmp_path / "m.onnx", threads=1)(ids), module(ids))
    assert info.size < 3500
