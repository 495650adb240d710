# SPDX-License-Identifier: Apache-2.0
"""A flat graph as an exported program: buffers are inputs, and only what is asked is decomposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qgraph.backends.onnx.program import FlatProgram, flat_program
from qgraph.errors import ExportError
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.arange(6.0).reshape(2, 3) - 2
W = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])


def computed(program: FlatProgram, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What the program's graph gives for its buffers and these inputs."""
    state = [program.state_dict[name] for name in program.graph_signature.buffers]
    found: tuple[Tensor, ...] = Interpreter(GraphModule(torch.nn.Module(), program.graph)).run(
        *state, *inputs
    )
    return found


def names(program: FlatProgram, op: str) -> list[str]:
    return [n.name for n in program.graph.nodes if n.op == op]


def targets(program: FlatProgram) -> list[Any]:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def test_buffers_become_inputs_once_each_in_front_of_those_of_the_user() -> None:
    b = SingleOp()
    x, y = b.placeholder("x", X), b.placeholder("y", X)
    w, v = b.buffer("w", W), b.buffer("v", W + 1)
    again = b.buffer("w", W)
    total = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, w), b.call(aten.mul.Tensor, y, v))
    b.graph.output((b.call(aten.sub.Tensor, total, again), total))
    program = flat_program(b.module)
    assert names(program, "placeholder") == ["b_w", "b_v", "x", "y"]
    assert not names(program, "get_attr")
    signature = program.graph_signature
    assert (signature.buffers, signature.user_inputs) == (("w", "v"), ("x", "y"))
    assert signature.inputs_to_buffers == {"b_w": "w", "b_v": "v"}
    assert signature.user_outputs == ("sub_tensor", "add_tensor")
    assert program.state_dict.keys() == {"w", "v"}
    wanted = X * W + 2 * X * (W + 1)
    assert all(map(torch.equal, computed(program, X, 2 * X), (wanted - W, wanted)))


def chain(op: Any, *rest: Any, **named: Any) -> FlatProgram:
    """``(exp(op(neg(x))), op(neg(x)))`` as a program."""
    b = SingleOp()
    middle = b.call(op, b.call(aten.neg.default, b.placeholder("x", X)), *rest, **named)
    b.graph.output((b.call(aten.exp.default, middle), middle))
    return flat_program(b.module)


def decomposed(program: FlatProgram, op: Any, form: Callable[..., Any]) -> FlatProgram:
    table = {op: form, aten.cos.default: lambda _: [].missing}  # type: ignore[attr-defined]
    assert program.run_decompositions(table) is program
    return program


def test_only_ops_of_the_table_are_replaced_and_results_keep_their_names() -> None:
    program = chain(aten.rsub.Scalar, 3.0, alpha=2.0)
    before = program.graph_signature.user_outputs
    assert program.run_decompositions(None) is program
    assert targets(program) == [aten.neg.default, aten.rsub.Scalar, aten.exp.default]
    decomposed(program, aten.rsub.Scalar, lambda x, other, alpha: (x * alpha - other).neg())
    assert targets(program) == [
        aten.neg.default, aten.mul.Tensor, aten.sub.Tensor, aten.neg.default, aten.exp.default,
    ]  # fmt: skip
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    assert tuple(n.name for n in output.args[0] if isinstance(n, Node)) == before
    assert all(map(torch.equal, computed(program, X), ((3 + 2 * X).exp(), 3 + 2 * X)))


def test_restriding_is_dropped_where_the_shape_stays() -> None:
    def form(x: Tensor, size: Any) -> Tensor:
        same = torch.as_strided(x * 2, (2, 3), (3, 1))
        return torch.as_strided(same + 1, tuple(size), (1,))

    program = decomposed(chain(aten.view.default, [6]), aten.view.default, form)
    assert targets(program) == [
        aten.neg.default, aten.mul.Tensor, aten.add.Tensor, aten.as_strided.default,
        aten.exp.default,
    ]  # fmt: skip
    assert torch.equal(computed(program, X)[1], (1 - 2 * X).reshape(6))


def test_an_op_that_cannot_be_decomposed_is_named() -> None:
    with pytest.raises(ExportError, match=r"cos_default in the model: no ONNX form of aten.cos"):
        decomposed(chain(aten.cos.default), aten.rsub.Scalar, torch.rsub)
