# SPDX-License-Identifier: Apache-2.0
"""What is refused before tracing, right at the limits of each refusal."""

# mypy: disable-error-code="no-any-return,operator,index,assignment,union-attr"
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from qgraph.errors import CaptureError
from qgraph.graph.capture_checks import check_inference, check_model, check_sample, check_tensors

aten = torch.ops.aten


def layers(count: int, *training: int) -> nn.Module:
    model = nn.Sequential(*(nn.ReLU() for _ in range(count))).eval()
    for i in training:
        model[i].train()
    return model


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ((1,), r"on in '1'; call"),
        ((0, 2), r"on in '0', '2'; call"),
        ((0, 1, 4), r"on in '0', '1', '4'; call"),
        ((0, 1, 2, 4), r"on in '0', '1', '2' and 1 more; call"),
        ((0, 1, 2, 3, 4), r"on in '0', '1', '2' and 2 more; call"),
    ],
)
def test_up_to_three_modules_in_training_mode_are_named(training, words):
    check_model(layers(5))
    with pytest.raises(CaptureError, match=words):
        check_model(layers(5, *training))


def test_modules_inside_modules_are_named_by_their_path() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU())).eval()
    model[0][0].train()
    with pytest.raises(CaptureError, match=r"on in '0\.0'; call"):
        check_model(model)
    model[0][0].eval()
    model.training = True
    with pytest.raises(CaptureError, match=r"on in the model itself; call"):
        check_model(model)


def test_in_a_graph_only_the_modules_that_it_calls_count() -> None:
    graph = Graph()
    graph.output(graph.call_module("called", (graph.placeholder("x"),)))
    root = nn.Module()
    root.called, root.idle = nn.Sequential(nn.ReLU()), nn.ReLU()
    module = GraphModule(root, graph)
    module.idle = root.idle
    module.called.eval()
    assert module.training
    assert module.idle.training
    check_model(module)
    check_model(nn.Sequential(module).eval())
    module.called[0].train()
    module.called.training = False
    with pytest.raises(CaptureError, match=r"on in 'called\.0'; call"):
        check_model(module)


def test_the_input_guards_of_an_exported_program_do_not_count() -> None:
    program = torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(2, 3),))
    module = program.module()
    assert any(type(m).__module__.startswith("torch.export") for m in module.modules())
    check_model(module)


def holder(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, value in tensors.items():
        if name.startswith("p"):
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value)
    return module


INF, NAN = float("inf"), float("nan")
FINE = {
    "plain": {"p": torch.tensor([1.0, -2.0]), "b": torch.tensor([1.0])},
    "infinite buffers": {"b": torch.tensor([INF, -INF])},
    "integers": {"p": torch.tensor([1, 2]), "b": torch.tensor([True])},
    "complex": {"p": torch.tensor([1 + 2j])},
    "8-bit floats": {"p": torch.tensor([1.0, -2.0]).to(torch.float8_e5m2)},
    "empty": {"p": torch.empty(0, 3)},
    "nothing": {},
}
BAD = {
    "1 of 2 values of 'p' are NaN or infinite": {"p": torch.tensor([1.0, INF])},
    "2 of 3 values of 'p' are NaN or infinite": {"p": torch.tensor([NAN, 0.0, -INF])},
    "1 of 1 values of 'p' are NaN or infinite": {"p": torch.tensor([complex(0, INF)])},
    "1 of 2 values of 'p' are NaN or infinite;": {
        "p": torch.tensor([1, NAN]).to(torch.float8_e5m2)
    },
    "1 of 3 values of 'b' are NaN;": {"b": torch.tensor([INF, NAN, 0.0])},
    "1 of 1 values of 'b' are NaN;": {"b": torch.tensor([complex(0, NAN)])},
    "'b' is on the meta device": {"p": torch.ones(1), "b": torch.ones(1, device="meta")},
    "'p2' is on the meta device": {"p2": torch.ones(1, device="meta")},
}


@pytest.mark.parametrize("name", FINE)
def test_finite_weights_and_infinite_masks_are_taken(name):
    check_tensors(holder(**FINE[name]))


