# SPDX-License-Identifier: Apache-2.0
"""Which dimensions are the batch, what is doubled, and what export made of it."""

# mypy: disable-error-code="no-any-return,operator,index,assignment,union-attr"
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection, export
from torch.utils._pytree import tree_leaves

from qgraph.graph.dynamic_batch import (
    Sample,
    batch_size,
    default_sample,
    explicit_sample,
    has_symbolic_outputs,
    specialised,
)


def filled(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


class Takes(nn.Module):
    def forward(self, x: Any, y: Any = None, *, z: Any = None) -> Any:
        return x, y, z


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        ((), {}, None),
        ((3, "x"), {"z": None}, None),
        ((filled(),), {}, None),
        ((filled(4, 2),), {}, 4),
        ((filled(), filled(3)), {}, 3),
        ((filled(2), filled(5)), {}, 2),
        ((filled(5), filled(2)), {}, 5),
        ((filled(2, 9), filled(5), {"a": filled(5, 7)}), {}, 5),
        ((filled(2), filled(5)), {"z": [filled(5)]}, 5),
        ((filled(1, 7), filled(7, 1)), {"z": filled(1)}, 1),
    ],
)
def test_the_batch_is_the_most_frequent_first_size(args, kwargs, want):
    assert batch_size(args, kwargs) == want


def shapes_of(value: Any) -> list[Any]:
    return [tuple(t.shape) if isinstance(t, Tensor) else t for t in tree_leaves(value)]


@pytest.mark.parametrize(
    ("args", "kwargs", "marked", "grown"),
    [
        ((filled(3, 4),), {}, ((0,),), [(3, 4)]),
        ((filled(1, 4),), {}, ((0,),), [(2, 4)]),
        ((filled(1, 4), filled(1)), {}, ((0,), (0,)), [(2, 4), (2,)]),
        ((filled(1, 4), filled(5, 1)), {}, ((0,), ()), [(2, 4), (5, 1)]),
        ((filled(3, 1), filled(3)), {"z": filled(1)}, ((0,), (0,), ()), [(3, 1), (3,), (1,)]),
        (({"a": filled(1, 2)}, [filled(), 7]), {}, ((0,), ()), [(2, 2), (), 7]),
        ((filled(2, 4), filled(1, 4)), {}, ((0,), ()), [(2, 4), (1, 4)]),
        ((filled(),), {}, ((),), [()]),
    ],
)
def test_what_shares_the_batch_is_marked_and_doubled_if_it_is_one(args, kwargs, marked, grown):
    sample = default_sample(Takes(), args, kwargs)
    assert sample.marked == marked
    got = [t for t in shapes_of((sample.args, sample.kwargs)) if t is not None]
    assert got == grown
    old = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    new = [t for t in tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor)]
    for a, b, dims in zip(old, new, marked, strict=True):
        assert a is not b
        wanted = torch.cat([a, a]) if dims and a.shape[0] == 1 else a
        assert torch.equal(b, wanted)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x = filled(3, 4)
    sample = default_sample(Takes(), (x, x), {})
    assert sample.args[0] is not sample.args[1]
    assert sample.shapes["x"][0] == sample.shapes["y"][0] == Dim.AUTO


AUTO, DYNAMIC, STATIC = Dim.AUTO, Dim.DYNAMIC, Dim.STATIC


