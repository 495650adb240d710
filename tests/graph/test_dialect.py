# SPDX-License-Identifier: Apache-2.0
"""The dialect's ops: what they compute and note, and what is read back from their nodes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from qgraph.errors import PassError
from qgraph.formats import AffineEncoding, LevelEncoding
from qgraph.graph.dialect import (
    DEQUANTIZE,
    DEQUANTIZE_LEVELS,
    QUANTIZE,
    QUANTIZE_LEVELS,
    buffer,
    encoding_of,
    is_dequantize,
    is_quantize,
    quantizer_of,
    result_dtype,
)
from tests.graph.sketch import Sketch, aten

STRIDES = [  # shape, strides as given, strides of the values
    ((2, 5, 1, 1), (5, 1, 5, 5), (5, 1, 1, 1)),
    ((2, 1, 3, 4), (12, 1, 4, 1), (12, 12, 4, 1)),
    ((3, 1, 5), (5, 77, 1), (5, 5, 1)),
    ((1, 3, 5), (99, 5, 1), (15, 5, 1)),
    ((3, 5, 1), (5, 1, 42), (5, 1, 1)),
    ((1, 1, 4), (50, 60, 1), (4, 4, 1)),
    ((1, 4, 3), (70, 1, 4), (4, 1, 4)),
    ((3, 1, 2), (1, 9, 3), (1, 6, 3)),
    ((3, 4), (1, 3), (1, 3)),
    ((1,), (8,), (1,)),
    ((), (), ()),
]


@pytest.mark.parametrize(("shape", "given", "wanted"), STRIDES)
def test_strides_of_axes_of_one_element_follow_from_the_others(shape, given, wanted):
    codes = torch.empty_strided(shape, given, dtype=torch.int8)
    codes.copy_(torch.arange(codes.numel()).view(shape) % 7)
    scale, zero = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    values = DEQUANTIZE(codes, scale, zero, -8, 7)
    assert values.stride() == wanted
    assert torch.equal(values, (codes.float() - 3) * 0.5)
    levels = torch.arange(7, dtype=torch.int32) ** 2
    ranks = codes.to(torch.uint8)
    values = DEQUANTIZE_LEVELS(ranks, scale, levels, levels[1:].float(), "square", 3)
    assert values.stride() == wanted
    assert torch.equal(values, (codes.float() ** 2) * 0.5)


RANGES = [
    (-128, 127, torch.int8), (0, 127, torch.int8), (-128, 0, torch.int8), (0, 255, torch.uint8),
    (0, 128, torch.uint8), (-129, 0, torch.int16), (0, 256, torch.int16), (-1, 128, torch.int16),
    (-(2**15), 2**15 - 1, torch.int16), (0, 2**15, torch.int32),
]  # fmt: skip


@pytest.mark.parametrize(("qmin", "qmax", "dtype"), RANGES)
def test_codes_are_of_the_smallest_dtype_when_noted_and_when_run(qmin, qmax, dtype):
    s = Sketch()
    x = s.input(2, 3, free=1)
    scale = s.stored(torch.tensor(1.0), "s")
    zero = s.stored(torch.tensor(qmin, dtype=torch.int32), "z")
    codes = s.call(QUANTIZE, x, scale, zero, qmin, qmax)
    values = s.call(DEQUANTIZE, codes, scale, zero, qmin, qmax)
    assert result_dtype(codes) == codes.meta["val"].dtype == dtype
    assert result_dtype(values) == values.meta["val"].dtype == torch.float32
    assert result_dtype(scale) is None
    given = torch.tensor([[-1e6, 0.0, 1e6], [1.5, 2.5, -0.5]])
    got = s.returns(codes, values)(given)
    assert got[0].dtype == dtype
    wanted = (given.round() + qmin).clamp(qmin, qmax)
    assert torch.equal(got[0].to(torch.float32), wanted)
    assert torch.equal(got[1], wanted - qmin)
    with s._mode:  # the registered way, which a graph takes where sizes are not dense
        fake = QUANTIZE(
            x.meta["val"], torch.ones(()), torch.zeros((), dtype=torch.int32), qmin, qmax
        )
        assert fake.dtype == dtype
        assert DEQUANTIZE(fake, torch.ones(()), torch.zeros(()), qmin, qmax).dtype == torch.float32


@pytest.mark.parametrize(("rows", "count", "dtype"), [
    (None, 256, torch.uint8), (None, 257, torch.int16), (3, 256, torch.uint8),
    (3, 257, torch.int16), (300, 4, torch.uint8),
])  # fmt: skip
def test_ranks_are_of_the_dtype_that_holds_the_number_of_levels(rows, count, dtype):
    s = Sketch()
    x = s.input(2, rows or 3)
    levels = torch.arange(count, dtype=torch.int32)
    if rows:
        levels = levels.expand(rows, count).contiguous()
    tables = s.stored(levels, "l"), s.stored(levels[..., 1:].float() - 0.5, "t")
    scale = s.stored(torch.tensor(2.0) if rows is None else torch.full((rows,), 2.0), "s")
    axis = None if rows is None else 1
    ranks = s.call(QUANTIZE_LEVELS, x, scale, *tables, "plain", 9, axis)
    values = s.call(DEQUANTIZE_LEVELS, ranks, scale, *tables, "plain", 9, axis=axis)
    assert ranks.meta["val"].dtype == dtype
    assert result_dtype(ranks) is None
    assert result_dtype(values) == values.meta["val"].dtype == torch.float32
    given = torch.linspace(-9, 700, 2 * (rows or 3)).view(2, -1)
    got = s.returns(ranks, values)(given)
    assert got[0].dtype == dtype
    wanted = torch.tensor([[sum(v / 2 > t for t in range_of(count)) for v in row] for row in given])
    assert torch.equal(got[0].to(torch.int64), wanted)
    assert torch.equal(got[1], wanted * 2.0)


def range_of(count: int) -> list[float]:
    """Thresholds between 0 ... count - 1."""
    return [i + 0.5 for i in range(count - 1)]


def test_nodes_of_the_dialect_are_told_from_all_others() -> None:
    s = Sketch()
    x = s.input(2, 3)
    scale, zero = s.stored(torch.tensor(1.0), "s"), s.stored(torch.tensor(0), "z")
    codes = s.call(QUANTIZE, x, scale, zero, 0, 15)
    values = s.call(DEQUANTIZE, codes, scale, zero, 0, 15)
    table = s.stored(torch.arange(4, dtype=torch.int32), "l")
    steps = s.stored(torch.tensor([0.5, 1.5, 2.5]), "t")
    ranks = s.call(QUANTIZE_LEVELS, x, scale, table, steps, "f", 2)
    decoded = s.call(DEQUANTIZE_LEVELS, ranks, scale, table, steps, "f", 2)
    kept = s.stored(torch.zeros(2, 3, dtype=torch.int8), "codes")
    weight = s.call(DEQUANTIZE, kept, scale, zero, 0, 15)
    inner = s.call(aten.relu.default, codes)
    behind = s.call(DEQUANTIZE, inner, scale, zero, 0, 15)
    others: list[object] = [
        x,
        scale,
        s.call(aten.relu.default, x),
        None,
        3,
        "x",
        (codes,),
        [values],
    ]
    for given in (codes, ranks):
        assert is_quantize(given)
        assert not is_dequantize(given)
        assert quantizer_of(given) is None
    for given in (values, decoded, weight):
        assert is_dequantize(given)
        assert not is_quantize(given)
    for other in others:
        assert not is_quantize(other)
        assert not is_dequantize(other)
        assert quantizer_of(other) is None
    assert [quantizer_of(v) for v in (values, decoded, weight, behind)] == [
        codes,
        ranks,
        None,
        None,
    ]


@pytest.mark.parametrize("named", [False, True])
def test_an_encoding_is_read_back_from_either_node(named: bool) -> None:
    s = Sketch()
    x = s.input(2, 3, 4)
    scale = s.stored(torch.tensor([0.5, 1.0, 2.0]), "s")
    zero = s.stored(torch.tensor([1, 2, 3], dtype=torch.int32), "z")
    levels = torch.tensor([[0, 1, 4]] * 3, dtype=torch.int32)
    table, steps = s.stored(levels, "l"), s.stored(torch.tensor([[0.5, 2.5]] * 3), "t")
    if named:
        codes = s.call(QUANTIZE, x, scale, zero_point=zero, qmin=0, qmax=15, axis=1)
        ranks = s.call(
            QUANTIZE_LEVELS, x, scale=scale, levels=table, thresholds=steps, format="f", bits=5,
            axis=1,
        )  # fmt: skip
    else:
        codes = s.call(QUANTIZE, x, scale, zero, 0, 15, 1)
        ranks = s.call(QUANTIZE_LEVELS, x, scale, table, steps, "f", 5, 1)
    assert result_dtype(codes) == torch.int8
    values = s.call(DEQUANTIZE, codes, scale, zero, 0, 15, 1)
    for node in (codes, values):
        found = encoding_of(s.module, node)
        assert isinstance(found, AffineEncoding)
        assert torch.equal(found.scale, s.module.get_buffer("s"))
        assert torch.equal(found.zero_point, s.module.get_buffer("z"))
        assert (found.qmin, found.qmax, found.axis, found.block) == (0, 15, 1, None)
    got = encoding_of(s.module, ranks)
    assert isinstance(got, LevelEncoding)
    assert torch.equal(got.scale, s.module.get_buffer("s"))
    assert torch.equal(got.levels, s.module.get_buffer("l"))
    assert torch.equal(got.thresholds, s.module.get_buffer("t"))
    assert (got.name, got.storage_bits, got.axis) == ("f", 5, 1)


def test_blocks_are_read_back_and_computed_with() -> None:
    s = Sketch()
    x = s.input(2, 4)
    scale = s.stored(torch.tensor([[0.5, 1.0], [2.0, 4.0]]), "s")
    zero = s.stored(torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), "z")
    codes = s.call(QUANTIZE, x, scale, zero, 0, 15, 1, 2)
    values = s.call(DEQUANTIZE, codes, scale, zero, 0, 15, 1, 2)
    found = encoding_of(s.module, values)
    assert isinstance(found, AffineEncoding)
    assert (found.axis, found.block) == (1, 2)
    given = torch.tensor([[0.9, 1.9, 2.9, -1.9], [3.9, 5.1, 9.9, 99.0]])
    got = s.returns(codes, values)(given)
    assert got[0].tolist() == [[2, 4, 4, 0], [4, 5, 5, 15]]
    assert got[1].tolist() == [[1.0, 2.0, 3.0, -1.0], [4.0, 6.0, 8.0, 48.0]]


def test_parameters_that_are_no_buffers_and_other_nodes_are_refused() -> None:
    s = Sketch()
    x = s.input(2, 3)
    zero = s.stored(torch.tensor(0), "z")
    relu = s.call(aten.relu.default, x)
    scale = s.stored(torch.tensor(1.0), "s")
    for bad in (s.call(aten.neg.default, scale), x):
        codes = s.call(QUANTIZE, relu, bad, zero, 0, 15)
        with pytest.raises(PassError, match="must be buffers"):
            encoding_of(s.module, codes)
    for given in (relu, x, scale):
        with pytest.raises(PassError, match="neither a quantize nor a dequantize"):
            encoding_of(s.module, given)
    for argument in (1.0, None, relu):
        with pytest.raises(PassError, match=r"relu_default: quantizer parameters must be buffers"):
            buffer(s.module, argument, relu)


def test_a_buffer_is_found_at_its_path() -> None:
    root, graph = nn.Module(), Graph()
    root.a = nn.Module()
    root.a.register_buffer("b", torch.ones(2))
    read = graph.get_attr("a.b")
    graph.output(read)
    module = GraphModule(root, graph)
    assert buffer(module, read, read) is module.get_buffer("a.b")
