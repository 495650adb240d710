# SPDX-License-Identifier: Apache-2.0
"""Tracing keeps the function, the input and output structure, the batch, and the model itself."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
# Attributes and calls of nn.Module are Tensor | Module, or Any, to the type checker.
from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qgraph.graph.build import add_buffer
from qgraph.graph.provenance import call_index, module_path, source_line
from qgraph.graph.tensors import get_attr_tensor, weight_key, weight_keys
from qgraph.graph.trace import TraceInfo, trace, trace_info


@dataclass
class Detection:
    scores: Tensor
    extra: dict[str, Tensor]


class Nested(nn.Module):
    """Positional and keyword inputs, a shared layer, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x: Tensor, *, more: dict[str, Tensor], flag: bool = True) -> object:
        y = self.layer(self.layer(x)) + more["z"]
        return {"a": (y, None), "b": [y + self.offset, flag]}


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Detection:
        y = self.layer(x)
        return Detection(y, {"twice": y * 2})


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_same_state(before: tuple[object, ...], after: tuple[object, ...]) -> None:
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    assert before[1:] == after[1:]


def test_nested_inputs_and_outputs_keep_their_structure_at_every_batch():
    model = Nested().eval()
    module = trace(model, torch.randn(2, 4), more={"z": torch.randn(2, 4)}, flag=True)
    for batch in (1, 2, 5):
        x, more = torch.randn(batch, 4), {"z": torch.randn(batch, 4)}
        got, want = module(x, more=more, flag=True), model(x, more=more, flag=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got["a"][1] is None


def test_dataclass_outputs_come_back_as_the_same_class():
    model = Typed().eval()
    module = trace(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    got = module(x)
    assert isinstance(got, Detection)
    torch.testing.assert_close(got.extra["twice"], model(x).extra["twice"], rtol=0, atol=0)


def test_keyword_inputs_may_come_in_any_order():
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first - second

    first, second = torch.ones(2, 3), torch.zeros(2, 3)
    module = trace(Two().eval(), second=second, first=first)
    torch.testing.assert_close(module(first=first, second=second), first)
    torch.testing.assert_close(module(second=second, first=first), first)


def test_open_ended_keywords_are_dynamic_too():
    class Open(nn.Module):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return x + others["y"]

    module = trace(Open().eval(), torch.ones(2, 3), y=torch.ones(2, 3))
    assert trace_info(module).dynamic_batch
    assert module(torch.ones(4, 3), y=torch.ones(4, 3)).shape == (4, 3)


def test_a_batch_of_one_is_doubled_and_stays_dynamic():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    module = trace(model, torch.randn(1, 3, 6, 6))
    assert trace_info(module) == TraceInfo(True, "", ("input",), torch.float32)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(module(x), model(x))


def test_inputs_that_do_not_share_the_batch_stay_static():
    class WithTable(nn.Module):
        def forward(self, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
            return (x + y) @ table

    module = trace(WithTable().eval(), torch.ones(2, 4), torch.ones(2, 4), torch.ones(4, 3))
    sizes = [n.meta["val"].shape[0] for n in module.graph.nodes if n.op == "placeholder"]
    assert [isinstance(size, int) for size in sizes] == [False, False, True]
    assert module(torch.ones(5, 4), torch.ones(5, 4), torch.ones(4, 3)).shape == (5, 3)


def test_a_model_that_fixes_its_batch_falls_back_to_static_and_says_so(caplog):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 2, -1)

    with caplog.at_level(logging.WARNING, logger="qgraph"):
        module = trace(Fixed().eval(), torch.randn(2, 4))
    info = trace_info(module)
    assert not info.dynamic_batch
    assert "x dimension 0 = 2" in info.reason
    assert "static shapes" in caplog.text


def test_a_partly_fixed_batch_is_static_too():
    class Lengths(nn.Module):
        """As CLIPSeg does: `len()` of two inputs pins them, the third would stay symbolic."""

        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return x * 2 if len(x) == len(y) else x + mask

    inputs = (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3))
    assert not trace_info(trace(Lengths().eval(), *inputs)).dynamic_batch


class DeepInputs(nn.Module):
    def forward(self, named, pair, scale):
        return named["a"] @ pair[0].transpose(0, 1) + pair[1] * scale


def test_explicit_dynamic_shapes_reach_into_dictionaries_and_tuples():
    shapes = ({"a": {0: Dim.AUTO, 1: Dim.STATIC}}, ((None, None), (Dim.AUTO, None)), None)
    args = ({"a": torch.randn(1, 4)}, (torch.randn(3, 4), torch.randn(1, 3)), 2.0)
    module = trace(DeepInputs().eval(), *args, dynamic_shapes=shapes)
    args = ({"a": torch.randn(5, 4)}, (torch.randn(3, 4), torch.randn(5, 3)), 2.0)
    assert torch.equal(module(*args), DeepInputs()(*args))
    by_name = dict(zip(("named", "pair", "scale"), shapes, strict=True))
    again = trace(DeepInputs().eval(), *args, dynamic_shapes=by_name)
    assert torch.equal(again(*args), DeepInputs()(*args))


def test_explicit_dynamic_shapes_double_what_has_size_one():
    module = trace(
        nn.Linear(4, 3).eval(),
        torch.randn(1, 1, 4),
        dynamic_shapes={"input": {0: Dim.AUTO, 1: Dim.DYNAMIC}},
    )
    assert module(torch.randn(3, 7, 4)).shape == (3, 7, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_compute_in_float32_and_keep_their_dtype_outside(dtype):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.layer(x)
            return y, y.float(), y > 0

    model = Mixed().eval().to(dtype)
    module = trace(model, torch.randn(2, 8, dtype=dtype))
    assert trace_info(module).original_dtype is dtype
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    x = torch.randn(3, 8, dtype=dtype)
    got, want = module(x), model(x)
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.bool]
    ulp = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).eps
    torch.testing.assert_close(got[0], want[0], rtol=4 * ulp, atol=4 * ulp)


