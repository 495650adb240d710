# SPDX-License-Identifier: Apache-2.0
"""Which signs of rows are free, against trying all of them; and what is said about the others."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.channel_maps import ChannelMaps
from qgraph.graph.row_labels import RowLabels, concrete, is_source, label_rows
from qgraph.graph.sign_folding import fold_signs
from tests.graph.sketch import Sketch, aten

Draw = Callable[[Sketch, Node, Node], Node]
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def drawn(draw: Draw) -> tuple[GraphModule, RowLabels]:
    """Two linears of two rows, [2, 3, 2] each, and what is drawn behind them."""
    torch.manual_seed(0)
    s = Sketch()
    x = s.input(2, 3, 5)
    first, second = s.linear(x, 2, name="q"), s.linear(x, 2, name="k")
    module = s.returns(draw(s, first, second))
    return module, label_rows(module, [first, second])


def flipped(module: GraphModule, signs: tuple[int, ...]) -> Tensor:
    """The output when rows change their signs."""
    twin = module.__copy__()
    for name, part in (("q", signs[:2]), ("k", signs[2:])):
        factor = torch.tensor(part, dtype=torch.float64)
        for kind, values in (("weight", factor[:, None]), ("bias", factor)):
            setattr(twin, f"{name}_{kind}", getattr(module, f"{name}_{kind}") * values)
    result = twin(X)
    return torch.view_as_real(result) if result.is_complex() else result


def preserved(module: GraphModule) -> set[tuple[int, ...]]:
    """All changes of signs that leave the output as it is, by trying."""
    wanted = flipped(module, (1, 1, 1, 1))
    every = itertools.product((1, -1), repeat=4)
    return {
        signs for signs in every if torch.allclose(flipped(module, signs), wanted, equal_nan=True)
    }


def promised(labels: RowLabels) -> set[tuple[int, ...]]:
    """All changes of signs of whole free classes."""
    classes = labels.classes
    roots = [classes.find(v) for v in range(1, 5)]
    free = sorted({r for r in roots if classes.reason(r) is None})
    return {
        tuple(chosen.get(r, 1) for r in roots)
        for signs in itertools.product((1, -1), repeat=len(free))
        for chosen in [dict(zip(free, signs, strict=True))]
    }


def turned(s: Sketch, x: Node) -> Node:
    return s.call(aten.transpose.int, x, -2, -1)


def scores(s: Sketch, q: Node, k: Node) -> Node:
    return s.call(aten.matmul.default, q, turned(s, k))


def before(change: Callable[[Sketch, Node], Node]) -> Draw:
    """Scores of what a change makes of both."""
    return lambda s, q, k: scores(s, change(s, q), change(s, k))


def half_turned(s: Sketch, x: Node) -> Node:
    """x * c + (-x_2, x_1) * d: a rotation that pairs the two channels."""
    one, two = (s.call(aten.slice.Tensor, x, -1, i, i + 1) for i in (0, 1))
    other = s.call(aten.cat.default, [s.call(aten.neg.default, two), one], -1)
    angle = torch.tensor([[0.3, 0.5], [0.1, 0.9], [0.7, 0.2]])
    cosine, sine = s.stored(angle.cos(), "cos"), s.stored(angle.sin(), "sin")
    return s.call(
        aten.add.Tensor, s.call(aten.mul.Tensor, x, cosine), s.call(aten.mul.Tensor, sine, other)
    )


def complex_turned(s: Sketch, x: Node) -> Node:
    pair = s.call(aten.view_as_complex.default, x)
    return s.call(aten.view_as_real.default, s.call(aten.mul.Tensor, pair, 0.5))


def split(s: Sketch, x: Node) -> Node:
    parts = s.call(aten.split.Tensor, x, 1, -1)
    swapped = [s.call(operator.getitem, parts, i) for i in (1, 0)]
    return s.call(aten.cat.default, swapped, -1)


def number(target: object, *values: object) -> Callable[[Sketch, Node], Node]:
    return lambda s, x: s.call(target, x, *values)


def mask(s: Sketch) -> Node:
    return s.stored(torch.tensor([[True], [False], [True]]), "mask")


def fixed(s: Sketch) -> Node:
    return s.stored(torch.tensor([[0.5, 2.0]]), "fixed")


def heads_scored(s: Sketch, q: Node, k: Node) -> Node:
    both = s.call(aten.stack.default, [q, k], 0)
    return s.call(aten.matmul.default, both, turned(s, both))


def all_added(s: Sketch, *values: Node) -> Node:
    total = functools.reduce(lambda a, b: s.call(aten.add.Tensor, a, b), values)
    return s.call(aten.abs.default, total)


EXACT: dict[str, Draw] = {
    "scores": scores,
    "scores of odd functions": before(number(aten.tanh.default)),
    "scores of negatives": before(number(aten.neg.default)),
    "scores of thirds": before(number(aten.div.Tensor, 3.0)),
    "scores of products with a table": before(
        lambda s, x: s.call(aten.mul.Tensor, s.stored(torch.tensor([[0.5], [2.0], [3.0]])), x)
    ),
    "scores of cubes": before(number(aten.pow.Tensor_Scalar, 3)),
    "scores of swapped channels": before(split),
    "scores of rows with zeros": before(
        lambda s, x: s.call(aten.masked_fill.Scalar, x, mask(s), 0)
    ),
    "scores of rotations": before(half_turned),
    "scores of complex halves": before(complex_turned),
    "scores of stacks": before(
        lambda s, x: s.call(aten.flatten.using_ints, s.call(aten.stack.default, [x, x], 2), 1, 2)
    ),
    "scores of sums with themselves": before(lambda s, x: s.call(aten.add.Tensor, x, x)),
    "scores read twice": lambda s, q, k: s.call(
        aten.add.Tensor, scores(s, q, k), s.call(aten.exp.default, scores(s, q, k))
    ),
    "squares": lambda s, q, k: s.call(aten.pow.Tensor_Scalar, q, 2),
    "sizes": lambda s, q, k: s.call(aten.abs.default, q),
    "cosines": lambda s, q, k: s.call(aten.cos.default, k),
    "its own square": lambda s, q, k: s.call(aten.mul.Tensor, q, q),
    "a product of both": lambda s, q, k: s.call(aten.mul.Tensor, q, k),
    "a product with turned rows": lambda s, q, k: s.call(
        aten.mul.Tensor, q, s.call(aten.roll.default, k, [1], [2])
    ),
    "itself returned": lambda s, q, k: q,
    "a sum": lambda s, q, k: s.call(aten.abs.default, s.call(aten.add.Tensor, q, k)),
    "a difference": lambda s, q, k: s.call(aten.abs.default, s.call(aten.sub.Tensor, q, k)),
    "a sum with a number": lambda s, q, k: s.call(
        aten.abs.default, s.call(aten.add.Tensor, q, 1.0)
    ),
    "a function that is not odd": lambda s, q, k: s.call(aten.gelu.default, k),
    "rows filled with one": lambda s, q, k: s.call(
        aten.abs.default,
        s.call(aten.masked_fill.Scalar, s.call(aten.add.Tensor, q, k), mask(s), 1),
    ),
    "a divisor": lambda s, q, k: s.call(aten.div.Tensor, 1.0, s.call(aten.add.Tensor, q, 9.0)),
    "a root": lambda s, q, k: s.call(aten.pow.Tensor_Scalar, s.call(aten.abs.default, q), 0.5),
    "rows against rows": lambda s, q, k: s.call(
        aten.matmul.default, q, s.call(aten.transpose.int, q, 1, 2)
    ),
    "tokens against tokens": lambda s, q, k: s.call(aten.matmul.default, turned(s, q), k),
    "softmax of itself": lambda s, q, k: s.call(aten.softmax.int, q, -1),
    "scores of first powers": before(number(aten.pow.Tensor_Scalar, 1)),
    "scores of tokens in a stored order": before(
        lambda s, x: s.call(aten.index_select.default, x, 1, s.stored(torch.tensor([2, 0]), "at"))
    ),
    "scores of channels in a stored order": before(
        lambda s, x: s.call(aten.index_select.default, x, -1, s.stored(torch.tensor([1, 0]), "at"))
    ),
    "scores beside channels of no row": before(
        lambda s, x: s.call(aten.cat.default, [x, s.stored(torch.ones(2, 3, 1), "one")], -1)
    ),
    "scores of heads": heads_scored,
    "a sum with a stored value behind": lambda s, q, k: all_added(s, q, fixed(s), k),
    "a sum with a stored value in front": lambda s, q, k: all_added(s, fixed(s), q, k),
    "a factor in front of a sum": lambda s, q, k: all_added(
        s, s.call(aten.mul.Tensor, fixed(s), q), k
    ),
    "a factor behind in a sum": lambda s, q, k: all_added(
        s, s.call(aten.mul.Tensor, q, fixed(s)), k
    ),
    "a convolution in a sum": lambda s, q, k: all_added(
        s, s.call(aten.conv1d.default, q, s.stored(torch.ones(4, 3, 1), "conv")),
        s.stored(torch.ones(4, 2), "four"),
    ),
}  # fmt: skip
# where less is promised than is true: "filled with one" pins its rows, which `abs` would not need
MODEST = {"rows filled with one", "tokens against tokens", "scores of complex halves"}


@pytest.mark.parametrize("name", EXACT)
def test_the_free_signs_are_those_that_change_nothing(name):
    module, labels = drawn(EXACT[name])
    module.double()
    promises, truth = promised(labels), preserved(module)
    assert promises <= truth
    assert name in MODEST or promises == truth


def norms(s: Sketch, x: Node) -> Node:
    return s.call(aten.layer_norm.default, x, [2])


WHY: dict[str, tuple[Draw, str]] = {
    "layer norm": (before(norms), "LayerNorm mixes the channels"),
    "gelu": (before(number(aten.gelu.default)), "a function that is not odd"),
    "softmax": (before(number(aten.softmax.int, -1)), "softmax of the value itself"),
    "output": (lambda s, q, k: s.call(aten.cat.default, [q, k], -1), "returned by the model"),
    "bias": (before(number(aten.add.Tensor, 1.0)), "a value of fixed sign is added by add"),
    "fill": (before(lambda s, x: s.call(aten.masked_fill.Scalar, x, mask(s), 2)),
             "filled with a number of fixed sign"),
    "divisor": (before(lambda s, x: s.call(aten.div.Tensor, s.stored(torch.ones(2)), x)),
                "divides another value"),
    "power": (before(number(aten.pow.Tensor_Scalar, 0.5)), "neither odd nor even"),
    "zeroth power": (before(number(aten.pow.Tensor_Scalar, 0)), "neither odd nor even"),
    "weight": (
        lambda s, q, k: s.call(aten.linear.default, k, s.call(aten.select.int, q, 0, 1)),
        "read by linear",
    ),
    "negative power": (before(number(aten.pow.Tensor_Scalar, -2)), "neither odd nor even"),
    "activations": (
        lambda s, q, k: scores(s, q, s.call(aten.relu.default, s.call(aten.abs.default, k))),
        "in a product with other activations",
    ),
    "convolution": (
        lambda s, q, k: s.call(aten.conv1d.default, s.call(aten.add.Tensor, q, k),
                               s.stored(torch.ones(4, 3, 1))), "read by conv1d",
    ),
    "sort": (before(lambda s, x: s.call(operator.getitem, s.call(aten.sort.default, x), 0)),
             "meets sort"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_pinned_rows_say_what_pins_them(name):
    draw, words = WHY[name]
    module, labels = drawn(draw)
    reasons = [labels.classes.reason(v) for v in range(1, 5)]
    said = [r for r in reasons if r is not None]
    assert said
    assert all(words in r for r in said)
    assert promised(labels) <= preserved(module.double())


def table_on_the_right(s: Sketch, q: Node, k: Node) -> Node:
    table = s.stored(torch.randn(2, 4))  # [D, positions]
    return s.call(aten.matmul.default, s.call(aten.mul.Tensor, q, k), table)


def table_on_the_left(s: Sketch, q: Node, k: Node) -> Node:
    table = s.stored(torch.randn(4, 2))
    return s.call(aten.matmul.default, table, turned(s, q))


def table_per_row(s: Sketch, q: Node, k: Node) -> Node:
    table = s.stored(torch.randn(3, 2, 4))
    return s.call(aten.matmul.default, s.call(aten.unsqueeze.default, q, 2), table)


def next_linear(s: Sketch, q: Node, k: Node) -> Node:
    return s.linear(s.call(aten.tanh.default, q), 6, name="o")


TABLES: dict[str, tuple[Draw, int, int, list[int]]] = {
    "on the right": (lambda s, q, k: s.call(
        aten.matmul.default, q, s.stored(torch.randn(2, 4))), -2, 1, [2, 1]),
    "on the left": (table_on_the_left, -1, 0, [1, 2]),
    "on the left, square": (lambda s, q, k: s.call(
        aten.matmul.default, s.stored(torch.randn(2, 2)), turned(s, q)), -1, 0, [1, 2]),
    "of more axes than the value": (lambda s, q, k: s.call(
        aten.matmul.default, q, s.stored(torch.randn(5, 1, 2, 4))), -2, 1, [1, 1, 2, 1]),
    "of more axes on the left": (lambda s, q, k: s.call(
        aten.matmul.default, s.stored(torch.randn(5, 1, 4, 2)), turned(s, q)), -1, 0,
        [1, 1, 1, 2]),
    "per row": (table_per_row, -2, 1, [1, 2, 1]),
    "of another linear": (next_linear, -1, 1, [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_stored_tables_are_rewritten_along_with_the_rows_that_meet_them(name):
    draw, axis, position, shape = TABLES[name]
    module, labels = drawn(draw)
    (item,) = labels.compensations
    assert (item.axis, item.edge.path) == (axis, (position,))
    assert list(item.labels.shape) == shape
    assert sorted(item.labels.flatten().tolist()) == [1, 2]
    assert [labels.classes.find(v) for v in (1, 2)] == [1, 2]
    wanted = module(X.float())
    for roots in ([1], [2], [1, 2]):
        module, labels = drawn(draw)
        assert fold_signs(module, ChannelMaps((), (), labels), roots)
        module.recompile()
        assert torch.equal(module(X.float()), wanted)


def test_a_table_shared_by_heads_makes_their_rows_agree() -> None:
    def heads(s: Sketch, q: Node, k: Node) -> Node:
        both = s.call(aten.stack.default, [q, k], 1)  # [2, heads, 3, 2]
        return s.call(aten.matmul.default, both, s.stored(torch.randn(2, 4)))

    module, labels = drawn(heads)
    assert [labels.classes.find(v) for v in range(1, 5)] == [1, 2, 1, 2]
    own, labels = drawn(lambda s, q, k: s.call(
        aten.matmul.default, s.call(aten.stack.default, [q, k], 1),
        s.stored(torch.randn(2, 2, 4)),
    ))  # fmt: skip
    assert [labels.classes.find(v) for v in range(1, 5)] == [1, 2, 3, 4]
    assert labels.compensations[0].labels.flatten().tolist() == [1, 2, 3, 4]
    assert own is not module


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_linear_that_reads_several_heads_makes_their_rows_agree(axis):
    def heads(s: Sketch, q: Node, k: Node) -> Node:
        return s.linear(s.call(aten.stack.default, [q, k], axis), 6, name="o")

    _, labels = drawn(heads)
    assert [labels.classes.find(v) for v in range(1, 5)] == [1, 2, 1, 2]
    (item,) = labels.compensations
    assert (item.edge.path, item.axis, item.labels.tolist()) == ((1,), -1, [[1, 2]])
    assert [labels.classes.reason(v) for v in range(1, 5)] == [None] * 4


def test_what_is_moved_by_an_input_is_pinned_and_computed_weights_are_no_source() -> None:
    s = Sketch()
    x, at = s.input(2, 3, 5), s.input(2, name="at", dtype=torch.int64)
    q = s.linear(x, 2, name="q")
    moved = s.call(aten.index_select.default, q, 1, at)
    weight = s.call(aten.neg.default, s.stored(torch.ones(4, 5), "w"))
    other = s.call(aten.linear.default, x, weight)
    module = s.returns(s.call(aten.abs.default, moved), other)
    labels = label_rows(module, [q])
    said = [labels.classes.reason(v) for v in (1, 2)]
    assert all("moved by indices that depend on the input" in (r or "") for r in said)
    assert not is_source(other)
    assert labels.sources == [q]


def test_one_weight_read_twice_is_the_same_rows_and_convolutions_label_axis_one() -> None:
    s = Sketch()
    x = s.input(2, 3, 8, 8)
    first = s.conv(x, 4, name="c")
    second = s.conv(s.call(aten.neg.default, x), 4, name="c")
    last = s.linear(s.input(2, 3, name="y"), 5, name="f")
    module = s.returns(
        s.call(aten.abs.default, s.call(aten.add.Tensor, first, second)),
        s.call(aten.abs.default, last),
    )
    labels = label_rows(module, [second, last])
    assert labels.sources == [first, second, last]
    assert labels.offsets == {"c_weight": 0, "f_weight": 4}
    assert labels.rows_of(first).tolist() == labels.rows_of(second).tolist() == [1, 2, 3, 4]
    assert labels.rows_of(last).tolist() == [5, 6, 7, 8, 9]
    value = labels.values[first]
    assert list(value.shape) == [1, 4, 1, 1]
    assert value.flatten().tolist() == [1, 2, 3, 4]
    assert [labels.classes.reason(v) for v in range(1, 10)] == [None] * 9
    assert is_source(first)
    assert is_source(last)
    assert not is_source(x)
    assert concrete(7) == 7


def test_free_sizes_are_those_of_the_trace() -> None:
    s = Sketch()
    x = s.input(4, 3, 5, free=1)
    q = s.linear(x, 2, name="q")
    size = s.call(aten.sym_size.int, q, 0)
    flat = s.call(aten.reshape.default, q, [size, 6])
    back = s.call(aten.reshape.default, flat, [size, 3, 2])
    module = s.returns(s.call(aten.matmul.default, back, turned(s, back)))
    labels = label_rows(module, [q])
    assert concrete(x.meta["val"].shape[0]) == 4
    assert [labels.classes.reason(v) for v in (1, 2)] == [None, None]
    assert labels.values[back].flatten().tolist() == [1, 2]


def test_events_are_what_does_more_than_move_or_scale() -> None:
    _, labels = drawn(lambda s, q, k: scores(
        s, s.call(aten.mul.Tensor, s.call(aten.tanh.default, q), 2.0), k
    ))  # fmt: skip
    seen = {node.name: rows.tolist() for node, rows in labels.events}
    assert seen["tanh_default"] == [1, 2]
    assert seen["matmul_default"] == [1, 2, 3, 4]
    assert "mul_tensor" not in seen
    assert "transpose_int" not in seen
    assert {n.name for n in labels.values} == {"mul_tensor", "transpose_int"}
