# SPDX-License-Identifier: Apache-2.0
"""Rewritten convolutions give the same numbers, and only what can be rewritten is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnx.convolutions import (
    Phases,
    is_open,
    one_per_encoding,
    patches_to_linear,
    transposed_to_phases,
)
from qgraph.formats import AffineEncoding, Encoding
from tests.backends.exact import SCALE, by_axis, coded, decode, drawn, encode, table
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
DATA, WEIGHT = coded(0, 255, 7), by_axis(5, 1, -8, 7)


@pytest.mark.parametrize("kernel", range(1, 6))
@pytest.mark.parametrize("stride", range(1, 5))
def test_phases_are_the_transposed_convolution(kernel: int, stride: int) -> None:
    x, w = [3, 1, 4, 1, 5], [2, 7, 1, 8, 2][:kernel]
    for padding in range(kernel):
        whole = [0] * (len(x) * stride + kernel + padding)
        for (i, value), (t, weight) in itertools.product(enumerate(x), enumerate(w)):
            whole[i * stride + t] += value * weight
        found = Phases.of(kernel, stride, padding)
        got = [0] * (len(x) * stride)
        for m, (phase, j, t) in itertools.product(range(len(x)), found.taps):
            place = m - found.before + j
            got[stride * m + phase] += x[place] * w[t] if 0 <= place < len(x) else 0
        assert got == whole[padding : padding + len(got)]
        used = {j for _, j, _ in found.taps}
        assert found.kernel == found.before + 1 + found.after
        assert used <= set(range(found.kernel))
        # a border is only as wide as some tap reaches
        assert found.before == 0 or 0 in used
        assert found.after == 0 or found.kernel - 1 in used


def transposed(
    size: tuple[int, int], rest: tuple[Any, ...], *, bias: str = "none",
    weight: Encoding = WEIGHT, data: Encoding | None = DATA, stored: bool = True,
) -> tuple[GraphModule, tuple[Tensor, ...]]:  # fmt: skip
    """``conv_transpose2d`` on [2, 4, 3, 6] with five output channels a group."""
    b = SingleOp()
    x = drawn(DATA, (2, 4, 3, 6), 1)
    w = drawn(weight, (4, 5, *size), 2)
    inputs = [b.placeholder("x", x)]
    given = [x]
    if not stored:
        given.append(w)
        inputs.append(b.placeholder("w", w))
    left = inputs[0] if data is None else decode(b, inputs[0], "x", data)
    if data is None:
        left = b.call(aten._to_copy.default, left, dtype=torch.float32)
    codes = b.buffer("codes", w.to(torch.int8)) if stored else inputs[1]
    args: list[Any] = [left, decode(b, codes, "w", weight)]
    count = 5 * (rest[3] if len(rest) > 3 else 1)
    numbers = torch.arange(count) * 3 - 4
    if bias == "float":
        args.append(b.buffer("bias", numbers / 8))
    elif bias == "codes":
        stored_bias = b.buffer("bias", numbers.int())
        args.append(decode(b, stored_bias, "b", by_axis(count, 0, -(2**31), 2**31 - 1)))
    elif bias == "computed":
        args.append(b.call(aten.neg.default, b.buffer("bias", numbers / 8)))
    elif rest:
        args.append(None)
    return b.finish(b.call(aten.conv_transpose2d.input, *args, *rest)), tuple(given)


def rewritten(module: GraphModule, inputs: tuple[Tensor, ...], target: Any, rewrite: Any) -> bool:
    """Rewrite all calls of an op; the numbers stay. Whether the op is gone."""
    with torch.no_grad():
        before = module(*inputs)
        for node in [n for n in module.graph.nodes if n.target is target]:
            rewrite(module, node)
        module.graph.lint()
        module.graph.eliminate_dead_code()
        module.recompile()
        after = module(*inputs)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for node in module.graph.nodes:
        if node.op == "output":
            shapes = [tuple(n.meta["val"].shape) for n in node.args[0]]
            assert shapes == [tuple(a.shape) for a in after]
    return all(n.target is not target for n in module.graph.nodes)


TILES: list[tuple[tuple[int, int], tuple[Any, ...]]] = [
    ((2, 2), ([2, 2],)), ((4, 4), ([2, 2], [1, 1])), ((2, 4), ([2, 2], [0, 1])),
    ((3, 3), ([1, 1], [1, 1])), ((3, 1), ([1, 1], [1, 0])), ((5, 5), ([3, 3], [1, 1])),
    ((2, 2), ([2, 2], [0, 0], [0, 0], 1, [1, 1])), ((6, 2), ([2, 2], [2, 0], [0, 0])),
    ((2, 2), ([2],)), ((3, 3), ([3],)),
]  # fmt: skip


@pytest.mark.parametrize(("size", "rest"), TILES)
@pytest.mark.parametrize("bias", ["none", "float", "codes"])
def test_transposed_convolutions_that_multiply_the_size_become_phases(
    size: tuple[int, int], rest: tuple[Any, ...], bias: str
) -> None:
    for weight in (WEIGHT, coded(-8, 7)):
        module, inputs = transposed(size, rest, bias=bias, weight=weight)
        assert rewritten(module, inputs, aten.conv_transpose2d.input, transposed_to_phases)
        assert aten.conv2d.default in {n.target for n in module.graph.nodes}


BLOCKS = AffineEncoding(
    scale=torch.full((2, 5, 2, 2), SCALE), zero_point=torch.zeros(2, 5, 2, 2), qmin=-8, qmax=7,
    axis=0, block=2,
)  # fmt: skip
KEPT: dict[str, dict[str, Any]] = {
    "another size": {"size": (3, 3), "rest": ([2, 2],)},
    "another width": {"size": (2, 3), "rest": ([2, 2],)},
    "a longer result": {"size": (2, 2), "rest": ([2, 2], [0, 0], [1, 0])},
    "borders of two widths": {"size": (3, 3), "rest": ([2, 2], [1, 1], [1, 1])},
    "borders of two widths below": {"size": (3, 2), "rest": ([2, 2], [1, 0], [1, 0])},
    "two strides": {"size": (2, 3), "rest": ([2, 3],)},
    "spread taps": {"size": (1, 1), "rest": ([1, 1], [0, 0], [0, 0], 1, [1, 2])},
    "groups": {"size": (2, 2), "rest": ([2, 2], [0, 0], [0, 0], 2)},
    "scales along the inputs": {"weight": by_axis(4, 0, -8, 7)},
    "zero points": {"weight": coded(-8, 7, 1)},
    "blocks of scales": {"weight": BLOCKS},
    "levels of their own": {"weight": table(-9, 0, 3, 8)},
    "a computed weight": {"stored": False},
    "a computed bias": {"bias": "computed"},
    "floats that come in": {"data": None},
}


@pytest.mark.parametrize("name", KEPT)
def test_other_transposed_convolutions_are_kept(name: str) -> None:
    given = {"size": (2, 2), "rest": ([2, 2],), **KEPT[name]}
    module, inputs = transposed(**given)
    assert not rewritten(module, inputs, aten.conv_transpose2d.input, transposed_to_phases)


def patches(
    size: tuple[int, int] = (2, 3), rest: tuple[Any, ...] = ([2, 3],), *, bias: bool = True,
    weight: Encoding | None = None, data: Encoding = DATA, shape: tuple[int, ...] = (2, 4, 6, 9),
    stored: bool = True,
) -> tuple[GraphModule, tuple[Tensor, ...]]:  # fmt: skip
    b = SingleOp()
    groups = rest[3] if len(rest) > 3 else 1
    weight = by_axis(6, 0, -8, 7) if weight is None else weight
    x, w = drawn(data, shape, 3), drawn(weight, (6, 4 // groups, *size), 4)
    inputs, given = [b.placeholder("x", x)], [x]
    if not stored:
        inputs, given = [*inputs, b.placeholder("w", w)], [x, w]
    codes = b.buffer("codes", w.to(torch.int8)) if stored else inputs[1]
    args: list[Any] = [decode(b, inputs[0], "x", data), decode(b, codes, "w", weight)]
    args.append(b.buffer("bias", torch.arange(6) / 4) if bias else None)
    return b.finish(b.call(aten.conv2d.default, *args, *rest)), tuple(given)


PATCHES: dict[str, dict[str, Any]] = {
    "patches": {}, "without a bias": {"bias": False},
    "of one number": {"size": (2, 2), "rest": ([2],), "shape": (2, 4, 6, 8)},
    "pixels": {"size": (1, 1), "rest": ([1, 1],)},
    "pixels by default": {"size": (1, 1), "rest": ()}, "rows": {"size": (1, 3), "rest": ([1, 3],)},
    "one scale": {"weight": coded(-8, 7)}, "zero points": {"weight": coded(-8, 7, 2)},
    "all said": {"rest": ([2, 3], [0, 0], [1, 1], 1)},
    "one patch": {"shape": (2, 4, 2, 3)},
}  # fmt: skip
NO_PATCHES: dict[str, dict[str, Any]] = {
    "windows that overlap": {"size": (3, 3), "rest": ([2, 3],)},
    "gaps": {"size": (2, 2), "rest": ([2, 3],)},
    "padding": {"rest": ([2, 3], [0, 1])},
    "spread taps": {"size": (1, 1), "rest": ([1, 1], [0, 0], [1, 2])},
    "groups": {"rest": ([2, 3], [0, 0], [1, 1], 2)},
    "rows left over": {"shape": (2, 4, 7, 9)},
    "columns left over": {"shape": (2, 4, 6, 10)},
    "scales along the inputs": {"weight": by_axis(4, 1, -8, 7)},
    "levels of their own": {"weight": table(-9, 0, 3, 8)},
    "inputs with levels of their own": {"data": table(-9, 0, 3, 8)},
    "inputs with scales by channel": {"data": by_axis(4, 1)},
    "a computed weight": {"stored": False},
}


@pytest.mark.parametrize("name", [*PATCHES, *NO_PATCHES])
def test_patches_become_a_linear(name: str) -> None:
    module, inputs = patches(**{**PATCHES, **NO_PATCHES}[name])
    assert rewritten(module, inputs, aten.conv2d.default, patches_to_linear) == (name in PATCHES)
    linears = [n for n in module.graph.nodes if n.target is aten.linear.default]
    assert len(linears) == (name in PATCHES)
    for node in linears:  # codes move, and are decoded last
        assert str(node.args[0].target) == "qgraph.dequantize.default"


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [None, True, False])
@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6])
def test_each_encoding_of_a_result_has_a_convolution_that_equals_no_other(
    readers: int, weight: bool, bias: bool | None
) -> None:
    b = SingleOp()
    x, w = drawn(DATA, (2, 4, 5, 6), 5), by_axis(6, 0, -8, 7) if weight else coded(-8, 7)
    codes = b.buffer("codes", drawn(w, (6, 4, 2, 2), 6).to(torch.int8))
    args: list[Any] = [decode(b, b.placeholder("x", x), "x", DATA), decode(b, codes, "w", w)]
    if bias is not None:
        grid = by_axis(6, 0, -999, 999) if bias else coded(-999, 999)
        args.append(decode(b, b.buffer("bias", torch.arange(6) - 2), "b", grid))
    node = b.call(aten.conv2d.default, *args)
    made = [coded(0, 255, 10 * k) for k in range(readers)]
    b.graph.output(tuple(encode(b, node, f"q{k}", e) for k, e in enumerate(made)))
    module = b.module
    module.recompile()
    before = module(x)
    one_per_encoding(module, node)
    module.graph.lint()
    module.recompile()
    for a, c in zip(before, module(x), strict=True):
        assert torch.equal(a, c)
    twins = [n for n in module.graph.nodes if n.target is aten.conv2d.default]
    assert len(twins) == min(readers, 2 ** (int(weight) + int(bool(bias))))
    written = {tuple(a.args[5] if len(a.args) > 5 else None for a in n.args[1:]) for n in twins}
    assert len(written) == len(twins)
    if len(twins) == readers:
        assert all(len(n.users) == 1 for n in twins)


def test_a_convolution_is_open_where_something_reads_floats() -> None:
    def found(quantizers: int, others: int) -> bool:
        b = SingleOp()
        value = b.placeholder("x", torch.zeros(1, 2, 3, 3))
        node = b.call(aten.relu.default, value)
        users: list[Node] = [encode(b, node, f"q{k}", DATA) for k in range(quantizers)]
        users += [b.call(aten.neg.default, node) for _ in range(others)]
        b.graph.output(tuple(users) or (value,))
        return is_open(node)

    assert [found(q, o) for q, o in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))] == [
        True, False, False, True, True, True,
    ]  # fmt: skip
