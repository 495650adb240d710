# SPDX-License-Identifier: Apache-2.0
"""Float dtypes of models, and the casts at the borders of their graphs."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgraph.graph.precision import (
    cast_borders,
    cast_inputs,
    float_dtype,
    needs_cast,
    output_dtypes,
)
from tests.graph.sketch import Sketch, aten

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def model(*parameters: tuple[int, torch.dtype], buffers: Any = ()) -> nn.Module:
    module = nn.Module()
    for i, (size, dtype) in enumerate(parameters):
        value = nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
        module.register_parameter(f"p{i}", value)
    for i, (size, dtype) in enumerate(buffers):
        module.register_buffer(f"b{i}", torch.zeros(size, dtype=dtype))
    return module


@pytest.mark.parametrize(
    ("given", "most", "cast"),
    [
        (model(), F32, False),
        (model((3, F32)), F32, False),
        (model((3, F16)), F16, True),
        (model((3, F64)), F64, True),
        (model((3, F32), (4, F16)), F16, True),
        (model((4, F32), (3, F16)), F32, True),
        (model((2, F16), (3, F32), (2, F16)), F16, True),
        (model((9, torch.int64), (1, BF16)), BF16, True),
        (model((9, torch.int64)), F32, False),
        (model((9, torch.int64), (1, F32)), F32, False),
        (model((3, F32), buffers=[(4, F64)]), F64, False),
        (model(buffers=[(1, F64), (5, torch.bool)]), F64, False),
    ],
)
def test_the_dtype_of_most_weights_is_the_models(given, most, cast):
    assert float_dtype(given) is most
    assert needs_cast(given) is cast


def test_float_inputs_become_float32_and_others_stay() -> None:
    given = {"a": [torch.ones(2, dtype=F16), 3], "b": (torch.ones(1, dtype=F64), torch.tensor(7))}
    got = cast_inputs((given, torch.tensor([True]), None, "x"))
    assert got[0]["a"][0].dtype == got[0]["b"][0].dtype == F32
    assert got[0]["a"][1] == 3
    assert got[0]["b"][1].dtype == torch.int64
    assert got[1].dtype == torch.bool
    assert got[2:] == (None, "x")


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, *, y: Tensor) -> Any:
        self.count = self.count + 1
        z = self.fc(x)
        return {"z": z, "wide": [z.double(), z > 0, 5], "sum": z.float() + y}


class Impossible(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_dtypes_of_outputs_are_found_without_running_the_model() -> None:
    given = Several().half()
    x, y = torch.ones(4, 3, dtype=F16), torch.ones(4, 2)
    assert output_dtypes(given, (x,), {"y": y}) == [F16, F64, torch.bool, F32]
    assert int(given.count) == 0
    assert type(given.count) is Tensor
    assert output_dtypes(given, (x,), {}) is None
    assert output_dtypes(Impossible(), (x,), {}) is None


def borders(
    outputs: list[torch.dtype] | None, original: torch.dtype = F16
) -> tuple[torch.fx.GraphModule, Any]:
    """A graph of float32: three inputs, one of integers, and four outputs."""
    s = Sketch()
    x, y = s.input(2, 3), s.input(2, 3, name="y")
    index, flag = s.input(2, name="i", dtype=torch.int64), s.graph.placeholder("flag")
    w = s.stored(torch.full((3,), 0.1))
    total = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, x, x), y)
    scaled = s.call(aten.mul.Tensor, y, w)
    sign = s.call(aten.gt.Scalar, x, 0)
    double = s.call(aten._to_copy.default, total, dtype=F64)
    s.graph.output((total, sign, scaled, double, index, None, total))
    s.module.recompile()
    cast_borders(s.module, [F16, F32, torch.int64, None], outputs, original)
    s.module.graph.lint()
    s.module.recompile()
    del flag
    return s.module, [x, y, index]


@pytest.mark.parametrize(
    ("outputs", "original", "wanted"),
    [
        (None, F16, [F16, torch.bool, F16, F64, torch.int64, F16]),
        (None, F64, [F64, torch.bool, F64, F64, torch.int64, F64]),
        (None, F32, [F32, torch.bool, F32, F64, torch.int64, F32]),
        ([F16, torch.bool, F32, F64, torch.int64, F16], F16,
         [F16, torch.bool, F32, F64, torch.int64, F16]),
        ([F32, torch.bool, BF16, F16, torch.int64, F64], F16,
         [F32, torch.bool, BF16, F64, torch.int64, F64]),
        ([torch.int64, torch.bool, F16, F64, torch.int64, F32], F16,
         [F32, torch.bool, F16, F64, torch.int64, F32]),
        ([F32], F16, [F32, torch.bool, F16, F64, torch.int64, F16]),
    ],
)  # fmt: skip
def test_values_are_float32_inside_and_as_asked_for_outside(outputs, original, wanted):
    module, (x, y, index) = borders(outputs, original)
    assert [n.meta["val"].dtype for n in (x, y, index)] == [F16, F32, torch.int64]
    a, b = torch.tensor([[0.1, -2.3, 4.5]] * 2).half(), torch.randn(2, 3)
    got = module(a, b, torch.tensor([1, 2]), True)
    assert isinstance(got, tuple)
    assert got[5] is None
    results = [t for t in got if isinstance(t, Tensor)]
    assert [t.dtype for t in results] == wanted
    total = a.float() * a.float() + b
    plain = [total, a > 0, b * 0.1, total.double(), torch.tensor([1, 2]), total]
    for result, value, dtype in zip(results, plain, wanted, strict=True):
        assert torch.equal(result, value.to(dtype))
    leaves: Any = module.graph.output_node().args[0]
    for node, dtype in zip([n for n in leaves if n is not None], wanted, strict=True):
        assert node.meta["val"].dtype == dtype


def test_every_reader_of_a_cast_input_reads_the_cast() -> None:
    module, (x, y, index) = borders(None)
    (cast,) = x.users
    assert cast.target is aten._to_copy.default
    assert dict(cast.kwargs) == {"dtype": F32}
    assert {n.op for n in module.graph.nodes if n.target == "x"} == {"placeholder"}
    assert [n.name for n in cast.users] == ["mul_tensor", "gt_scalar"]
    assert len(y.users) == 2
    assert list(index.users) == [module.graph.output_node()]
    order = [n.op for n in module.graph.nodes]
    assert order[:4] == ["placeholder"] * 4


def test_as_many_dtypes_as_inputs_are_asked_for() -> None:
    s = Sketch()
    module = s.returns(s.call(aten.relu.default, s.input(2)))
    with pytest.raises(ValueError, match="zip"):
        cast_borders(module, [F16, F16], None, F16)
