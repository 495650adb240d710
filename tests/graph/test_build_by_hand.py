# SPDX-License-Identifier: Apache-2.0
"""New calls, buffers and copies of small graphs, against what running and reading them gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

import qgraph
from qgraph.graph.build import (
    add_buffer,
    attribute,
    compile_when_called,
    fake_mode,
    insert_buffer,
    insert_call,
    insert_move,
    prune,
    replace_tensor,
    set_value,
    shallow_copy,
)
from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE
from qgraph.graph.edges import Edge
from tests.graph.sketch import Sketch, aten

SHAPES = [
    ((3, 4), (4, 5)),
    ((4,), (4, 5)),
    ((3, 4), (4,)),
    ((2, 3, 4), (4,)),
    ((4,), (2, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((1, 3, 4), (2, 4, 5)),
    ((2, 3, 4), (1, 4, 5)),
    ((6, 2, 3, 4), (2, 4, 5)),
    ((2, 3, 4), (6, 2, 4, 5)),
    ((6, 1, 3, 4), (2, 4, 5)),
    ((6, 2, 3, 4), (6, 2, 4, 5)),
    ((6, 2, 3, 4), (1, 2, 4, 5)),
    ((6, 1, 3, 4), (1, 2, 4, 5)),
    ((1, 2, 3, 4), (6, 2, 4, 5)),
    ((6, 1, 3, 4), (6, 2, 4, 5)),
    ((7, 6, 2, 3, 4), (2, 4, 5)),
    ((2, 2, 2), (2, 2, 2)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_the_size_noted_for_a_product_is_that_of_the_run(left, right):
    s = Sketch()
    made = s.call(aten.matmul.default, s.input(*left), s.input(*right, name="y"))
    ran = s.returns(made)(torch.randn(left), torch.randn(right))
    noted = made.meta["val"]
    assert isinstance(noted, FakeTensor)
    assert (noted.shape, noted.stride(), noted.dtype) == (ran.shape, ran.stride(), ran.dtype)


def test_products_of_free_sizes_keep_their_symbols_and_those_that_do_not_fit_are_refused() -> None:
    s = Sketch()
    x, y = s.input(6, 3, 4, free=1), s.input(6, 4, 5, name="y", free=1)
    other = s.input(7, 4, 5, name="z", free=1)
    made = s.call(aten.matmul.default, x, y).meta["val"]
    assert str(made.shape[0]) == str(x.meta["val"].shape[0])
    assert tuple(made.shape[1:]) == (3, 5)
    assert str(other.meta["val"].shape[0]) != str(made.shape[0])
    with pytest.raises(RuntimeError, match="to broadcast a dimension"):
        s.call(aten.matmul.default, x, other)
    double = s.input(6, 4, 5, name="d", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="scalar type"):
        s.call(aten.matmul.default, s.input(6, 3, 4, name="f"), double)


def pair(s: Sketch, x: Node) -> tuple[Node, Node]:
    """A quantizer and its dequantizer."""
    parameters = s.stored(torch.tensor(0.5), "scale"), s.stored(torch.tensor(0), "zero")
    codes = s.call(QUANTIZE, x, *parameters, -8, 7)
    return codes, s.call(DEQUANTIZE, codes, *parameters, -8, 7)


@pytest.mark.parametrize(
    ("shape", "free", "order"),
    [
        ((), 0, ()), ((1,), 0, (0,)), ((5,), 1, (0,)), ((3, 4), 0, (0, 1)), ((3, 4), 0, (1, 0)),
        ((3, 4, 5), 1, (0, 2, 1)), ((3, 4, 5), 2, (0, 1, 2)), ((3, 4, 5), 3, (0, 2, 1)),
        ((3, 1, 5), 1, (0, 2, 1)), ((3, 4, 5, 6), 1, (0, 3, 1, 2)), ((3, 4, 5, 6), 4, (0, 3, 1, 2)),
        ((7, 4, 5, 6), 4, (0, 2, 1, 3)), ((3, 4, 5, 6), 0, (1, 0, 2, 3)),
    ],
)  # fmt: skip
def test_codes_have_the_sizes_and_strides_of_what_they_stand_for(shape, free, order):
    s = Sketch()
    view = s.call(aten.permute.default, s.input(*shape, free=free), list(order))
    environment: Any = s._mode.shape_env
    conditions = len(environment.guards)
    codes, values = pair(s, view)
    assert len(environment.guards) == conditions
    module = s.returns(codes, values)
    ran = module(torch.randn(shape))
    wanted = torch.empty(shape).permute(order)
    for noted, got, dtype in zip((codes, values), ran, (torch.int8, torch.float32), strict=True):
        value = noted.meta["val"]
        assert value.dtype == got.dtype == dtype
        assert [str(n) for n in value.shape] == [str(n) for n in view.meta["val"].shape]
        at_hand = [getattr(getattr(n, "node", None), "hint", n) for n in value.stride()]
        sized = [i for i, n in enumerate(wanted.shape) if n > 1]
        assert [at_hand[i] for i in sized] == [wanted.stride()[i] for i in sized]


def test_values_of_one_size_share_what_is_noted_and_others_do_not() -> None:
    s = Sketch()
    x, y = s.input(3, 4), s.input(3, 4, name="y")
    first, second = pair(s, x), pair(s, y)
    third = pair(s, s.input(4, 3, name="z"))
    turned = pair(s, s.call(aten.permute.default, s.input(4, 3, name="t"), [1, 0]))
    for a, b, c, d in zip(first, second, third, turned, strict=True):
        assert a.meta["val"] is b.meta["val"]
        assert a.meta["val"] is not c.meta["val"]
        assert a.meta["val"] is not d.meta["val"]
        assert d.meta["val"].stride() == (1, 3)
    assert first[0].meta["val"] is not first[1].meta["val"]
    parameters = first[0].args[1:]
    assert s.call(DEQUANTIZE, x, *parameters).meta["val"] is x.meta["val"]


def test_the_mode_of_values_is_found_or_made() -> None:
    s = Sketch()
    x = s.input(2, 3)
    module = s.returns(s.call(aten.relu.default, x))
    assert fake_mode(module) is x.meta["val"].fake_mode
    bare = GraphModule(nn.Module(), Graph())
    bare.register_buffer("weight", torch.ones(2, 3))
    bare.graph.output(bare.graph.get_attr("weight"))
    node = next(iter(bare.graph.nodes))
    set_value(bare, node)
    assert isinstance(node.meta["val"], FakeTensor)
    assert tuple(node.meta["val"].shape) == (2, 3)
    assert fake_mode(bare) is node.meta["val"].fake_mode


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, object]:
        z = self.inner(x)
        return {"sum": z + y, "both": [z, (y * 2,)]}


def nested() -> GraphModule:
    return qgraph.trace(Nested().eval(), torch.randn(2, 4), y=torch.randn(2, 3))


def node_of(module: GraphModule, target: object) -> Node:
    return next(n for n in module.graph.nodes if n.target is target)


def test_calls_stand_where_they_are_put_and_know_where_they_come_from() -> None:
    module = nested()
    linear, add = node_of(module, aten.linear.default), node_of(module, aten.add.Tensor)
    behind = insert_call(module, aten.neg.default, linear, like=linear)
    ahead = insert_call(
        module, aten.clamp.default, linear, like=linear, before=add, min=-1.0, max=2.0
    )
    assert linear.next is behind
    assert ahead.next is add
    assert dict(ahead.kwargs) == {"min": -1.0, "max": 2.0}
    for node in (behind, ahead):
        for key in ("nn_module_stack", "stack_trace", "torch_fn"):
            assert node.meta[key] == linear.meta[key]
        assert node.meta["val"].shape == linear.meta["val"].shape


def test_a_move_is_repeated_for_codes_of_the_same_sizes() -> None:
    s = Sketch()
    x = s.input(2, 3, 5)
    move = s.call(aten.transpose.int, x, 1, -1, within="outer.inner")
    read = s.call(aten.neg.default, move)
    codes, _ = pair(s, x)
    module = s.returns(read)
    again = insert_move(module, move, codes, before=module.graph.output_node())
    module.graph.output_node().args = (again,)
    module.recompile()
    value = torch.randn(2, 3, 5)
    got = module(value)
    noted = again.meta["val"]
    assert (again.args, again.target) == ((codes, 1, -1), move.target)
    assert again.next is module.graph.output_node()
    assert again.meta["nn_module_stack"] == move.meta["nn_module_stack"]
    assert (noted.shape, noted.stride(), noted.dtype) == (got.shape, got.stride(), torch.int8)
    assert torch.equal(got, (value / 0.5).round().clamp(-8, 7).to(torch.int8).transpose(1, 2))


def test_buffers_get_the_first_free_name_and_no_gradients() -> None:
    module = GraphModule(nn.Module(), Graph())
    setattr(module, "_q_b_2", "taken")  # noqa: B010 - no tensor, yet an attribute
    given = nn.Parameter(torch.ones(2))
    names = [add_buffer(module, "a.b-c", given) for _ in range(3)]
    assert names == ["_q_a_b_c", "_q_a_b_c_1", "_q_a_b_c_2"]
    assert [add_buffer(module, "b", given) for _ in range(3)] == ["_q_b", "_q_b_1", "_q_b_3"]
    for name in names:
        held = module.get_buffer(name)
        assert not held.requires_grad
        assert held.data_ptr() == given.data_ptr()


def test_one_edge_reads_a_new_tensor_and_the_others_the_old() -> None:
    s = Sketch()
    x, w = s.input(2, 3), s.stored(torch.full((3,), 5.0))
    first = s.call(aten.add.Tensor, x, w)
    second = s.call(aten.mul.Tensor, first, w)
    module = s.returns(second)
    fresh = replace_tensor(module, Edge(second, (1,)), torch.full((3,), 7.0), "new.w")
    assert fresh.next is second
    assert (first.args, second.args) == ((x, w), (first, fresh))
    assert str(fresh.target) == "_q_new_w"
    assert tuple(fresh.meta["val"].shape) == (3,)
    module.recompile()
    assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 42.0))
    read = insert_buffer(module, "c", torch.zeros(4, 1), before=first)
    assert read.next is first
    assert tuple(read.meta["val"].shape) == (4, 1)


def test_dotted_paths_lead_to_tensors() -> None:
    module = nested()
    read = next(n for n in module.graph.nodes if n.op == "get_attr")
    assert attribute(module, str(read.target)) is module.get_parameter(str(read.target))


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_shares_tensors_and_nothing_else(training: bool) -> None:
    module = nested()
    module.train(training)
    module.meta["told"] = 1
    twin = shallow_copy(module)
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    torch.testing.assert_close(twin(x, y=y), module(x, y=y), rtol=0, atol=0)
    assert twin.training is training
    assert twin.meta == module.meta
    twin.meta["told"] = 2
    assert module.meta["told"] == 1
    theirs = {n: t.data_ptr() for n, t in module.named_parameters()}
    assert {n: t.data_ptr() for n, t in twin.named_parameters()} == theirs
    add = node_of(twin, aten.add.Tensor)
    add.target = aten.sub.Tensor
    twin.recompile()
    assert torch.equal(twin(x, y=y)["sum"], twin(x, y=y)["both"][0] - y)
    assert torch.equal(module(x, y=y)["sum"], module(x, y=y)["both"][0] + y)
    add_buffer(twin, "own", y)
    assert not any("own" in name for name, _ in module.named_buffers())


def test_code_that_is_put_off_is_written_at_the_first_call() -> None:
    s = Sketch()
    add = s.call(aten.add.Tensor, s.input(2), s.input(2, name="y"))
    module = s.returns(add)
    add.target = aten.sub.Tensor
    compile_when_called(module)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])
    assert "add" in module.code
    assert torch.equal(module(a, y=b), a - b)
    assert "sub" in module.code
    assert torch.equal(module(a, b), a - b)


@pytest.mark.parametrize("recompile", [False, True])
@pytest.mark.parametrize(
    ("dead", "unread", "twice"), list(itertools.product([False, True], repeat=3))
)
def test_what_nobody_reads_is_dropped_and_it_is_told(recompile, dead, unread, twice):
    model = nn.Module()
    model.inner = nn.Linear(3, 2)
    graph = Graph()
    x = graph.placeholder("x")
    weight, bias = graph.get_attr("inner.weight"), graph.get_attr("inner.bias")
    if dead:
        graph.get_attr("inner.weight" if twice else "inner.gone")
        if not twice:
            model.inner.gone = nn.Parameter(torch.ones(2))
    graph.output(graph.call_function(aten.linear.default, (x, weight, bias)))
    module = GraphModule(model, graph)
    if unread:
        module.get_submodule("inner").register_buffer("spare", torch.ones(2))
    want, code = module(torch.ones(1, 3)), module.code
    assert prune(module, recompile=recompile) is (dead or unread)
    assert {n for n, _ in module.named_parameters()} == {"inner.weight", "inner.bias"}
    assert not dict(module.named_buffers())
    assert len(module.graph.nodes) == 5
    assert (module.code == code) is not (dead and recompile)
    module.recompile()
    assert torch.equal(module(torch.ones(1, 3)), want)
    assert prune(module, recompile=recompile) is False
