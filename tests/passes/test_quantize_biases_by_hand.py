# SPDX-License-Identifier: Apache-2.0
"""Scales of accumulators and codes of biases, for every kind of product, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.build import attribute
from qgraph.graph.dialect import DEQUANTIZE
from qgraph.passes import InsertQuantizers, QuantizeBiases
from qgraph.passes.quantize_biases import accumulator_scale
from tests.passes.by_hand import Hand, aten, normal, told

GRID = IntGrid(8, signed=True)
CONV, UP, LINEAR = aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default


def encoding(scale: Any, axis: int | None = None, **options: Any) -> AffineEncoding:
    held = torch.as_tensor(scale, dtype=torch.float32)
    zero = torch.zeros_like(held, dtype=torch.int32)
    return AffineEncoding(
        scale=held, zero_point=zero, qmin=GRID.qmin, qmax=GRID.qmax, axis=axis, **options
    )


def product(
    target: Any, weight: tuple[int, ...], bias: Tensor | None, data: AffineEncoding | None,
    weights: AffineEncoding | None, *rest: Any,
) -> tuple[Hand, Any]:  # fmt: skip
    """One product of quantized operands; None leaves one in float."""
    hand = Hand()
    groups = rest[3] if len(rest) > 3 and target is CONV else 1
    channels = weight[0] if target is UP else weight[1] * groups
    x = hand.given("x", normal(2, channels, *(() if target is LINEAR else (5, 5))))
    w = hand.stored("w", normal(*weight, seed=1))
    held = [] if bias is None else [hand.stored("bias", bias)]
    node = hand.call(target, x, w, *held, *rest, name="node")
    for position, chosen in ((0, data), (1, weights)):
        if chosen is not None:
            make = hand.weight_site if position else hand.data_site
            make(node, position).decide(chosen, "test")
    return hand, node


SIX = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) / 7
TIED = [1.0, 2.0, 0.5, 4.0]
BLOCKED = encoding(torch.rand(6, 2) + 0.5, 0, block=2)


@pytest.mark.parametrize(
    ("target", "weight", "data", "weights", "rest", "wanted"),
    [
        (LINEAR, (6, 4), encoding(0.5), encoding(0.25), (), torch.tensor(0.125)),
        (LINEAR, (6, 4), encoding(0.5), encoding(SIX, 0), (), 0.5 * SIX),
        (LINEAR, (6, 4), encoding(0.5), encoding(SIX, -2), (), 0.5 * SIX),
        (LINEAR, (6, 6), encoding(0.5), encoding(SIX, 1), (), None),
        (LINEAR, (6, 4), None, encoding(SIX, 0), (), None),
        (LINEAR, (6, 4), encoding(0.5), None, (), None),
        (LINEAR, (6, 4), encoding(0.5), BLOCKED, (), None),
        (LINEAR, (6, 4), encoding(TIED, -1), encoding(SIX, 0), (), 0.5 * SIX),
        (LINEAR, (6, 4), encoding(TIED, -1), encoding(0.25), (), torch.tensor(0.125)),
        (LINEAR, (6, 4), encoding([1.0, 3.0, 0.5, 4.0], -1), encoding(SIX, 0), (), None),
        (LINEAR, (6, 4), encoding([3.0, 3.0, 3.0, 3.0], -1), encoding(0.5), (), torch.tensor(1.5)),
        (LINEAR, (6, 4), encoding(TIED, -1), BLOCKED, (), None),
        (LINEAR, (6, 6), encoding([1.0] * 6, -1), encoding(SIX, 1), (), None),
        (CONV, (6, 4, 3, 3), encoding(0.5), encoding(SIX, 0), (), 0.5 * SIX),
        (CONV, (6, 2, 3, 3), encoding(0.5), encoding(SIX, 0), ([1, 1], [0, 0], [1, 1], 2),
         0.5 * SIX),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, 1), (), 0.5 * SIX),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, -3), (), 0.5 * SIX),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, 1), ([1, 1], [0, 0], [0, 0]), 0.5 * SIX),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, 1), ([1, 1], [0, 0], [0, 0], 1), 0.5 * SIX),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, 1), ([1, 1], [0, 0], [0, 0], 2, [1, 1]),
         0.5 * torch.cat([SIX, SIX])),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(SIX, 1), ([1, 1], [0, 0], [0, 0], 2),
         0.5 * torch.cat([SIX, SIX])),
        (UP, (4, 6, 3, 3), encoding(0.5), encoding(0.5), ([1, 1], [0, 0], [0, 0], 2),
         torch.tensor(0.25)),
        (UP, (6, 6, 3, 3), encoding(0.5), encoding(SIX, 0), (), None),
    ],
)  # fmt: skip
def test_an_accumulator_counts_in_products_of_both_scales(
    target, weight, data, weights, rest, wanted
):
    channels = weight[1] * (rest[3] if len(rest) > 3 else 1) if target is UP else weight[0]
    bias = torch.arange(channels) * 0.3 - 0.7
    hand, node = product(target, weight, bias, data, weights, *rest)
    module, _, _ = hand.run(InsertQuantizers())
    found = accumulator_scale(module, node)
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found, wanted)
    hand, node = product(target, weight, bias, data, weights, *rest)
    module, _, changed = hand.run(InsertQuantizers(), QuantizeBiases())
    assert changed[1] is (wanted is not None)
    read: Any = node.args[2]
    if wanted is None:
        assert read.op == "get_attr"
        return
    assert read.target is DEQUANTIZE
    codes, scale, zero = (attribute(module, str(a.target)) for a in read.args[:3])
    exact = (bias.double() / wanted.double()).tolist()
    assert codes.tolist() == [round(v) for v in exact]
    assert codes.dtype == zero.dtype == torch.int32
    assert torch.equal(scale, wanted)
    assert not bool(zero.any())
    assert read.args[3:5] == (-2147483648, 2147483647)
    assert read.args[5:] == ((0,) if wanted.ndim else ())
    assert zero.shape == scale.shape


@pytest.mark.parametrize(
    ("bias", "worst"),
    [
        ([0.0, 2.0**30], None), ([0.0, -(2.0**30)], None), ([0.0, 2.0**30 + 128], 2**30 + 128),
        ([-(2.0**30) - 128, 2.0**30], 2**30 + 128), ([0.0, 2.0**31], 2**31),
    ],
)  # fmt: skip
def test_a_bias_may_take_half_of_int32_and_not_a_code_more(bias, worst):
    hand, node = product(LINEAR, (2, 4), torch.tensor(bias), encoding(2.0), encoding(0.5))
    _, context, changed = hand.run(InsertQuantizers(), QuantizeBiases())
    assert changed[1] is (worst is None)
    assert [d.numbers["largest_code"] for d in told(context, "quantize-biases")] == (
        [] if worst is None else [worst]
    )
    read: Any = node.args[2]
    assert (read.op == "get_attr") is (worst is not None)


def test_products_without_a_stored_bias_are_left_alone():
    plain, _ = product(LINEAR, (6, 4), None, encoding(0.5), encoding(0.25))
    assert plain.run(InsertQuantizers(), QuantizeBiases())[2] == [True, False]
    hand = Hand()
    x, w = hand.given("x", normal(2, 4)), hand.stored("w", normal(6, 4))
    bias = hand.call(aten.neg.default, hand.stored("b", normal(6)))
    node = hand.call(LINEAR, x, w, bias)
    hand.data_site(node).decide(encoding(0.5), "test")
    hand.weight_site(node).decide(encoding(0.25), "test")
    mixed = hand.call(aten.matmul.default, node, hand.stored("m", normal(6, 3)))
    hand.data_site(mixed).decide(encoding(0.5), "test")
    hand.weight_site(mixed).decide(encoding(0.5), "test")
    tanh = hand.call(aten.tanh.default, mixed)
    module, _, changed = hand.run(InsertQuantizers(), QuantizeBiases())
    assert changed == [True, False]
    assert node.args[2] is bias
    assert accumulator_scale(module, tanh) is None
    found = accumulator_scale(module, mixed)
    assert found is not None
    assert float(found) == 0.25
