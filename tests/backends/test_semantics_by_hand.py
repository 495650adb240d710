# SPDX-License-Identifier: Apache-2.0
"""Roles of nodes on graphs written by hand: what stays in codes, and what must become floats."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from qgraph.backends.levels import Levels
from qgraph.backends.semantics import Role, Semantics, analyze
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.ops import aten
from qgraph.passes import InsertQuantizers, PackWeights, QuantizeBiases
from tests.passes.by_hand import Hand, normal

U8, S8 = IntGrid(8, signed=False), IntGrid(8, signed=True)
DATA = AffineEncoding.per_tensor(0.05, 100, U8)
OTHER = AffineEncoding.per_tensor(0.04, 100, U8)
WEIGHT = AffineEncoding.per_tensor(0.02, 0, S8)


def by_channel(count: int, axis: int) -> AffineEncoding:
    scale = normal(count).abs() / 10 + 0.01
    zero = torch.full((count,), 90, dtype=torch.int32)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=0, qmax=255, axis=axis)


def read(hand: Hand, node: Any, path: int = 0, encoding: Any = DATA) -> None:
    """Quantize what a node reads."""
    hand.data_site(node, path).decide(encoding, "test")


def layer(hand: Hand, x: Any, name: str, encoding: Any = DATA, width: int | None = None) -> Any:
    """A linear of quantized operands."""
    size = width or x.meta["val"].shape[-1]
    node = hand.linear(x, normal(size, x.meta["val"].shape[-1]), name=name)
    read(hand, node, encoding=encoding)
    hand.weight_site(node).decide(WEIGHT, "test")
    return node


def roles(hand: Hand, *outputs: Any) -> tuple[Semantics, Any]:
    """The decisions, and a look-up by node."""
    module = hand.module(*outputs)
    context = hand.context(module)
    InsertQuantizers().run(module, context)
    module.graph.lint()
    found = analyze(module)
    return found, lambda node: found.roles[node]


CLAMPS: list[tuple[Any, tuple[Any, ...], Any]] = [
    (aten.relu.default, (), (0.0, float("inf"))),
    (aten.hardtanh.default, (-1, 2), (-1.0, 2.0)),
    (aten.clamp_max.default, (3,), (float("-inf"), 3.0)),
]


@pytest.mark.parametrize(("target", "rest", "bounds"), CLAMPS)
def test_a_clamp_waits_with_its_accumulator(target, rest, bounds):
    hand = Hand()
    first = layer(hand, hand.given("x", normal(3, 4)), "first")
    moved = hand.call(aten.reshape.default, first, [2, 6])
    clamp = hand.call(target, moved, *rest)
    second = layer(hand, clamp, "second")
    found, role = roles(hand)
    assert [role(n) for n in (first, moved, clamp, second)] == [
        Role.PRODUCT, Role.MOVE, Role.CLAMP, Role.PRODUCT,
    ]  # fmt: skip
    assert found.clamps == {clamp: bounds}
    assert {found.sources[n] for n in (first, moved, clamp)} == {first}


FUNCTIONS: list[tuple[Any, tuple[Any, ...], bool]] = [
    (aten.tanh.default, (), True),
    (aten.mul.Tensor, (2.0,), True),
    (aten.add.Tensor, (1,), True),
    (aten.relu.default, (), True),
    (aten.softmax.int, (0,), False),
]


@pytest.mark.parametrize(("target", "rest", "fits"), FUNCTIONS)
@pytest.mark.parametrize("encoding", ["tensor", "channel"])
@pytest.mark.parametrize("end", ["quantizer", "channel quantizer", "float", "both", "nobody"])
def test_a_function_between_two_quantizers_is_a_table(target, rest, fits, encoding, end):
    hand = Hand()
    x = hand.given("x", normal(3, 4))
    node = hand.call(target, x, *rest)
    read(hand, node, encoding=DATA if encoding == "tensor" else by_channel(4, 1))
    moved = hand.call(aten.unsqueeze.default, node, 0)
    outputs = []
    if end not in {"float", "nobody"}:
        last = by_channel(4, 2) if end.startswith("channel") else DATA
        outputs.append(layer(hand, moved, "fc", last))
    if end in {"float", "both"}:
        outputs.append(hand.call(aten.sum.default, node))
    if end == "nobody":
        outputs.append(hand.call(aten.sum.default, x))
    found, role = roles(hand, *outputs)
    table = fits and encoding == "tensor" and end == "quantizer"
    assert role(node) is (Role.TABLE if table else Role.FLOAT)
    assert (node in found.functions) is table
    if table:
        assert role(moved) is Role.MOVE
        ((function, given, _),) = found.functions[moved]
        assert (function, given) == (target, rest)


def test_codes_of_more_than_sixteen_bits_have_no_table():
    for bits, role in ((16, Role.TABLE), (32, Role.FLOAT)):
        top = 2 ** (bits - 1)
        hand = Hand()
        node = hand.call(aten.tanh.default, hand.given("x", normal(3, 4)))
        encoding = AffineEncoding(
            scale=torch.tensor(0.01),
            zero_point=torch.tensor(0, dtype=torch.int32),
            qmin=-top,
            qmax=top - 1,
        )
        read(hand, node, encoding=encoding)
        layer(hand, node, "fc")
        assert roles(hand)[1](node) is role


def test_functions_behind_each_other_are_one_table_and_sizes_may_be_asked():
    hand = Hand()
    x = hand.given("x", normal(3, 4))
    first = hand.call(aten.tanh.default, x)
    read(hand, first)
    second = hand.call(aten.mul.Tensor, first, 3.0)
    size = hand.graph.call_function(aten.sym_size.int, (second, 0))
    size.meta["val"] = 3
    last = layer(hand, second, "fc")
    found, role = roles(hand)
    assert [role(n) for n in (first, second, size)] == [Role.TABLE, Role.TABLE, Role.SHAPE]
    assert [f[0] for f in found.functions[second]] == [aten.tanh.default, aten.mul.Tensor]
    assert role(last) is Role.PRODUCT
    hand = Hand()
    a = hand.call(aten.tanh.default, hand.given("x", normal(3, 4)))
    read(hand, a)
    b = hand.call(aten.mul.Tensor, hand.given("y", normal(3, 4)), a)
    layer(hand, b, "fc")
    found, role = roles(hand)
    assert role(a) is Role.FLOAT, "the product with a tensor is no function of one element"


@pytest.mark.parametrize(
    ("first", "second", "role"),
    [
        (DATA, DATA, Role.MOVE),
        (DATA, AffineEncoding.per_tensor(0.05, 100, U8), Role.MOVE),
        (DATA, OTHER, Role.FLOAT),
        (DATA, None, Role.FLOAT),
        (None, DATA, Role.FLOAT),
        (None, None, Role.FLOAT),
        (by_channel(4, 1), by_channel(4, 1), Role.FLOAT),
    ],
)
def test_values_of_one_encoding_are_joined_as_codes(first, second, role):
    hand = Hand()
    x, y = hand.given("x", normal(3, 4)), hand.given("y", normal(2, 4))
    parts = []
    for value, encoding in ((x, first), (y, second)):
        part = hand.call(aten.clone.default, value)
        if encoding is not None:
            read(hand, part, encoding=encoding)
        parts.append(part)
    joined = hand.call(aten.cat.default, parts)
    found, of = roles(hand)
    assert of(joined) is role
    assert (joined in found.levels) is (role is Role.MOVE)


def test_accumulators_and_tables_are_not_joined_as_codes():
    hand = Hand()
    x = hand.given("x", normal(3, 4))
    product = layer(hand, x, "fc")
    joined = hand.call(aten.cat.default, [product, product])
    _, role = roles(hand)
    assert role(joined) is Role.FLOAT


def test_products_of_floats_say_which_operand_is_one():
    hand = Hand()
    x, y = hand.given("x", normal(3, 4)), hand.given("y", normal(4, 4))
    plain = hand.call(aten.matmul.default, x, y, name="plain")
    left = hand.call(aten.matmul.default, x, y, name="left")
    read(hand, left)
    both = hand.call(aten.matmul.default, x, y, name="both")
    read(hand, both)
    read(hand, both, 1)
    own = hand.call(aten.matmul.default, y, y, name="own")
    read(hand, own, 0, OTHER)
    hand.data_site(own, 1).decide(OTHER, "test")
    found, role = roles(hand, plain, left, both, own)
    assert [role(n) for n in (plain, left, both, own)] == [
        Role.FLOAT, Role.FLOAT, Role.PRODUCT, Role.PRODUCT,
    ]  # fmt: skip
    assert found.reasons[plain] == "operand x and y not quantized"
    assert found.reasons[left] == "operand y not quantized"


@pytest.mark.parametrize("axis", [1, 2])
def test_pieces_keep_how_they_are_read_and_a_cut_axis_does_not(axis):
    hand = Hand()
    x = hand.given("x", normal(2, 3, 4))
    whole = hand.call(aten.clone.default, x)
    read(hand, whole, encoding=by_channel(3, 1))
    turned = hand.call(aten.transpose.int, whole, 1, 2)
    piece = hand.call(aten.slice.Tensor, turned, axis, 0, 2)
    fc = hand.linear(piece, normal(5, piece.meta["val"].shape[-1]))
    found, role = roles(hand)
    assert role(turned) is Role.MOVE
    assert found.levels[turned].axis == 2
    assert role(piece) is (Role.MOVE if axis == 1 else Role.FLOAT)
    assert role(fc) is Role.FLOAT
    hand = Hand()
    chunks = hand.call(aten.clone.default, hand.given("x", normal(4, 4)))
    read(hand, chunks)
    split = hand.graph.call_function(aten.chunk.default, (chunks, 2))
    split.meta["val"] = list(chunks.meta["val"].chunk(2))
    half = hand.graph.call_function(operator.getitem, (split, 1))
    half.meta["val"] = split.meta["val"][1]
    last = layer(hand, half, "fc")
    found, role = roles(hand)
    assert [role(n) for n in (split, half)] == [Role.MOVE, Role.MOVE]
    assert isinstance(found.levels[half], Levels)
    assert role(last) is Role.PRODUCT


@pytest.mark.parametrize("encoding", [DATA, by_channel(3, 1)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_interpolation_works_on_levels_where_one_scale_serves(encoding, mode):
    hand = Hand()
    x = hand.given("x", normal(2, 3, 4, 4))
    target = aten.upsample_bilinear2d.vec if mode == "bilinear" else aten.upsample_nearest2d.vec
    rest = ([8, 8], False, None) if mode == "bilinear" else ([8, 8], None)
    node = hand.call(target, x, *rest)
    read(hand, node, encoding=encoding)
    _, role = roles(hand)
    wanted = mode == "bilinear" and encoding is DATA
    assert (role(node) is Role.RESAMPLE) is wanted


def test_images_are_channels_last_and_other_values_are_contiguous():
    hand = Hand()
    x = hand.given("x", normal(2, 3, 8, 8))
    conv = hand.call(aten.conv2d.default, x, hand.stored("w", normal(4, 3, 3, 3)))
    tanh = hand.call(aten.tanh.default, conv)
    total = hand.call(aten.add.Tensor, tanh, hand.given("y", normal(2, 4, 6, 6)))
    pooled = hand.call(aten.max_pool2d.default, total, [2, 2])
    flat = hand.call(aten.flatten.using_ints, pooled, 2)
    soft = hand.call(aten.softmax.int, conv, 1)
    plain = hand.call(aten.tanh.default, x)
    whole = hand.call(aten.argmax.default, plain, 1, True)
    read(hand, pooled)
    found, _ = roles(hand, flat, soft, plain, whole)
    last, usual = torch.channels_last, torch.contiguous_format
    for node, layout in (
        (conv, last), (tanh, last), (total, last), (pooled, last), (flat, None), (soft, usual),
        (plain, usual), (x, usual), (whole, None),
    ):  # fmt: skip
        assert found.layout(node) is layout, node
    assert {conv, tanh, total, pooled} <= found.images


@pytest.mark.parametrize("kind", ["codes", "float", "shifted", "none"])
def test_a_bias_starts_the_accumulator_where_it_is_stored_on_its_scale(kind):
    hand = Hand()
    x = hand.given("x", normal(3, 4))
    bias = None if kind == "none" else normal(5)
    node = hand.linear(x, normal(5, 4, seed=1), bias, name="fc")
    read(hand, node)
    hand.weight_site(node).decide(WEIGHT, "test")
    items = [InsertQuantizers(), *([QuantizeBiases()] if kind in {"codes", "shifted"} else []),
             PackWeights()]  # fmt: skip
    module, _, _ = hand.run(*items)
    if kind == "shifted":
        next(b for n, b in module.named_buffers() if n.endswith("bias_zero_point")).fill_(1)
    found = analyze(module)
    form = found.products[node]
    assert (form.bias_codes is not None) is (kind == "codes")
    assert (form.bias is not None) is (kind in {"float", "shifted"})
    assert (node in found.sources) is (kind in {"codes", "none"})
    if kind == "codes":
        wanted = (normal(5).double() / form.scale.double().flatten()).round().int()
        assert torch.equal(found.constant(node.args[2]), wanted)
        values = found.constant_value(node.args[2])
        assert torch.allclose(values, normal(5), atol=1e-3)
    weight = found.constant(node.args[1])
    assert torch.equal(weight, WEIGHT.encode(normal(5, 4, seed=1)))
    assert torch.equal(found.constant_value(node.args[1]), WEIGHT.fake(normal(5, 4, seed=1)))
