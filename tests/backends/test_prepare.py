# SPDX-License-Identifier: Apache-2.0
"""Graphs made ready for ONNX mean the same bit for bit, and store codes where they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from qgraph.backends.onnx import ops
from qgraph.backends.onnx.prepare import pack_nibbles
from qgraph.errors import ExportError
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from tests.backends.exact import by_axis, coded, decode, drawn, encode
from tests.backends.onnx_in_torch import flat, same
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(4)) * 0.2


def channels(qmin: int, qmax: int, axis: int, zeros: list[int]) -> AffineEncoding:
    scale = 2.0 ** -(torch.arange(len(zeros)) % 3 + 8)
    return AffineEncoding(
        scale=scale, zero_point=torch.tensor(zeros), qmin=qmin, qmax=qmax, axis=axis
    )


ACTIVATIONS: dict[str, tuple[AffineEncoding, int, str]] = {  # with shift and dtype in the file
    "bytes": (coded(0, 255, 100), 0, "uint8"), "signed bytes": (coded(-128, 127, -9), 128, "uint8"),
    "narrow": (coded(-127, 127, 5), 127, "uint8"), "4 bits": (coded(-8, 7, 1), 8, "uint8"),
    "unsigned 5 bits": (coded(0, 31, 30), 0, "uint8"), "from three": (coded(3, 200, 9), 0, "uint8"),
    "a byte's width elsewhere": (coded(-300, -45, -100), 300, "uint8"),
    "one more than a byte": (coded(-128, 128, 3), 0, "int16"),
    "unsigned 9 bits": (coded(0, 511, 30), 0, "int16"),
    "signed 16 bits": (coded(-(2**15), 2**15 - 1, -70), 0, "int16"),
    "15 bits": (coded(0, 2**15 - 1, 1000), 0, "int16"),
    "16 bits": (coded(0, 2**16 - 1, 2**15), 0, "uint16"),
    "one more than 15 bits": (coded(0, 2**15, 2**14), 0, "uint16"),
    "columns": (channels(0, 255, 2, [0, 128, 255, 3]), 0, "uint8"),
    "signed columns": (channels(-128, 127, -1, [0, 12, -25, 3]), 128, "uint8"),
    "rows of 12 bits": (channels(0, 4095, 1, [0, 128, 4000]), 0, "int16"),
    "columns around zero": (channels(-8, 7, 2, [0, 0, 0, 0]), 8, "uint8"),
}  # fmt: skip
MAKERS: dict[str, Any] = {
    "comes in": lambda b, x: x,
    "is computed": lambda b, x: b.call(aten.sigmoid.default, x),
    "is normed": lambda b, x: b.call(aten.layer_norm.default, x, [4]),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_stored_in_the_container_of_their_width(name: str, maker: str) -> None:
    encoding, shift, dtype = ACTIVATIONS[name]
    b = SingleOp()
    codes = encode(b, MAKERS[maker](b, b.placeholder("x", X)), "q", encoding)
    values = decode(b, codes, "d", encoding)
    module = b.finish(b.call(aten.neg.default, values))
    prepared = same(module, X)
    assert {n: (c.shift, c.dtype) for n, c in prepared.codes.items()} == {
        codes.name: (shift, dtype)
    }
    marked = [n for n in prepared.module.graph.nodes if n.target is ops.MARK]
    assert [n.args[1] for n in marked] == [codes.name]
    stored = marked[0].args[0]
    assert str(stored.meta["val"].dtype) == f"torch.{dtype}"
    direct = encoding.axis is None or maker != "is computed"
    direct = direct and (dtype == "uint8" or name in {"signed 16 bits", "16 bits"})
    assert (stored.target is ops.QUANTIZE) == direct


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 2**16), (-(2**15) - 1, 5), (-1, 2**15)])
def test_codes_beyond_16_bits_have_no_container(qmin: int, qmax: int) -> None:
    b = SingleOp()
    node = encode(b, b.placeholder("x", X), "q", coded(qmin, qmax))
    with pytest.raises(ExportError, match="no ONNX integer type holds codes"):
        same(b.finish(node), X)


def stored_graph(encoding: Encoding, shape: tuple[int, ...] = (5, 4)) -> GraphModule:
    """Values of a stored tensor, times the input."""
    b = SingleOp()
    x = b.placeholder("x", X[0, :1])
    codes = drawn(encoding, shape, 7)
    node = decode(b, b.buffer("codes", codes), "w", encoding)
    return b.finish(b.call(aten.mul.Tensor, x, node))


STORED: dict[str, tuple[AffineEncoding, torch.dtype]] = {
    "int8": (coded(-128, 127, 3), torch.int8), "narrow": (coded(-127, 127), torch.int8),
    "bytes": (coded(0, 255, 77), torch.int8), "2 bits": (coded(-2, 1), torch.int8),
    "unsigned 4 bits": (coded(0, 15, 9), torch.int8), "far off": (coded(600, 700, 650), torch.int8),
    "up to 128": (coded(-120, 128, 3), torch.int8), "from -129": (coded(-129, 100), torch.int8),
    "9 bits": (coded(-256, 255, 9), torch.int16),
    "one more than a byte": (coded(-128, 128, 3), torch.int16),
    "16 bits": (coded(-(2**15), 2**15 - 1, 4), torch.int16),
    "17 bits": (coded(-(2**16), 2**16 - 1), torch.int32),
    "one more than 16 bits": (coded(0, 2**16), torch.int32),
    "one below 16 bits": (coded(-(2**15) - 1, 9), torch.int32),
    "rows": (channels(-128, 127, 0, [0, 1, -128, 127, 9]), torch.int8),
    "columns": (channels(0, 255, 1, [0, 1, 128, 255]), torch.int8),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_stored_codes_keep_their_values_in_int8_where_they_fit(name: str) -> None:
    encoding, dtype = STORED[name]
    prepared = same(stored_graph(encoding), X[0, :1])
    held = {n.meta["val"].dtype for n in prepared.module.graph.nodes if n.op == "get_attr"}
    assert dtype in held
    assert not held & ({torch.int8, torch.int16, torch.uint8} - {dtype})


@pytest.mark.parametrize("name", ["int8", "narrow", "2 bits", "unsigned 4 bits", "rows"])
def test_stored_codes_that_fit_are_not_moved(name: str) -> None:
    encoding, _ = STORED[name]
    prepared = same(stored_graph(encoding), X[0, :1])
    (held,) = [b for b in prepared.module.buffers() if b.shape == (5, 4)]
    assert torch.equal(held, drawn(encoding, (5, 4), 7).to(torch.int8))


def test_unsigned_codes_of_16_bits_keep_their_values() -> None:
    same(stored_graph(coded(0, 2**16 - 1, 40_000)), X[0, :1])


def test_codes_of_32_bits_need_zero_as_their_zero_point() -> None:
    with pytest.raises(ExportError, match="int32 codes must have zero point 0"):
        same(stored_graph(coded(0, 2**16, 1)), X[0, :1])


def test_stored_values_that_are_still_floats_are_encoded_once() -> None:
    b = SingleOp()
    x, w = b.placeholder("x", X), b.buffer("w", torch.randn(4) * 0.02)
    codes = encode(b, w, "q", coded(-8, 7))
    module = b.finish(b.call(aten.mul.Tensor, x, decode(b, codes, "d", coded(-8, 7))))
    prepared = same(module, X)
    assert not prepared.codes
    assert ops.QUANTIZE not in {n.target for n in prepared.module.graph.nodes}


def test_blocked_activations_are_refused_and_blocked_weights_are_not() -> None:
    blocks = AffineEncoding(
        scale=torch.rand(5, 2) / 99 + 0.01, zero_point=torch.zeros(5, 2), qmin=-8, qmax=7, axis=1,
        block=2,
    )  # fmt: skip
    same(stored_graph(blocks), X[0, :1])
    b = SingleOp()
    node = encode(b, b.placeholder("x", torch.zeros(5, 4)), "q", blocks)
    with pytest.raises(ExportError, match="blocked activations"):
        same(b.finish(node), torch.zeros(5, 4))


LEVELS: dict[str, LevelEncoding] = {
    "runs": LevelEncoding.nearest(
        "runs", torch.tensor(2.0**-9), torch.tensor([*range(-8, 8), *range(8, 64, 8)]),
        storage_bits=5,
    ),
    "runs by column": LevelEncoding.nearest(
        "runs", 2.0 ** -torch.arange(7.0, 11), torch.tensor([0, 1, 2, 3, 4, 8, 12]), storage_bits=3,
        axis=2,
    ),
    "cells": LevelEncoding.nearest(
        "cells", torch.tensor(2.0**-12), torch.tensor([-900, -77, -3, 0, 11, 80, 1001]),
        storage_bits=3,
    ),
    "cells by column": LevelEncoding.nearest(
        "cells", 2.0 ** -torch.arange(9.0, 13), torch.tensor([-90, -37, -3, 0, 11, 80, 101]),
        storage_bits=3, axis=2,
    ),
    "a search": LevelEncoding.nearest(
        "wide", torch.tensor(2.0**-21), torch.tensor([0, *(3**k for k in range(15))]),
        storage_bits=4,
    ),
    "a search by row": LevelEncoding.nearest(
        "rows", 2.0 ** -torch.arange(8.0, 11),
        torch.stack([torch.arange(5) * (2 * c + 1) for c in range(3)]), storage_bits=3, axis=1,
    ),
}  # fmt: skip
SEARCH: dict[str, tuple[Any, Any]] = {
    "runs": (ops.RANK_RUNS, ops.LOOKUP_RUNS), "runs by column": (ops.RANK_RUNS, ops.LOOKUP_RUNS),
    "cells": (ops.RANK_CELLS, ops.LOOKUP), "cells by column": (ops.RANK_CELLS, ops.LOOKUP),
    "a search": (ops.RANK, ops.LOOKUP), "a search by row": (ops.RANK, ops.LOOKUP),
}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_ranks_and_levels_are_found_by_the_cheapest_search(name: str) -> None:
    encoding = LEVELS[name]
    b = SingleOp()
    node = encode(b, b.placeholder("x", X), "q", encoding)
    module = b.finish(b.call(aten.neg.default, decode(b, node, "d", encoding)))
    prepared = same(module, X)
    found = [n.target for n in prepared.module.graph.nodes]
    assert all(op in found for op in SEARCH[name])
    (codes,) = prepared.codes.values()
    assert (codes.shift, codes.dtype) == (0, "int32")


@pytest.mark.parametrize("name", [n for n in LEVELS if "by" not in n])
def test_stored_ranks_are_looked_up(name: str) -> None:
    same(stored_graph(LEVELS[name]), X[0, :1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", LEVELS)
def test_ranks_that_come_in_are_looked_up_whatever_integers_they_are(
    name: str, dtype: torch.dtype
) -> None:
    encoding = LEVELS[name]
    codes = drawn(encoding, tuple(X.shape), 3).to(dtype)
    b = SingleOp()
    values = decode(b, b.placeholder("codes", codes), "d", encoding)
    same(b.finish(b.call(aten.neg.default, values)), codes)


def linear(
    shape: tuple[int, ...], *, bias: str = "codes", out: list[Encoding] | None = None,
    data: Encoding | None = None, axis: int | None = 0, twice: bool = False,
    builder: SingleOp | None = None,
) -> tuple[GraphModule, Tensor]:  # fmt: skip
    b = builder or SingleOp()
    data = coded(0, 255, 7) if data is None else data
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 0.1
    source = b.placeholder("x", x)
    read = decode(b, encode(b, source, "x", data), "x", data)
    w = coded(-8, 7) if axis is None else by_axis(5, axis, -8, 7)
    results: list[Node] = []
    for at in range(1 + twice):
        codes = b.buffer(f"w{at}", drawn(w, (5, shape[-1]), 8 + at).to(torch.int8))
        args: list[Any] = [read, decode(b, codes, f"w{at}", w)]
        if bias == "codes":
            grid = by_axis(5, 0, -(2**31), 2**31 - 1)
            stored = b.buffer(f"b{at}", torch.arange(-2, 3, dtype=torch.int32))
            args.append(decode(b, stored, f"b{at}", grid))
        elif bias == "float":
            args.append(b.buffer(f"b{at}", torch.arange(-2, 3) / 64))
        node = b.call(aten.linear.default, *args)
        results += [encode(b, node, f"y{at}{k}", e) for k, e in enumerate(out or [])] or [node]
    if out:
        grids = out * (1 + twice)
        pairs = enumerate(zip(results, grids, strict=True))
        results = [decode(b, node, f"d{at}", grid) for at, (node, grid) in pairs]
    b.graph.output(tuple(results))
    b.module.recompile()
    return b.module, x


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("bias", ["none", "codes", "float"])
@pytest.mark.parametrize("readers", [0, 1, 2])
def test_linears_are_one_product_of_two_axes(
    shape: tuple[int, ...], bias: str, readers: int
) -> None:
    out: list[Encoding] = [coded(0, 255, 90 + k) for k in range(readers)]
    for axis in (0, None):
        module, x = linear(shape, bias=bias, out=out, axis=axis, twice=True)
        prepared = same(module, x)
        products = [n for n in prepared.module.graph.nodes if n.target is ops.GEMM]
        assert len(products) == 2
        assert len({n.args[0] for n in products}) == 1  # flattened once for both
        assert [n.args[2] is not None for n in products] == [bias == "codes"] * 2
        for node in products:
            assert isinstance(node.args[0], Node)
            assert node.args[0].target is ops.DEQUANTIZE
            quantizers = [n for n in node.users if n.target is ops.QUANTIZE]
            assert len(quantizers) == (readers if bias != "float" else 0)


class OpenSizes(SingleOp):
    """Sizes of inputs are open, but for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def placeholder(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        sizes = [DimDynamic.DYNAMIC] * (value.ndim - 1) + [DimDynamic.STATIC]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        node.meta["val"] = self.mode.from_tensor(value, symbolic_context=context)
        return node

    def buffer(self, name: str, value: Tensor) -> Node:
        self.module.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node


@pytest.mark.parametrize("readers", [0, 1])
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_linears_of_open_sizes_fit_inputs_of_any(shape: tuple[int, ...], readers: int) -> None:
    out: list[Encoding] = [coded(0, 255, 90)] * readers
    module, x = linear(shape, out=out, builder=OpenSizes())
    for given in (x, torch.cat([x, x]), x[:1]):
        prepared, found = flat(module, given)
        assert ops.GEMM in {n.target for n in prepared.module.graph.nodes}
        for ours, theirs in zip(found, module(given), strict=True):
            assert torch.equal(ours, theirs)
    if len(shape) > 2:
        other = x.repeat_interleave(3, 1)[:, 1:]
        assert torch.equal(flat(module, other)[1][0], module(other)[0])


def test_codes_that_move_have_the_dtype_of_their_container() -> None:
    b, grid = SingleOp(), coded(-128, 127, -9)
    node = encode(b, b.placeholder("x", X), "q", grid)
    moved = b.call(aten.permute.default, b.call(aten.reshape.default, node, [6, 4]), [1, 0])
    prepared = same(b.finish(b.call(aten.neg.default, decode(b, moved, "d", grid))), X)
    moves = [n for n in prepared.module.graph.nodes if n.target is aten.permute.default]
    assert [n.meta["val"].dtype for n in moves] == [torch.uint8]


def test_linears_of_scales_by_channel_are_left_as_they_are() -> None:
    data = channels(0, 255, 2, [0, 1, 128, 255])
    module, x = linear((2, 3, 4), data=data)
    prepared = same(module, x)
    assert ops.GEMM not in {n.target for n in prepared.module.graph.nodes}


def rows_of(encoding: AffineEncoding, width: int = 6) -> tuple[GraphModule, Tensor]:
    b = SingleOp()
    index = torch.tensor([[0, 4, 1], [3, 3, 2]])
    node = b.placeholder("index", index)
    table = b.buffer("codes", drawn(encoding, (5, width), 9).to(torch.int8))
    return b.finish(b.call(aten.embedding.default, decode(b, table, "t", encoding), node)), index


@pytest.mark.parametrize("container", ["int8", "native"])
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (-9, 7), (-8, 8), (-128, 127)])
@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, -2])
def test_tables_are_gathered_as_codes(
    container: str, qmin: int, qmax: int, width: int, axis: int | None
) -> None:
    count = {None: 0, 0: 5, -2: 5, 1: width, -1: width}[axis]
    encoding = coded(qmin, qmax) if axis is None else by_axis(count, axis, qmin, qmax)
    module, index = rows_of(encoding, width)
    prepared = same(module, index, container=container)
    packed = ops.UNPACK_NIBBLES in {n.target for n in prepared.module.graph.nodes}
    assert packed == (container == "native" and (qmin, qmax) == (-8, 7) and width == 6)
    if not packed:
        return
    (gather,) = [n for n in prepared.module.graph.nodes if n.target is ops.UNPACK_NIBBLES]
    assert gather.meta["val"].shape == (2, 3, 6)