@pytest.mark.parametrize("words", BAD)
def test_unusable_tensors_are_refused_by_name_and_number(words):
    with pytest.raises(CaptureError, match=words):
        check_tensors(holder(**BAD[words]))
    with pytest.raises(CaptureError, match=words):
        check_model(holder(**BAD[words]).eval())


def elsewhere(*shape: int) -> Tensor:
    """A tensor that says it is on a device that this machine need not have."""
    with FakeTensorMode():
        return torch.empty(shape, device="cuda:1")


def test_two_devices_are_refused_with_one_tensor_of_each() -> None:
    given = {"a": torch.ones(1), "b": torch.ones(2), "c": elsewhere(2), "d": elsewhere(3)}
    with pytest.raises(CaptureError, match=r"over cpu \('a'\) and cuda:1 \('c'\); move"):
        check_tensors(holder(**given))


class Two(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor | None = None) -> Tensor:
        return x if y is None else x + y


def test_samples_on_another_device_are_refused_unless_they_are_scalars() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(CaptureError, match="model is on cpu, a sample input on meta"):
        check_sample(model, (torch.ones(2, 3, device="meta"),), {})
    check_sample(model, (torch.ones((), device="meta"),), {})
    check_sample(model, (torch.ones(2, 3),), {})
    check_sample(Two(), (torch.ones(2, 3, device="meta"),), {})  # it has no tensors itself
    named = nn.BatchNorm1d(3, affine=False)  # buffers alone
    with pytest.raises(CaptureError, match="a sample input on meta"):
        check_sample(named, (torch.ones(2, 3, device="meta"),), {})


def test_empty_samples_and_those_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2, 3)
    check_sample(Two(), (x,), {"y": None})
    check_sample(Two(), ([1, "a", x],), {})
    check_sample(Two(), (torch.ones(1),), {})
    cases: list[tuple[Any, dict[str, Any]]] = [(torch.ones(2, 0), {})]
    cases += [([x, torch.ones(0, 3)], {}), (x, {"y": torch.ones(0)})]
    for bad in cases:
        with pytest.raises(CaptureError, match=r"is empty; give at least one item"):
            check_sample(Two(), (bad[0],), bad[1])
    for args, kwargs, words in (
        ((), {}, r"\(\) do not fit"),
        ((x, x), {}, r"\(Tensor, Tensor\) do not fit Two\.forward"),
        ((x,), {"z": x}, r"\(Tensor, z=\.\.\.\) do not fit"),
    ):
        with pytest.raises(CaptureError, match=words):
            check_sample(Two(), args, kwargs)


DROPOUTS = [
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.native_dropout.default,
]  # fmt: skip


def graph_of(target: Any, *rest: Any) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.relu.default, (x, 0.5, True))
    graph.output(graph.call_function(target, (x, *rest)))
    return graph


@pytest.mark.parametrize("target", DROPOUTS)
def test_dropout_is_refused_where_its_flag_is_on(target):
    check_inference(graph_of(target, 0.5, False))
    check_inference(graph_of(target, 0.5))
    check_inference(graph_of(target, 0.5, None))
    with pytest.raises(CaptureError, match="dropout is active in inference; pass"):
        check_inference(graph_of(target, 0.5, True))


def test_dropout_inside_attention_is_refused_where_it_is_above_zero() -> None:
    target = aten.scaled_dot_product_attention.default
    for rest in ((1, 2), (1, 2, True), (1, 2, None, 0.0), (1, 2, None, 0.0, True)):
        check_inference(graph_of(target, *rest))
    with pytest.raises(CaptureError, match="dropout is active"):
        check_inference(graph_of(target, 1, 2, None, 0.1))


def test_the_module_of_an_active_dropout_is_named() -> None:
    graph = graph_of(aten.dropout.default, 0.5, True)
    node = list(graph.nodes)[2]
    node.meta["nn_module_stack"] = {"a": ("a.b", "Kind")}
    node.meta["stack_trace"] = '  File "/me/net.py", line 3, in forward\n    y = drop(x)\n'
    words = r"in inference in a\.b at net\.py:3, in forward: y = drop\(x\); pass"
    with pytest.raises(CaptureError, match=words):
        check_inference(graph)
