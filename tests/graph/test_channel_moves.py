# SPDX-License-Identifier: Apache-2.0
"""Orders and scales of channels: where they change for nothing, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.edges import Edge, in_edges, out_edges
from qgraph.graph.permute_channels import (
    Fold,
    apply_fold,
    find_fold,
    insert_gather,
    permute_columns,
)
from qgraph.graph.scale_channels import (
    find_scaled_source,
    insert_scale,
    scale_columns,
    scale_source,
)
from qgraph.graph.value_heads import ValueHeads, apply_value_heads, find_value_heads
from tests.graph.sketch import Sketch, aten

Draw = Callable[[Sketch], Node]
SIZE = 5
ORDER = torch.tensor([3, 0, 4, 1, 2])


def chained(draw: Draw, *, bias: bool = True) -> tuple[GraphModule, Node, Node]:
    """A value and the linear that contracts over its channels."""
    torch.manual_seed(0)
    s = Sketch()
    value = draw(s)
    reader = s.linear(value, 3, bias=bias, name="reader")
    return s.returns(reader), value, reader


def layer(s: Sketch, *, bias: bool = True) -> Node:
    return s.linear(s.input(2, 4), SIZE, bias=bias, name="maker")


def behind(target: object, *args: object) -> Draw:
    return lambda s: s.call(target, layer(s), *args)


def output(module: GraphModule) -> Tensor:
    shape = next(n.meta["val"].shape for n in module.graph.nodes if n.op == "placeholder")
    generator = torch.Generator().manual_seed(1)
    result = module(torch.randn(tuple(shape), generator=generator))
    assert isinstance(result, Tensor)
    return result


FOLDS: dict[str, tuple[Draw, int]] = {
    "relu": (behind(aten.relu.default), 2),
    "gelu": (behind(aten.gelu.default), 2),
    "clone of relu": (lambda s: s.call(aten.clone.default, behind(aten.relu.default)(s)), 3),
    "times two": (behind(aten.mul.Tensor, 2.0), 2),
    "less one": (behind(aten.sub.Tensor, 1.0), 2),
    "without bias": (lambda s: s.call(aten.relu.default, layer(s, bias=False)), 2),
}


@pytest.mark.parametrize("name", FOLDS)
def test_rows_of_the_layer_before_elementwise_functions_take_any_order(name):
    draw, length = FOLDS[name]
    module, value, reader = chained(draw)
    wanted = output(module)
    fold = find_fold(value, [reader])
    assert isinstance(fold, Fold)
    assert fold.linear.target is aten.linear.default
    assert len(fold.between) == length
    assert (fold.between[0], fold.between[-1]) == (value, fold.linear)
    before = {n.name: n.args for n in module.graph.nodes}
    apply_fold(module, fold, ORDER)
    permute_columns(module, reader, ORDER)
    module.recompile()
    torch.testing.assert_close(output(module), wanted)
    assert fold.linear.args[1:] != before[fold.linear.name][1:]


def stored_norm(s: Sketch, x: Node, *, beta: bool = True, axes: int = 1) -> Node:
    shape = list(x.meta["val"].shape)[-axes:]
    gamma = s.stored(torch.rand(shape) + 0.5, "gamma")
    return s.call(
        aten.layer_norm.default, x, shape, gamma, s.stored(torch.randn(shape), "beta") if beta
        else None,
    )  # fmt: skip


def read_twice(s: Sketch) -> Node:
    x = layer(s)
    s.call(aten.exp.default, x)
    return s.call(aten.relu.default, x)


def read_later(s: Sketch) -> Node:
    x = layer(s)
    value = s.call(aten.relu.default, x)
    s.call(aten.exp.default, x)
    return value


def computed(s: Sketch) -> Node:
    weight = s.call(aten.neg.default, s.stored(torch.randn(SIZE, 4)))
    return s.call(aten.relu.default, s.call(aten.linear.default, s.input(2, 4), weight))


def half_computed(position: int) -> Draw:
    def draw(s: Sketch) -> Node:
        x = s.input(2, 4)
        stored = [s.stored(torch.randn(SIZE, 4)), s.stored(torch.randn(SIZE), "b")]
        stored[position] = s.call(aten.neg.default, stored[position])
        return s.call(aten.relu.default, s.call(aten.linear.default, x, *stored))

    return draw


NO_FOLDS: dict[str, tuple[Draw, str]] = {
    "norm": (lambda s: stored_norm(s, layer(s)), "is a norm"),
    "softmax": (behind(aten.softmax.int, -1), "neither linear nor elementwise"),
    "sum of two": (lambda s: s.call(aten.add.Tensor, layer(s), s.input(2, SIZE, name="y")),
                   "neither linear nor elementwise"),
    "table": (lambda s: s.call(aten.mul.Tensor, layer(s), s.stored(torch.randn(SIZE))),
              "neither linear nor elementwise"),
    "read twice": (read_twice, "linear_default has other readers"),
    "read later": (read_later, "linear_default has other readers"),
    "computed weight": (computed, "the weight of linear_default is computed"),
    "weight computed alone": (half_computed(0), "the weight of linear_default is computed"),
    "bias computed alone": (half_computed(1), "the weight of linear_default is computed"),
    "an input": (lambda s: s.input(2, SIZE), "neither linear nor elementwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FOLDS)
def test_where_the_order_cannot_be_changed_for_nothing_it_is_said_why(name):
    draw, words = NO_FOLDS[name]
    _, value, reader = chained(draw)
    found = find_fold(value, [reader])
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize(("groups", "folds"), [(1, True), (2, False)])
def test_convolutions_make_channels_unless_they_are_grouped(groups, folds):
    s = Sketch()
    weight = s.stored(torch.randn(4, 4 // groups, 1))
    x = s.call(aten.conv1d.default, s.input(2, 4, 7), weight, None, [1], [0], [1], groups)
    value = s.call(aten.relu.default, x)
    reader = s.call(aten.conv1d.default, value, s.stored(torch.randn(3, 4, 1), "r"))
    found = find_fold(value, [reader])
    assert isinstance(found, Fold) is folds
    module = s.returns(reader)
    if isinstance(found, Fold):
        wanted, order = output(module), torch.tensor([2, 0, 3, 1])
        apply_fold(module, found, order)
        permute_columns(module, reader, order)
        module.recompile()
        torch.testing.assert_close(output(module), wanted)


def test_a_value_with_other_readers_is_changed_on_the_chosen_edges_alone() -> None:
    for change in ("gather", "scale"):
        torch.manual_seed(0)
        s = Sketch()
        value = s.call(aten.relu.default, layer(s))
        first, second = s.linear(value, 3, name="a"), s.linear(value, 3, name="b")
        module = s.returns(s.call(aten.add.Tensor, first, second))
        wanted = output(module)
        for found in (find_fold(value, [first]), find_scaled_source(value, [first])):
            assert found == f"{value.name} is also read by {second.name}"
        edge = Edge(first, (0,))
        if change == "gather":
            new = insert_gather(module, value, [edge], ORDER)
            permute_columns(module, first, ORDER)
        else:
            factor = torch.tensor([0.5, 2.0, 4.0, 1.0, 0.25])
            new = insert_scale(module, value, [edge], 1 / factor)
            scale_columns(module, first, factor)
        assert first.args[0] is new
        assert second.args[0] is value
        module.graph.lint()
        module.recompile()
        torch.testing.assert_close(output(module), wanted)


@pytest.mark.parametrize("change", ["gather", "scale"])
@pytest.mark.parametrize("computed", [False, True])
def test_what_is_inserted_stands_behind_inputs_and_before_its_readers(change, computed):
    s = Sketch()
    value = s.input(2, SIZE)
    if computed:
        value = s.call(aten.relu.default, value)
    else:
        s.stored(torch.ones(1), "unread")
        s.input(2, name="other")
    reader = s.call(aten.neg.default, value)
    end = s.linear(reader, 3, bias=False, name="end")
    module = s.returns(end)
    factor = torch.tensor([0.5, 2.0, 4.0, 1.0, 0.25])
    if change == "gather":
        new = insert_gather(module, value, [Edge(reader, (0,))], ORDER)
    else:
        new = insert_scale(module, value, [Edge(reader, (0,))], factor)
    module.graph.lint()
    module.recompile()
    order = list(module.graph.nodes)
    inputs = [n for n in order if n.op == "placeholder"]
    assert max(order.index(n) for n in inputs) < order.index(new) < order.index(reader)
    assert new.next is reader
    x = torch.randn(2, SIZE)
    inner = x.relu() if computed else x
    inner = inner[:, ORDER] if change == "gather" else inner * factor
    want = -inner @ module.get_buffer("end_weight").T
    torch.testing.assert_close(module(*[x, None][: len(inputs)]), want)


@pytest.mark.parametrize("axis", [1, -2])
def test_a_gather_takes_channels_of_any_axis_of_an_input(axis):
    s = Sketch()
    value = s.input(2, 4, 7)
    s.input(3, name="unread")
    reader = s.call(aten.relu.default, value)
    module = s.returns(reader)
    order = torch.tensor([2, 0, 3, 1])
    insert_gather(module, value, [Edge(reader, (0,))], order, axis)
    module.graph.lint()
    module.recompile()
    x = torch.randn(2, 4, 7)
    assert torch.equal(module(x, None), x[:, order].relu())


SCALED: dict[str, Draw] = {
    "relu": behind(aten.relu.default),
    "leaky": behind(aten.leaky_relu.default, 0.3),
    "plain": layer,
    "without bias": lambda s: layer(s, bias=False),
    "norm": lambda s: stored_norm(s, s.input(2, SIZE)),
    "relu of norm": lambda s: s.call(aten.relu.default, stored_norm(s, s.input(2, SIZE))),
}


@pytest.mark.parametrize("name", SCALED)
def test_scales_by_powers_of_two_change_no_bit(name):
    module, value, reader = chained(SCALED[name])
    wanted = output(module)
    source = find_scaled_source(value, [reader])
    assert isinstance(source, Node)
    factor = torch.tensor([0.5, 2.0, 4.0, 1.0, 0.25])
    scale_source(module, source, 1 / factor)
    scale_columns(module, reader, factor)
    module.recompile()
    assert torch.equal(output(module), wanted)


def computed_gamma(s: Sketch) -> Node:
    gamma = s.call(aten.neg.default, s.stored(torch.ones(SIZE)))
    return s.call(
        aten.layer_norm.default, s.input(2, SIZE), [SIZE], gamma, s.stored(torch.ones(SIZE), "b")
    )


NOT_SCALED: dict[str, tuple[Draw, str]] = {
    "gelu": (behind(aten.gelu.default), "does not commute"),
    "read twice": (read_twice, "linear_default has other readers"),
    "read later": (read_later, "linear_default has other readers"),
    "computed": (computed, "linear_default: computed"),
    "weight computed alone": (half_computed(0), "linear_default: computed"),
    "bias computed alone": (half_computed(1), "linear_default: computed"),
    "computed gamma": (computed_gamma, "layer_norm_default: computed"),
    "no beta": (lambda s: stored_norm(s, s.input(2, SIZE), beta=False), "no gamma and beta"),
    "no gamma": (
        lambda s: s.call(aten.layer_norm.default, s.input(2, SIZE), [SIZE]),
        "no gamma and beta",
    ),
    "two axes": (lambda s: stored_norm(s, s.input(2, 3, SIZE), axes=2), "no gamma and beta"),
    "an input": (lambda s: s.input(2, SIZE), "x does not commute"),
}


@pytest.mark.parametrize("name", NOT_SCALED)
def test_where_a_scale_cannot_be_folded_it_is_said_why(name):
    draw, words = NOT_SCALED[name]
    _, value, reader = chained(draw)
    found = find_scaled_source(value, [reader])
    assert isinstance(found, str)
    assert words in found


def attended(
    *, heads: int = 2, fused: bool = False, groups: int = 1, mixed: str = "", bias: bool = True
) -> tuple[GraphModule, Node, Node]:
    """Attention over [2, 3, 8] whose values are rows of one projection; and its reader."""
    torch.manual_seed(0)
    s = Sketch()
    x = s.input(2, 3, 8)
    own = 8 // groups
    values = s.linear(x, own + 8 * fused, bias=bias, name="values")
    if fused:
        values = s.call(aten.slice.Tensor, values, -1, 8, 16)
    split = s.call(aten.reshape.default, values, [2, 3, heads // groups, 8 // heads])
    split = s.call(aten.transpose.int, split, 1, 2)
    if groups > 1:
        split = s.call(aten.expand.default, split, [2, heads, 3, 8 // heads])
    logits = s.stored(torch.randn(2, heads, 3, 3), "logits")
    soft = s.call(aten.softmax.int, s.call(aten.add.Tensor, logits, s.input(1, name="t")), -1)
    made = s.call(aten.matmul.default, soft, split)
    merged = made if mixed == "tokens" else s.call(aten.transpose.int, made, 1, 2)
    if mixed == "read":
        s.call(aten.relu.default, split)
    merged = s.call(aten.reshape.default, merged, [2, 3, 8])
    reader = s.linear(merged, 4, name="reader")
    return s.returns(reader), merged, reader


@pytest.mark.parametrize(("heads", "fused"), [(1, False), (2, False), (4, False), (2, True)])
def test_channels_of_attention_are_rows_of_the_values_by_head(heads, fused):
    module, value, reader = attended(heads=heads, fused=fused, bias=heads != 4)
    found = find_value_heads(value, [reader])
    assert isinstance(found, ValueHeads), found
    assert found.rows.tolist() == list(range(8 * fused, 8 * fused + 8))
    width = 8 // heads
    assert found.heads.unique().numel() == heads
    assert [found.heads[i] == found.heads[0] for i in range(8)] == [i < width for i in range(8)]
    group = torch.tensor([1, 0, 2, 1, 0, 0, 1, 0])
    order = found.order(group)
    for head in range(heads):
        own = range(head * width, head * width + width)
        wanted = sorted(own, key=lambda c: (int(group[c]), c))
        assert order[head * width : head * width + width].tolist() == wanted
    x, t = torch.randn(2, 3, 8), torch.randn(1)
    before = module(x, t)
    apply_value_heads(module, found, order)
    permute_columns(module, reader, order)
    module.recompile()
    torch.testing.assert_close(module(x, t), before)
    assert not torch.equal(order, torch.arange(8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 2}, "rows of linear_default serve several heads"),
        ({"mixed": "tokens"}, "channels differ between tokens"),
        ({"mixed": "read"}, "has other readers"),
    ],
)
def test_values_that_are_no_rows_one_to_one_say_why(options, words):
    _, value, reader = attended(**options)
    found = find_value_heads(value, [reader])
    assert isinstance(found, str)
    assert words in found


def test_values_of_no_attention_say_why() -> None:
    _, value, reader = chained(behind(aten.relu.default))
    assert find_value_heads(value, [reader]) == "relu_default is no attention product"
    assert find_value_heads(value, []) == f"relu_default is also read by {reader.name}"
    s = Sketch()
    made = s.call(aten.matmul.default, s.input(2, 3, 3), s.input(2, 3, 4, name="v"))
    reader = s.linear(made, 4, name="reader")
    assert "come from no stored linear layer" in str(find_value_heads(made, [reader]))


def test_edges_are_the_arguments_in_order_and_change_one_at_a_time() -> None:
    s = Sketch()
    x, y, z = s.input(2, 3), s.input(2, 3, name="y"), s.input(2, 3, name="z")
    joined = s.call(aten.cat.default, [x, y, x], 1)
    named = s.call(aten.add.Tensor, x, other=y)
    assert [e.path for e in in_edges(joined)] == [(0, 0), (0, 1), (0, 2)]
    assert [e.path for e in in_edges(named)] == [(0,), ("other",)]
    assert [(e.consumer, e.path) for e in out_edges(x)] == [
        (joined, (0, 0)), (joined, (0, 2)), (named, (0,)),
    ]  # fmt: skip
    assert [e.source for e in in_edges(joined)] == [x, y, x]
    Edge(joined, (0, 2)).redirect(z)
    assert list(joined.args[0]) == [x, y, z]  # type: ignore[arg-type]
    Edge(named, ("other",)).redirect(z)
    assert (named.args[0], named.kwargs["other"]) == (x, z)
    assert str(Edge(joined, (0, 1))) == f"{joined.name}[0.1]"
