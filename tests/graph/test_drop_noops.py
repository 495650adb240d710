# SPDX-License-Identifier: Apache-2.0
"""What repeats its input is dropped; what only looks like it stays."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.drop_noops import drop_asserts, drop_dead_code, drop_noops
from tests.graph.sketch import Sketch, aten

Draw = Callable[[Sketch, Node], Node]


def native_dropout(probability: float, *, train: bool, part: int = 0) -> Draw:
    return lambda s, x: s.call(
        operator.getitem, s.call(aten.native_dropout.default, x, probability, train), part
    )


# values are [2, 3, 4]
DROPPED: dict[str, Draw] = {
    "clone": lambda s, x: s.call(aten.clone.default, x),
    "contiguous": lambda s, x: s.call(aten.contiguous.default, x),
    "the same cast": lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float32),
    "alias": lambda s, x: s.call(aten.alias.default, x),
    "detach": lambda s, x: s.call(aten.detach.default, x),
    "dropout at rest": lambda s, x: s.call(aten.dropout.default, x, 0.5, False),
    "dropout of nothing": lambda s, x: s.call(aten.dropout.default, x, 0.0, True),
    "feature dropout": lambda s, x: s.call(aten.feature_dropout.default, x, 0.5, False),
    "native dropout at rest": native_dropout(0.5, train=False),
    "native dropout of nothing": native_dropout(0, train=True),
    "reshape": lambda s, x: s.call(aten.reshape.default, x, [2, -1, 4]),
    "expand": lambda s, x: s.call(aten.expand.default, x, [2, 3, 4]),
    "slice": lambda s, x: s.call(aten.slice.Tensor, x, 1, 0, 9),
    "flatten": lambda s, x: s.call(aten.flatten.using_ints, x, 1, 1),
    "narrow": lambda s, x: s.call(aten.narrow.default, x, 2, 0, 4),
    "repeat": lambda s, x: s.call(aten.repeat.default, x, [1, 1, 1]),
    "permute": lambda s, x: s.call(aten.permute.default, x, [0, 1, 2]),
    "permute from the end": lambda s, x: s.call(aten.permute.default, x, [-3, 1, -1]),
    "transpose": lambda s, x: s.call(aten.transpose.int, x, 1, 1),
    "transpose from the end": lambda s, x: s.call(aten.transpose.int, x, -2, 1),
    "squeeze": lambda s, x: s.call(aten.squeeze.dim, x, 1),
    "pad": lambda s, x: s.call(aten.pad.default, x, [0, 0]),
    "constant pad": lambda s, x: s.call(aten.constant_pad_nd.default, x, [0, 0, 0, 0], 1.0),
}
KEPT: dict[str, Draw] = {
    "another cast": lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float64),
    "dropout": lambda s, x: s.call(aten.dropout.default, x, 0.5, True),
    "native dropout": native_dropout(0.5, train=True),
    "the mask of native dropout": native_dropout(0.5, train=False, part=1),
    "another part": lambda s, x: s.call(operator.getitem, s.call(aten.max.dim, x, 1), 0),
    "reshape": lambda s, x: s.call(aten.reshape.default, x, [2, 4, 3]),
    "expand": lambda s, x: s.call(aten.expand.default, x, [1, 2, 3, 4]),
    "slice": lambda s, x: s.call(aten.slice.Tensor, x, 1, 1, 9),
    "flatten": lambda s, x: s.call(aten.flatten.using_ints, x, 1, 2),
    "permute": lambda s, x: s.call(aten.permute.default, x, [0, 2, 1]),
    "transpose": lambda s, x: s.call(aten.transpose.int, x, 1, -1),
    "squeeze": lambda s, x: s.call(aten.squeeze.dim, s.call(aten.narrow.default, x, 1, 0, 1), 1),
    "pad": lambda s, x: s.call(aten.pad.default, x, [0, 1]),
    "crop": lambda s, x: s.call(aten.pad.default, x, [0, -1]),
    "constant pad": lambda s, x: s.call(aten.constant_pad_nd.default, x, [1, 0]),
    "relu": lambda s, x: s.call(aten.relu.default, x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_repeats_its_input_goes(name):
    s = Sketch()
    x = s.call(aten.relu.default, s.input(2, 3, 4))
    node = DROPPED[name](s, x)
    module = s.returns(s.call(aten.neg.default, node), s.call(aten.exp.default, x))
    assert drop_noops(module)
    module.recompile()
    left = [n.target for n in module.graph.nodes if n.op == "call_function"]
    random = aten.native_dropout.default  # nothing reads it, but the generator moves on
    assert [t for t in left if t is not random] == [
        aten.relu.default, aten.neg.default, aten.exp.default,
    ]  # fmt: skip
    assert not drop_noops(module)
    value = torch.randn(2, 3, 4)
    assert torch.equal(module(value)[0], -value.relu())


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_its_input_stays(name):
    s = Sketch()
    node = KEPT[name](s, s.call(aten.relu.default, s.input(2, 3, 4)))
    module = s.returns(node)
    before = [n.name for n in module.graph.nodes]
    assert not drop_noops(module)
    assert [n.name for n in module.graph.nodes] == before


def test_copies_stay_where_results_would_alias_what_the_caller_holds() -> None:
    for stored in (False, True):
        s = Sketch()
        x = s.input(2, 3)
        source = s.stored(torch.randn(2, 3)) if stored else x
        copy = s.call(aten.clone.default, source)
        module = s.returns(copy, s.call(aten.relu.default, x), s.call(aten.neg.default, copy))
        assert not drop_noops(module)
    s = Sketch()
    y = s.call(aten.relu.default, s.input(2, 3))
    assert drop_noops(s.returns(s.call(aten.clone.default, y)))
    s = Sketch()
    copy = s.call(aten.clone.default, s.input(2, 3))
    assert drop_noops(s.returns(s.call(aten.relu.default, copy)))


@pytest.mark.parametrize("copy", [
    lambda s, x: s.call(aten.clone.default, x, memory_format=torch.contiguous_format),
    lambda s, x: s.call(aten._to_copy.default, x, dtype=torch.float32),
])  # fmt: skip
def test_copies_stay_where_strides_matter(copy):
    s = Sketch()
    x = s.call(aten.transpose.int, s.input(2, 3, 4), 1, 2)
    module = s.returns(s.call(aten.view.default, copy(s, x), [2, 2, 2, 3]))
    assert not drop_noops(module)


def test_a_squeeze_of_a_size_that_is_free_stays() -> None:
    s = Sketch()
    x = s.input(5, 3, free=1)
    module = s.returns(s.call(aten.squeeze.dim, x, 0), s.call(aten.squeeze.dim, x, -1))
    assert drop_noops(module)
    left = [n for n in module.graph.nodes if n.target is aten.squeeze.dim]
    assert [n.args[1] for n in left] == [0]


def test_sizes_that_only_dropped_nodes_read_go_with_them() -> None:
    s = Sketch()
    x = s.input(5, 3, free=1)
    size = s.call(aten.sym_size.int, x, 0)
    y = s.call(aten.reshape.default, x, [size, 3])
    module = s.returns(s.call(aten.relu.default, y))
    assert drop_noops(module)
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [aten.relu.default]


def test_asserts_and_what_only_they_read_are_dropped() -> None:
    s = Sketch()
    x = s.input(5, 3, free=1)
    y = s.call(aten.relu.default, x)
    s.call(aten.ge.Scalar, y, 0)
    s.call(aten._assert_tensor_metadata.default, x)
    module = s.returns(y)
    assert drop_asserts(module)
    assert len([n for n in module.graph.nodes if n.op == "call_function"]) == 1
    assert not drop_asserts(module)
    s = Sketch()
    x = s.input(5, 3)
    s.call(aten._assert_tensor_metadata.default, x)
    module = s.returns(s.call(aten.relu.default, x))
    assert drop_asserts(module)
    assert not drop_asserts(module)


def test_only_asserts_go_and_those_that_are_read_stay() -> None:
    s = Sketch()
    x = s.input(2, 3)
    kept = s.call(aten.abs.default, x)
    write = s.call(aten.copy_.default, s.stored(torch.zeros(2, 3)), kept)
    s.call(aten._assert_tensor_metadata.default, x)
    read = s.call(aten._functional_assert_scalar.default, True, "m", s.input(1, name="t"))
    module = s.returns(kept, s.call(aten.neg.default, read))
    end = module.graph.output_node()
    assert drop_asserts(module)
    left = [n for n in module.graph.nodes if n.op == "call_function"]
    assert left == [kept, write, read, end.args[0][1]]  # type: ignore[index]
    assert module.graph.output_node() is end


def test_calls_whose_operands_all_have_names_stay() -> None:
    s = Sketch()
    x = s.input(2, 3)
    named = s.graph.call_function(aten.neg.default, (), {"self": x})
    named.meta["val"] = x.meta["val"]
    module = s.returns(named, s.call(aten.alias.default, x))
    assert drop_noops(module)
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [aten.neg.default]


def test_dead_chains_go_as_a_whole_and_writes_stay() -> None:
    s = Sketch()
    x = s.input(2, 3)
    dead = s.call(aten.relu.default, s.call(aten.neg.default, x))
    s.call(aten.exp.default, dead)
    kept = s.call(aten.abs.default, x)
    s.call(aten.copy_.default, s.stored(torch.zeros(2, 3)), kept)
    module = s.returns(kept)
    assert drop_dead_code(module)
    left = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert left == [aten.abs.default, aten.copy_.default]
    assert not drop_dead_code(module)