class Seeding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return super().forward(x)


def test_the_callers_model_and_random_state_are_untouched():
    model = nn.Sequential(Seeding(4, 4), nn.BatchNorm1d(4), nn.Dropout()).eval()
    before, random = state_of(model), torch.get_rng_state()
    module = trace(model, torch.randn(1, 4, generator=torch.Generator().manual_seed(0)))
    assert_same_state(before, state_of(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    shared = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    assert not shared & {t.data_ptr() for t in module.state_dict().values()}


def test_an_exported_program_and_its_module_are_accepted():
    model = Typed().eval()
    x = torch.randn(2, 4)
    program = torch.export.export(nn.Linear(4, 3).eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))
    for source, args in ((program, ()), (program.module(), (x,))):
        module = trace(source, *args)
        assert trace_info(module).dynamic_batch
        assert module(torch.randn(5, 4)).shape == (5, 3)
        shared = {t.data_ptr() for t in program.state_dict.values()}
        assert not shared & {t.data_ptr() for t in module.state_dict().values()}
    assert trace(torch.fx.symbolic_trace(nn.Sequential(model.layer)).eval(), x)(x).shape == (2, 4)


def test_a_traced_module_is_copied_not_traced_again():
    module = trace(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    again = trace(module)
    assert again is not module
    assert trace_info(again) == trace_info(module)
    assert again.weight.data_ptr() != module.weight.data_ptr()


def test_a_traced_module_can_be_copied_and_put_in_eval_mode():
    module = trace(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    assert not module.training
    clone = copy.deepcopy(module).eval()
    assert trace_info(clone) == trace_info(module)


def test_nodes_know_their_module_call_and_source_line():
    module = trace(Nested().eval(), torch.randn(2, 4), more={"z": torch.randn(2, 4)})
    linears = [n for n in module.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [module_path(n) for n in linears] == ["layer", "layer"]
    assert [call_index(n) for n in linears] == [0, 1]
    assert source_line(linears[0]).startswith("test_trace.py:")
    assert source_line(linears[0]).endswith('in forward: y = self.layer(self.layer(x)) + more["z"]')
    placeholder = next(n for n in module.graph.nodes if n.op == "placeholder")
    assert (module_path(placeholder), source_line(placeholder)) == ("", "")


def test_tied_weights_have_one_key():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    module = trace(Tied().eval(), torch.randn(2, 4))
    linears = [n for n in module.graph.nodes if n.target is torch.ops.aten.linear.default]
    weights = [weight_key(module, n.args[1]) for n in linears]
    biases = [weight_key(module, n.args[2]) for n in linears]
    assert weights[0] == weights[1]
    assert biases[0] != biases[1]


def test_buffers_are_added_under_fresh_names_and_read_back():
    module = trace(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    first = add_buffer(module, "layer.weight", torch.zeros(2))
    second = add_buffer(module, "layer.weight", torch.ones(2))
    assert first != second
    assert {first, second} <= set(weight_keys(module).values())
    weight = next(n for n in module.graph.nodes if n.op == "get_attr")
    assert get_attr_tensor(module, weight) is module.get_parameter(str(weight.target))