@pytest.mark.parametrize(
    ("shapes", "marked", "grown"),
    [
        ({"x": {0: AUTO}}, ((0,), ()), [(2, 4), (1, 1, 3)]),
        ({"x": {0: AUTO, 1: DYNAMIC}}, ((0, 1), ()), [(2, 4), (1, 1, 3)]),
        ({"x": None, "z": {1: DYNAMIC}}, ((), (1,)), [(1, 4), (1, 2, 3)]),
        ({"z": (AUTO, AUTO, None)}, ((), (0, 1)), [(1, 4), (2, 2, 3)]),
        ({"z": [None, STATIC, AUTO]}, ((), (2,)), [(1, 4), (1, 1, 3)]),
        ({"x": {0: STATIC}, "z": {0: 1}}, ((), ()), [(1, 4), (1, 1, 3)]),
        ({"x": {0: None}, "z": {0: Dim("b")}}, ((), (0,)), [(1, 4), (2, 1, 3)]),
        (({0: AUTO}, {2: AUTO, 1: AUTO}), ((0,), (2, 1)), [(2, 4), (1, 2, 3)]),
        (({0: AUTO},), ((0,), ()), [(2, 4), (1, 1, 3)]),
        ((None, (AUTO,)), ((), (0,)), [(1, 4), (2, 1, 3)]),
        ({"x": {2: AUTO, 5: AUTO}}, ((2, 5), ()), [(1, 4), (1, 1, 3)]),
    ],
)
def test_dimensions_that_the_caller_marks_are_doubled_where_they_are_one(shapes, marked, grown):
    args, kwargs = (filled(1, 4),), {"z": filled(1, 1, 3)}
    sample = explicit_sample(Takes(), args, kwargs, shapes)
    assert sample.marked == marked
    assert [s for s in shapes_of((sample.args, sample.kwargs)) if s is not None] == grown
    assert sample.shapes is shapes
    for old, new, dims in zip(
        (args[0], kwargs["z"]), (sample.args[0], sample.kwargs["z"]), marked, strict=True
    ):
        wanted = old
        for dim in dims:
            if dim < old.ndim and old.shape[dim] == 1:
                wanted = torch.cat([wanted, wanted], dim)
        assert torch.equal(new, wanted)


def test_marks_reach_into_containers_and_are_read_off_collections() -> None:
    x, y, w = filled(1, 4), filled(3, 1), filled(1)
    args = ({"a": x, "b": y}, [w, 5])
    for shapes in (
        {"x": {"a": {0: AUTO}, "b": (None, AUTO)}, "y": [None, None]},
        ({"a": (AUTO, None), "b": {1: AUTO}}, None),
        {"x": {"b": {1: DYNAMIC}, "a": {0: DYNAMIC}}},
    ):
        sample = explicit_sample(Takes(), args, {}, shapes)
        assert sample.marked == ((0,), (1,), ())
        assert shapes_of(sample.args) == [(2, 4), (3, 2), (1,), 5]
    sample = explicit_sample(Takes(), args, {}, {"x": None, "y": [(AUTO,), None]})
    assert sample.marked == ((), (), (0,))
    collection = ShapesCollection()
    collection[x] = {0: AUTO}
    sample = explicit_sample(Takes(), (x, filled(1, 2)), {}, collection)
    assert sample.marked == ((0,), ())
    assert shapes_of(sample.args) == [(2, 4), (1, 2)]


class Mixed(nn.Module):
    """Two inputs, the first of which is fixed by the code."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(2, -1), y + 1


class Free(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> list[Any]:
        return [x + 1, {"y": y.transpose(0, 1)}]


class Constant(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, torch.ones(3)


def exported(model: nn.Module, shapes: Any) -> tuple[Any, Sample]:
    sample = explicit_sample(model.eval(), (filled(2, 4), filled(2, 4)), {}, shapes)
    return export(model, sample.args, sample.kwargs, dynamic_shapes=shapes), sample


def test_dimensions_that_export_fixed_are_named_and_outputs_tell_the_rest() -> None:
    both = {"x": {0: AUTO}, "y": {0: AUTO}}
    program, sample = exported(Mixed(), both)
    assert specialised(program, sample) == ["x dimension 0 = 2"]
    assert not has_symbolic_outputs(program)
    program, sample = exported(Free(), {"x": {0: AUTO}, "y": {0: AUTO, 1: AUTO}})
    assert specialised(program, sample) == []
    assert has_symbolic_outputs(program)
    program, sample = exported(Free(), {"x": {0: AUTO}, "y": None})
    assert specialised(program, sample) == []
    assert not has_symbolic_outputs(program)
    wrong = Sample(sample.args, sample.kwargs, None, ((0, 1), (1,)))
    assert specialised(program, wrong) == ["x dimension 1 = 4", "y dimension 1 = 4"]
    program, _ = exported(Constant(), both)
    assert not has_symbolic_outputs(program)
