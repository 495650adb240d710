# SPDX-License-Identifier: Apache-2.0
"""The walk of the integer backend: what is computed once, what is written over, what is shared."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qgraph.backends import integer
from qgraph.backends.integer.emitter import Emitter
from qgraph.backends.integer.reuse import IN_PLACE
from qgraph.backends.semantics import analyze
from tests.backends.exact import by_axis, coded, decode, drawn, encode
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)) * 0.1
BYTES = coded(0, 255, 100)


def read_input(b: SingleOp) -> Node:
    return decode(b, encode(b, b.placeholder("x", X), "x", BYTES), "x", BYTES)


def of_inputs(graph: Graph) -> dict[Node, bool]:
    """Which nodes depend on an input."""
    found: dict[Node, bool] = {}
    for node in graph.nodes:
        found[node] = node.op == "placeholder" or any(found[n] for n in node.all_input_nodes)
    return found


@pytest.mark.parametrize("mode", ["onnxruntime", "fixed_point"])
def test_what_depends_on_no_input_is_computed_once(mode: integer.Mode) -> None:
    b = SingleOp()
    x, grid = read_input(b), by_axis(5, 0, -8, 7)
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(6)) * 0.01
    codes = encode(b, b.call(aten.neg.default, b.buffer("w", w)), "w", grid)
    weight = b.call(aten.clone.default, decode(b, codes, "w", grid))
    module = b.finish(b.call(aten.linear.default, x, weight))
    lowered = integer.lower(module, mode=mode)
    depends = of_inputs(lowered.graph_module.graph)
    assert [n for n, does in depends.items() if n.op == "call_function" and not does] == []
    exact = BYTES.fake(X).double() @ grid.fake(-w).double().t()
    assert torch.equal(lowered(X)[0].double(), exact.float().double())


def test_constants_beside_codes_are_joined_as_stored_codes() -> None:
    b = SingleOp()
    x, held = read_input(b), torch.full((3, 2), 0.05)
    stored = decode(b, encode(b, b.buffer("held", held), "h", BYTES), "h", BYTES)
    joined = b.call(aten.cat.default, [x, stored], 1)
    lowered = integer.lower(b.finish(joined))
    depends = of_inputs(lowered.graph_module.graph)
    assert [n for n, does in depends.items() if n.op == "call_function" and not does] == []
    assert torch.equal(lowered(X)[0], BYTES.fake(torch.cat([X, held], 1)))


def written_over(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.target in IN_PLACE.values()]


def test_operands_are_written_over_unless_a_compiler_decides() -> None:
    b = SingleOp()
    x, grid = read_input(b), coded(-8, 7)
    codes = b.buffer("w", drawn(grid, (5, 4), 7).to(torch.int8))
    y = b.call(aten.linear.default, x, decode(b, codes, "w", grid))
    found = analyze(b.finish(encode(b, y, "y", BYTES)))
    plain, seen = (Emitter(found, compiled=c).lower() for c in (False, True))
    assert written_over(plain)
    assert not written_over(seen)
    for ours, theirs in zip(plain(X), seen(X), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_values_of_one_encoding_are_joined_as_codes(count: int) -> None:
    b = SingleOp()
    x = read_input(b)
    joined = b.call(aten.cat.default, [x] * count, 1)
    lowered = integer.lower(b.finish(encode(b, joined, "y", BYTES)))
    wanted: Tensor = BYTES.encode(X).repeat(1, count)
    assert torch.equal(lowered(X)[0], wanted)


def conversions(lowered: integer.IntegerModel) -> int:
    return sum(n.target is aten.to.dtype for n in lowered.graph_module.graph.nodes)


SIGNED = coded(-128, 127, 5)
BETWEEN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "reshape": (aten.reshape.default, ([2, 6],)), "view": (aten.view.default, ([4, 3],)),
    "transpose": (aten.transpose.int, (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["onnxruntime", "fixed_point"])
@pytest.mark.parametrize("move", BETWEEN)
def test_codes_that_move_before_they_are_read_stay_in_storage(
    move: str, mode: integer.Mode
) -> None:
    target, args = BETWEEN[move]
    counts = []
    for moves in (False, True):
        b = SingleOp()
        codes = encode(b, b.placeholder("x", X), "x", SIGNED)
        codes = b.call(target, codes, *args) if moves else codes
        lowered = integer.lower(b.finish(decode(b, codes, "d", SIGNED)), mode=mode)
        counts.append(conversions(lowered))
    assert counts[0] == counts[1]
    assert torch.equal(lowered(X)[0], target(SIGNED.fake(X), *args))


@pytest.mark.parametrize("mode", ["onnxruntime", "fixed_point"])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_that_are_cut_before_they_are_read_stay_codes(
    mode: integer.Mode, *, signed: bool
) -> None:
    grid = SIGNED if signed else BYTES
    b = SingleOp()
    codes = encode(b, b.placeholder("x", X), "x", grid)
    parts = b.graph.call_function(aten.chunk.default, (codes, 2, 1))
    parts.meta["val"] = list(codes.meta["val"].chunk(2, 1))
    last = b.graph.call_function(operator.getitem, (parts, 1))
    last.meta["val"] = parts.meta["val"][1]
    lowered = integer.lower(b.finish(decode(b, last, "d", grid)), mode=mode)
    assert torch.equal(lowered(X)[0], grid.fake(X)[:, 2:])


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5)])
def test_float_ops_read_four_axes_in_the_layout_of_the_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    b = SingleOp()
    turned = b.call(aten.transpose.int, b.placeholder("x", x), 1, 2)
    results = [b.call(aten.softmax.int, turned, axis) for axis in (1, 2)]
    b.graph.output(tuple(results))
    b.module.recompile()
    lowered = integer.lower(b.module)
    laid = [n for n in lowered.graph_module.graph.nodes if n.target is aten.contiguous.default]
    read = [n.args[0] for n in lowered.graph_module.graph.nodes if n.target is aten.softmax.int]
    assert len(read) == 2
    assert len(set(read)) == 1, "laid out once for both"
    assert [n for n in laid if n in read] == (read[:1] if len(shape) == 4 else [])
    for axis, found in zip((1, 2), lowered(x), strict=True):
        assert torch.equal(found, torch.softmax(x.transpose(1, 2).contiguous(), axis))
