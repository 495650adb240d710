# SPDX-License-Identifier: Apache-2.0
"""What computed a value is found through movement, and through nothing that computes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.seen_through import (
    activation_behind,
    is_normalised_after,
    moved_source,
    producer,
    producers,
    rectified_behind,
    softmax_behind,
)
from tests.graph.sketch import Sketch, aten

Draw = Callable[[Sketch, Node], Node]
MASK = torch.tensor([True, False, True, False])
ONE = torch.tensor(1.5)

MOVED: dict[str, Draw] = {
    "view": lambda s, x: s.call(aten.view.default, x, [2, 12]),
    "transpose": lambda s, x: s.call(aten.transpose.int, x, 1, 2),
    "cast": lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float64),
    "cast to": lambda s, x: s.call(aten.to.dtype, x, torch.float16),
    "fill with 0": lambda s, x: s.call(aten.masked_fill.Scalar, x, s.stored(MASK, "m"), 0),
    "pad": lambda s, x: s.call(aten.constant_pad_nd.default, x, [1, 1]),
    "pad with 0": lambda s, x: s.call(aten.constant_pad_nd.default, x, [1, 1], 0),
    "any pad": lambda s, x: s.call(aten.pad.default, x, [1, 1]),
    "any pad with 0": lambda s, x: s.call(aten.pad.default, x, [1, 1], "constant", 0),
    "reflection": lambda s, x: s.call(aten.pad.default, x, [1, 1], "reflect"),
}
COMPUTED: dict[str, Draw] = {
    "relu": lambda s, x: s.call(aten.relu.default, x),
    "sum": lambda s, x: s.call(aten.add.Tensor, x, x),
    "cast to integers": lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.int32),
    "cast of integers": lambda s, x: s.call(
        aten._to_copy.default, s.stored(torch.arange(4), "i"), dtype=torch.float32
    ),
    "fill": lambda s, x: s.call(aten.masked_fill.Scalar, x, s.stored(MASK, "m"), -1.0),
    "pad with 1": lambda s, x: s.call(aten.constant_pad_nd.default, x, [1, 1], 1.0),
    "any pad with 1": lambda s, x: s.call(aten.pad.default, x, [1, 1], "constant", 1.0),
    "part of a pair": lambda s, x: s.call(operator.getitem, s.call(aten.max.dim, x, 1), 0),
    "joined": lambda s, x: s.call(aten.cat.default, [x, x], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_movement_hands_on_its_source(name):
    s = Sketch()
    x = s.input(2, 3, 4)
    assert moved_source(MOVED[name](s, x)) is x


@pytest.mark.parametrize("name", COMPUTED)
def test_what_computes_hands_nothing_on(name):
    s = Sketch()
    x = s.input(2, 3, 4)
    assert moved_source(COMPUTED[name](s, x)) is None
    assert moved_source(x) is None
    assert moved_source(s.call(aten.zeros.default, [2])) is None


def test_parts_of_a_split_are_seen_through_to_what_was_split() -> None:
    s = Sketch()
    x = s.call(aten.relu.default, s.input(2, 3, 4))
    parts = s.call(aten.split.Tensor, x, 2, 2)
    second = s.call(operator.getitem, parts, 1)
    moved = s.call(aten.transpose.int, second, 0, 1)
    assert list(producers(moved)) == [moved, second, x]
    assert producer(moved) is producer(x) is x


def test_a_softmax_is_found_behind_movement_only() -> None:
    s = Sketch()
    x = s.input(2, 3, 4)
    soft = s.call(aten.softmax.int, x, -1)
    assert softmax_behind(s.call(aten.transpose.int, soft, 1, 2)) is soft
    assert softmax_behind(soft) is soft
    assert softmax_behind(s.call(aten.mul.Tensor, soft, 2.0)) is None
    assert softmax_behind(x) is None


@pytest.mark.parametrize("name", ["gelu", "silu", "hardswish", "mish", "elu"])
def test_functions_with_a_floor_are_found(name):
    s = Sketch()
    y = s.call(getattr(aten, name).default, s.input(2, 3, 4))
    assert activation_behind(s.call(aten.view.default, y, [6, 4])) is y
    assert rectified_behind(y) is None


def sigmoid(s: Sketch, x: Node) -> Node:
    return s.call(aten.sigmoid.default, x)


def times(s: Sketch, x: Node, y: object) -> Node:
    return s.call(aten.mul.Tensor, x, y)


SWISH: dict[str, tuple[Callable[[Sketch, Node, Node], Node], bool]] = {
    "x s(x)": (lambda s, x, _: times(s, x, sigmoid(s, x)), True),
    "s(x) x": (lambda s, x, _: times(s, sigmoid(s, x), x), True),
    "x s(kx)": (lambda s, x, _: times(s, x, sigmoid(s, times(s, x, 1.7))), True),
    "s(kx) x": (lambda s, x, _: times(s, sigmoid(s, times(s, x, 1.7)), x), True),
    "x s(wx)": (lambda s, x, _: times(s, x, sigmoid(s, times(s, s.stored(ONE), x))), True),
    "x s(xw)": (lambda s, x, _: times(s, x, sigmoid(s, times(s, x, s.stored(ONE)))), True),
    "y s(x)": (lambda s, x, y: times(s, y, sigmoid(s, x)), False),
    "x s(yx)": (lambda s, x, y: times(s, x, sigmoid(s, times(s, y, x))), False),
    "x s(xy)": (lambda s, x, y: times(s, x, sigmoid(s, times(s, x, y))), False),
    "x s(ky)": (lambda s, x, y: times(s, x, sigmoid(s, times(s, y, 1.7))), False),
    "x s(x + 1)": (lambda s, x, _: times(s, x, sigmoid(s, s.call(aten.add.Tensor, x, 1.0))), False),
    "x r(x)": (lambda s, x, _: times(s, x, s.call(aten.relu.default, x)), False),
    "2 x": (lambda s, x, _: times(s, x, 2.0), False),
    "x + s(x)": (lambda s, x, _: s.call(aten.add.Tensor, x, sigmoid(s, x)), False),
}


@pytest.mark.parametrize("name", SWISH)
def test_a_value_gated_by_itself_is_an_activation_and_by_another_is_none(name):
    draw, counts = SWISH[name]
    s = Sketch()
    node = draw(s, s.input(2, 3), s.input(2, 3, name="y"))
    assert activation_behind(node) is (node if counts else None)


def test_a_relu_is_found_behind_pooling_and_movement() -> None:
    s = Sketch()
    x = s.input(2, 3, 8, 8)
    for target in (aten.relu.default, aten.relu6.default):
        y = s.call(target, x)
        pooled = s.call(aten.max_pool2d.default, y, [2, 2])
        again = s.call(aten.max_pool2d.default, s.call(aten.transpose.int, pooled, 2, 3), [2, 2])
        for node in (y, pooled, s.call(aten.flatten.using_ints, again, 1)):
            assert rectified_behind(node) is y
    assert rectified_behind(s.call(aten.max_pool2d.default, x, [2, 2])) is None
    assert rectified_behind(s.call(aten.avg_pool2d.default, y, [2, 2])) is None
    assert activation_behind(y) is None


def norm(s: Sketch, x: Node) -> Node:
    return s.call(aten.layer_norm.default, x, [4])


READERS: dict[str, tuple[Callable[[Sketch, Node], object], bool]] = {
    "nothing": (lambda s, x: None, False),
    "a norm": (norm, True),
    "two norms": (lambda s, x: (norm(s, x), norm(s, x)), True),
    "a norm behind a move": (lambda s, x: norm(s, s.call(aten.view.default, x, [6, 4])), True),
    "a norm behind a sum": (lambda s, x: norm(s, s.call(aten.add.Tensor, x, s.stored(ONE))), True),
    "a norm and a function": (lambda s, x: (norm(s, x), s.call(aten.relu.default, x)), False),
    "a function before a norm": (lambda s, x: norm(s, s.call(aten.relu.default, x)), False),
    "a sum that is read elsewhere": (lambda s, x: branch(s, s.call(aten.add.Tensor, x, x)), False),
    "only movement": (lambda s, x: s.call(aten.view.default, x, [6, 4]), False),
    "two ways to one norm": (
        lambda s, x: norm(s, s.call(aten.add.Tensor, s.call(aten.alias.default, x), x)), True
    ),
}  # fmt: skip


def branch(s: Sketch, x: Node) -> None:
    norm(s, x)
    s.call(aten.relu.default, x)


@pytest.mark.parametrize("name", READERS)
def test_a_value_is_normalised_where_norms_alone_read_it(name):
    draw, wanted = READERS[name]
    s = Sketch()
    x = s.input(2, 3, 4)
    draw(s, x)
    assert is_normalised_after(x) is wanted
