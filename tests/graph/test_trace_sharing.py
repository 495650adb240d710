# SPDX-License-Identifier: Apache-2.0
"""A compilation reads the caller's weights where they are, and keeps none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qgraph
from qgraph.graph.trace import own_parameters, trace_sharing
from qgraph.graph.verify import tensors

X = torch.linspace(-1, 1, 24).view(3, 8)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return y


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.copy_(self.calls + 1)
        return x + self.calls


def places(module: GraphModule) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(module).values()}


@pytest.mark.parametrize("traced_before", [False, True])
def test_weights_are_shared_until_they_are_owned(traced_before: bool) -> None:
    model: nn.Module = Tied().eval()
    if traced_before:
        model = qgraph.trace(model, X)
    shared = trace_sharing(model, (X,), {})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert parameters <= places(shared)
    want = shared(X)
    own_parameters(shared, model)
    assert not parameters & places(shared)
    assert torch.equal(shared(X), want)
    assert len(places(shared)) == len(parameters)  # tied weights stay one tensor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(shared(X), want)


def test_training_goes_on_without_touching_the_quantized_model() -> None:
    model = Tied().eval()
    quantized = qgraph.compile(model, [X, X / 2], "w4a8")
    want = quantized(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(quantized(X), want)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_writes_its_parameters_is_copied() -> None:
    model = Counts().eval()
    shared = trace_sharing(model, (X,), {})
    shared(X)
    assert not bool(model.calls.any())


def test_another_dtype_leaves_the_callers_weights_as_they_are() -> None:
    model = Tied().eval().to(torch.bfloat16)
    shared = trace_sharing(model, (X.to(torch.bfloat16),), {})
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(t.dtype == torch.float32 for t in tensors(shared).values())
