# SPDX-License-Identifier: Apache-2.0
"""What cannot be traced is refused with the culprit, the source line and a cure."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
# Attributes and calls of nn.Module are Tensor | Module, or Any, to the type checker.
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qgraph.errors import CaptureError, PassError
from qgraph.graph.tensors import get_attr_tensor
from qgraph.graph.trace import trace, trace_info

X = torch.ones(2, 4)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Detour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


class Stuck(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4) + 1


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Opaque:
        return Opaque(x)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        msg = "only for squares"
        raise ValueError(msg)


def test_data_dependent_branches_name_the_line_and_a_way_out():
    with pytest.raises(CaptureError) as caught:
        trace(Branching().eval(), X)
    text = str(caught.value)
    assert "test_trace_refusals.py:" in text
    assert "if x.sum() > 0:" in text
    assert "torch.cond" in text
    assert "GuardOnDataDependentSymNode" in type(caught.value.__cause__).__name__


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (Detour(), r"leaves torch .*numpy\(x\.numpy\(\)\)"),
        (Wrapped(), r"register_dataclass"),
        (Random(), r"dropout is active in inference at test_trace_refusals.py:\d+.*training="),
        (Raising(), r"cannot follow the code at test_trace_refusals.py:\d+, in forward.*squares"),
    ],
)
def test_unexportable_code_names_the_line_and_a_way_out(model, pattern):
    with pytest.raises(CaptureError, match=pattern):
        trace(model.eval(), X)


@pytest.mark.parametrize("shapes", [{"x": {0: Dim.AUTO}}, {"x": {0: Dim("batch")}}])
def test_a_dimension_asked_to_be_dynamic_may_not_specialise(shapes):
    with pytest.raises(CaptureError, match=r"fixe[sd]"):
        trace(Stuck().eval(), X, dynamic_shapes=shapes)


def test_dynamic_shapes_that_do_not_fit_are_refused():
    with pytest.raises(CaptureError, match="dynamic_shapes does not fit"):
        trace(nn.Linear(4, 4).eval(), X, dynamic_shapes={"y": {0: Dim.AUTO}})
    program = torch.export.export(nn.Linear(4, 4).eval(), (X,))
    with pytest.raises(CaptureError, match="are fixed in an ExportedProgram"):
        trace(program, dynamic_shapes={"input": {0: Dim.AUTO}})


def test_training_mode_anywhere_is_refused_and_left_on():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout())).eval()
    model[1][0].train()
    with pytest.raises(CaptureError, match=r"'1\.0'; call model\.eval\(\)"):
        trace(model, X)
    assert model[1][0].training
    with pytest.raises(CaptureError, match="the model itself"):
        trace(nn.Linear(4, 4), X)


def test_training_mode_in_a_graph_is_refused():
    program = torch.export.export(nn.Dropout().train(), (X,))
    with pytest.raises(CaptureError, match="dropout is active"):
        trace(program)
    with pytest.raises(CaptureError, match="training mode is on in '0'"):
        trace(torch.fx.symbolic_trace(nn.Sequential(nn.Dropout())), X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(value):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(CaptureError, match=r"1 of 16 values of '0\.weight'"):
        trace(model, X)


def test_infinite_mask_buffers_are_fine_but_nan_is_not():
    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, value]))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.mask).softmax(-1)

    assert trace(Masked(float("-inf")).eval(), X)(X)[0, 3] == 0
    with pytest.raises(CaptureError, match="'mask' are NaN"):
        trace(Masked(float("nan")).eval(), X)


def test_meta_and_mixed_devices_are_refused_with_both_names():
    with pytest.raises(CaptureError, match="'weight' is on the meta device"):
        trace(nn.Linear(4, 4, device="meta").eval(), X)
    with pytest.raises(CaptureError, match="model is on cpu, a sample input on meta"):
        trace(nn.Linear(4, 4).eval(), X.to("meta"))


def test_sample_inputs_must_fit_the_signature_and_hold_something():
    with pytest.raises(CaptureError, match=r"\(Tensor, Tensor\) do not fit Linear\.forward"):
        trace(nn.Linear(4, 4).eval(), X, X)
    with pytest.raises(CaptureError, match=r"\(0, 4\) is empty"):
        trace(nn.Linear(4, 4).eval(), X[:0])


def test_what_is_no_module_is_refused():
    with pytest.raises(CaptureError, match="got function"):
        trace(lambda x: x, X)  # type: ignore[arg-type]
    scripted = torch.jit.trace(nn.Linear(4, 4).eval(), X)
    with pytest.raises(CaptureError, match="TorchScript"):
        trace(scripted, X)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(4, 4).eval()
    model.cache = model.weight * 2  # a computed tensor, which deepcopy refuses
    with pytest.raises(CaptureError, match=r"cannot be copied"):
        trace(model, X)


def test_the_model_is_untouched_after_a_failure():
    model = Branching().eval()
    attributes, random = sorted(vars(model)), torch.get_rng_state()
    with pytest.raises(CaptureError):
        trace(model, X)
    assert sorted(vars(model)) == attributes
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_trace_information_and_tensors_are_asked_of_the_right_things():
    foreign = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"not made by qgraph\.trace"):
        trace_info(foreign)
    node = next(n for n in foreign.graph.nodes if n.op == "placeholder")
    with pytest.raises(PassError, match="is no constant tensor"):
        get_attr_tensor(foreign, node)