def test_tables_with_blocks_or_zero_points_by_row_are_refused() -> None:
    blocks = AffineEncoding(
        scale=torch.rand(5, 3) + 0.1, zero_point=torch.zeros(5, 3), qmin=-8, qmax=7, axis=1, block=2
    )
    module, index = rows_of(blocks)
    with pytest.raises(ExportError, match="a blocked table cannot be gathered"):
        same(module, index)
    module, index = rows_of(channels(-8, 7, 0, [0, 0, 0, 0, 1]))
    with pytest.raises(ExportError, match="needs zero point 0"):
        same(module, index)
    module, index = rows_of(channels(-8, 7, 1, [0, 1, 2, 3, 4, -5]))
    same(module, index)


def test_the_first_of_two_nibbles_is_the_low_one() -> None:
    packed = pack_nibbles(torch.tensor([[-8, 7, 0, -1], [1, 2, 3, 4]], dtype=torch.int8))
    assert packed.tolist() == [[0xF0, 0x78], [0xA9, 0xCB]]


def test_inputs_handed_on_and_results_named_twice_are_outputs_of_their_own() -> None:
    b = SingleOp()
    x, stored = b.placeholder("x", X), b.buffer("w", torch.ones(2))
    y = b.call(aten.neg.default, x)
    b.graph.output((x, y, stored, y, x))
    b.module.recompile()
    prepared, found = flat(b.module, X)
    assert len(found) == 3
    handed_on: Any = prepared.module.graph.output_node().args[0]
    copy, negated = aten.clone.default, aten.neg.default
    assert [n.target for n in handed_on] == [copy, negated, copy]
    for ours, theirs in zip(found, (X, -X, torch.ones(2)), strict=True):
        assert torch.equal(ours, theirs)
