# SPDX-License-Identifier: Apache-2.0
"""Parts cut out of drawn graphs compute what the whole computes there."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from qgraph.errors import PassError
from qgraph.graph.extract import (
    by_name,
    extract,
    is_size,
    is_tensor,
    output_names,
    same_size,
    slice_between,
    structured,
)
from qgraph.graph.verify import Sample, record_values
from tests.graph.sketch import Sketch, aten


def drawn() -> tuple[GraphModule, dict[str, Node]]:
    """x -> a -> b -> c with a reshape by the batch, and a side input that joins at the end."""
    torch.manual_seed(0)
    s = Sketch()
    x, y = s.input(3, 4, free=1), s.input(6, 5, name="y", free=1)
    a = s.linear(x, 6, name="a")
    b = s.call(aten.relu.default, a)
    size = s.call(aten.sym_size.int, x, 0)
    twice = s.call(operator.mul, size, 2)
    c = s.call(aten.reshape.default, b, [twice, 3])
    d = s.linear(c, 5, name="d")
    e = s.call(aten.add.Tensor, d, y)
    module = s.returns(e, b)
    named = {
        "x": x, "y": y, "a": a, "b": b, "size": size, "twice": twice, "c": c, "d": d, "e": e,
    }  # fmt: skip
    return module, named


def run(module: GraphModule, part: GraphModule, inputs: list[str], batch: int) -> None:
    """The part on values of the whole gives values of the whole."""
    sample = Sample((torch.randn(batch, 4), torch.randn(2 * batch, 5)))
    values = record_values(module, sample)
    given: dict[str, Any] = {"x": sample.args[0], "y": sample.args[1], **values}
    got = part(*(given[name] for name in inputs))
    ends: Any = part.graph.output_node().args[0]
    outputs: list[str] = [n.name for n in ends]
    assert len(got) == len(outputs)
    for name, value in zip(outputs, got, strict=True):
        assert torch.equal(value, values[name])


@pytest.mark.parametrize(
    ("inputs", "outputs", "inside", "sizes"),
    [
        ("x", "a", "a", ""),
        ("x", "c", "a b twice c", "size"),
        ("a", "c", "b twice c", "size"),
        ("b", "d c", "twice c d", "size"),
        ("b y", "e", "c d e", "twice"),
        ("c y", "e d", "d e", ""),
        ("y b", "e", "c d e", "twice"),
        ("x y", "e b", "a b c d e", "twice"),
        ("b d y", "e", "e", ""),
    ],
)
def test_a_part_holds_what_lies_between_and_gives_the_same(inputs, outputs, inside, sizes):
    module, named = drawn()
    given = [named[n].name for n in inputs.split()]
    wanted = [named[n].name for n in outputs.split()]
    found, read = slice_between(module, given, wanted)
    calls = [n for n in found if n.op == "call_function"]
    assert calls == [named[n] for n in inside.split()]
    assert read == [named[n] for n in sizes.split()]
    part = extract(module, given, wanted)
    part.graph.lint()
    names = [n.name for n in part.graph.nodes if n.op == "placeholder"]
    assert names == given
    for node in part.graph.nodes:
        if node.op == "call_function" and node.target is not aten.sym_size.int:
            assert node.meta == by_name(module)[node.name].meta
    held = {n: t.data_ptr() for n, t in module.named_buffers()}
    for name, tensor in part.named_buffers():
        assert tensor.data_ptr() == held[name]
    for batch in (3, 5):
        run(module, part, given, batch)


def test_what_needs_more_than_its_inputs_is_refused_by_name() -> None:
    module, named = drawn()
    for inputs, outputs, missing in (("x", "e", "y"), ("c", "e", "y"), ("y", "a", "x")):
        names = [named[n].name for n in inputs], [named[n].name for n in outputs]
        with pytest.raises(PassError, match=f"{missing} is needed too"):
            extract(module, *names)


def test_a_size_is_read_off_the_first_input_that_has_it() -> None:
    module, named = drawn()
    nodes = by_name(module)
    assert nodes["x"] is named["x"]

    def place(what: str, *inputs: str) -> tuple[str, int] | None:
        return same_size(named[what], [named[n].name for n in inputs], nodes)

    assert place("size", "x", "a") == ("x", 0)
    assert place("size", "a", "x") == (named["a"].name, 0)
    assert place("twice", "x", "c") == (named["c"].name, 0)
    assert place("twice", "x") is None
    assert place("size", "c") is None
    assert place("size") is None
    assert place("size", "size", "b") == (named["b"].name, 0)
    assert place("a", "a") is None
    s = Sketch()
    x = s.input(3, 4, 5, free=2)
    turned = s.call(aten.permute.default, x, [2, 1, 0])
    first, second = (s.call(aten.sym_size.int, x, i) for i in (0, 1))
    fixed = s.call(aten.relu.default, x)
    fixed.meta["val"] = 5
    nodes = by_name(s.module)
    assert same_size(first, [turned.name], nodes) == (turned.name, 2)
    assert same_size(second, [turned.name], nodes) == (turned.name, 1)
    assert same_size(fixed, [turned.name], nodes) is None


def test_tensors_and_sizes_are_told_apart() -> None:
    s = Sketch()
    x = s.input(3, 4, free=1)
    size = s.call(aten.sym_size.int, x, 0)
    parts = s.call(aten.split.Tensor, x, 2, -1)
    other = s.graph.placeholder("other")
    number = s.graph.placeholder("number")
    number.meta["val"] = 7
    for node, tensor, count in (
        (x, True, False), (size, False, True), (parts, False, False), (other, False, False),
        (number, False, True), (s.call(operator.gt, size, 5), False, True),
    ):  # fmt: skip
        assert is_tensor(node) is tensor
        assert is_size(node) is count


def test_outputs_are_named_once_in_order_and_put_back_in_structure() -> None:
    s = Sketch()
    x = s.input(3, 4, free=1)
    a, b = s.call(aten.relu.default, x), s.call(aten.neg.default, x)
    size = s.call(aten.sym_size.int, x, 0)
    ends: Any = ({"b": b, "a": [a, None]}, 5, b, size)
    s.graph.output(ends)
    s.module.recompile()
    assert output_names(s.module) == (b.name, a.name)
    first, second = torch.ones(1), torch.zeros(2)
    got = structured(s.module, [first, second])
    assert got[0]["b"] is got[2] is first
    assert got[0]["a"][0] is second
    assert (got[0]["a"][1], got[1], got[3]) == (None, 5, None)
    with pytest.raises(ValueError, match="zip"):
        structured(s.module, [first])
