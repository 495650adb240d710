# SPDX-License-Identifier: Apache-2.0
"""Rows of value projections behind channels, for heads laid out in many ways."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.graph.permute_channels import permute_columns
from qgraph.graph.value_heads import ValueHeads, apply_value_heads, find_value_heads
from tests.graph.sketch import Sketch, aten

HEADS, WIDTH = 2, 3
SIZE = HEADS * WIDTH
Split = Callable[[Sketch, Node], Node]


def by_head(s: Sketch, x: Node, heads: int = HEADS, *, inner: bool = True) -> Node:
    """[B, S, C] as [B, H, S, D]; channels of a head lie together, or each head takes every H-th."""
    batch, keys, size = x.meta["val"].shape
    if inner:
        apart = s.call(aten.reshape.default, x, [batch, keys, heads, size // heads])
        return s.call(aten.transpose.int, apart, 1, 2)
    apart = s.call(aten.reshape.default, x, [batch, keys, size // heads, heads])
    return s.call(aten.permute.default, apart, [0, 3, 1, 2])


def cut(s: Sketch, x: Node, part: int) -> Node:
    parts = s.call(aten.split.Tensor, x, SIZE, -1)
    return by_head(s, s.call(operator.getitem, parts, part))


def sliced(s: Sketch, x: Node) -> Node:
    return by_head(s, s.call(aten.slice.Tensor, x, 2, SIZE, 2 * SIZE))


def attention(
    split: Split, outputs: int, *, batch: int = 2, queries: int = 4, keys: int = 5,
    bias: bool = True, change: Callable[[Sketch, dict[str, Node]], None] | None = None,
) -> tuple[GraphModule, Node, Node, tuple[torch.Tensor, ...]]:  # fmt: skip
    """softmax(x2) @ split(linear(x)) merged to [B, T, C] and read by a linear."""
    torch.manual_seed(0)
    s = Sketch()
    x = s.input(batch, keys, 4)
    logits = s.input(batch, HEADS, queries, keys, name="logits")
    linear = s.linear(x, outputs, bias=bias, name="values")
    values = split(s, linear)
    made = s.call(aten.matmul.default, s.call(aten.softmax.int, logits, -1), values)
    there = s.call(aten.transpose.int, made, 1, 2)
    merged = s.call(aten.reshape.default, there, [batch, queries, SIZE])
    if change is not None:
        change(s, {"linear": linear, "values": values, "made": made, "there": there})
    reader = s.linear(merged, 3, name="reader")
    inputs = torch.randn(batch, keys, 4), torch.randn(batch, HEADS, queries, keys)
    return s.returns(reader), merged, reader, inputs


LAYOUTS: dict[str, tuple[Split, int, list[int]]] = {
    "alone": (by_head, SIZE, list(range(SIZE))),
    "every second": (lambda s, x: by_head(s, x, inner=False), SIZE, [0, 2, 4, 1, 3, 5]),
    "second part": (lambda s, x: cut(s, x, 1), 3 * SIZE, list(range(6, 12))),
    "first part": (lambda s, x: cut(s, x, 0), 2 * SIZE, list(range(6))),
    "slice": (sliced, 2 * SIZE, list(range(6, 12))),
    "turned around": (
        lambda s, x: s.call(aten.flip.default, by_head(s, x), [-1]), SIZE, [2, 1, 0, 5, 4, 3]
    ),
    "heads exchanged": (
        lambda s, x: s.call(aten.roll.default, by_head(s, x), [1], [1]), SIZE, [3, 4, 5, 0, 1, 2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sizes", [(2, 4, 5), (1, 1, 1), (3, 1, 2), (1, 2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_heads_of_channels_are_found_and_can_be_reordered(name, sizes, bias):
    split, outputs, rows = LAYOUTS[name]
    batch, queries, keys = sizes
    module, merged, reader, inputs = attention(
        split, outputs, batch=batch, queries=queries, keys=keys, bias=bias
    )
    found = find_value_heads(merged, [reader])
    assert isinstance(found, ValueHeads), found
    assert found.linear.target is aten.linear.default
    assert found.rows.tolist() == rows
    same = found.heads[:, None] == found.heads[None]
    head = torch.arange(SIZE) // WIDTH
    assert torch.equal(same, head[:, None] == head[None])
    want = module(*inputs)
    order = found.order(torch.tensor([2, 0, 1, 1, 1, 0]))
    assert order.tolist() == [1, 2, 0, 5, 3, 4]
    apply_value_heads(module, found, order)
    permute_columns(module, reader, order)
    module.recompile()
    torch.testing.assert_close(module(*inputs), want)
    weight = module.get_buffer(str(found.linear.args[1].target))  # type: ignore[union-attr]
    old = module.get_buffer("values_weight")
    assert torch.equal(weight[rows], old[rows][order])
    others = [i for i in range(outputs) if i not in rows]
    assert torch.equal(weight[others], old[others])


def reads(which: str) -> Callable[[Sketch, dict[str, Node]], None]:
    def change(s: Sketch, nodes: dict[str, Node]) -> None:
        s.call(aten.exp.default, nodes[which])

    return change


@pytest.mark.parametrize("which", ["values", "made", "there"])
def test_values_that_others_read_too_stay_as_they_are(which):
    _, merged, reader, _ = attention(by_head, SIZE, change=reads(which))
    found = find_value_heads(merged, [reader])
    assert isinstance(found, str)
    assert found.endswith("has other readers")


def test_the_projection_itself_may_have_other_readers() -> None:
    _, merged, reader, _ = attention(sliced, 2 * SIZE, change=reads("linear"))
    assert isinstance(find_value_heads(merged, [reader]), ValueHeads)


@pytest.mark.parametrize("position", [1, 2])
def test_a_projection_of_computed_weights_is_none(position):
    def compute(s: Sketch, nodes: dict[str, Node]) -> None:
        linear = nodes["linear"]
        with s.graph.inserting_before(linear):
            stored = linear.args[position]
            linear.update_arg(position, s.call(aten.neg.default, stored))

    _, merged, reader, _ = attention(by_head, SIZE, change=compute)
    found = find_value_heads(merged, [reader])
    assert isinstance(found, str)
    assert "come from no stored linear layer" in found


def shuffled(s: Sketch, x: Node) -> Node:
    """Channels that differ between keys."""
    turned = s.call(aten.transpose.int, x, 1, 2)
    return by_head(s, s.call(aten.reshape.default, turned, list(x.meta["val"].shape)))


def repeated(s: Sketch, x: Node) -> Node:
    return s.call(aten.expand.default, by_head(s, x, 1), [2, HEADS, 5, WIDTH])


def by_input(s: Sketch, x: Node) -> Node:
    index = s.input(SIZE, name="index", dtype=torch.int64)
    return by_head(s, s.call(aten.index_select.default, x, 2, index))


@pytest.mark.parametrize(
    ("split", "outputs", "words"),
    [
        (shuffled, SIZE, "differ between keys"),
        (repeated, WIDTH, "rows of linear_default serve several heads"),
        (by_input, SIZE, "cannot be replayed: index_select_default moves by index"),
    ],
)
def test_channels_that_are_not_rows_one_to_one_say_why(split, outputs, words):
    _, merged, reader, _ = attention(split, outputs)
    found = find_value_heads(merged, [reader])
    assert isinstance(found, str)
    assert words in found


def test_a_product_with_a_number_of_channels_is_no_attention() -> None:
    s = Sketch()
    x = s.input(2, 4, 5)
    soft = s.call(aten.softmax.int, x, -1)
    value = s.call(aten.relu.default, soft)
    reader = s.linear(value, 3, name="reader")
    assert find_value_heads(value, [reader]) == "relu_default is no attention product"
