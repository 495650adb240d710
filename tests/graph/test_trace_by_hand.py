# SPDX-License-Identifier: Apache-2.0
"""What tracing makes of odd signatures, constants, fixed inputs, and writes."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qgraph.graph.build import add_buffer
from qgraph.graph.trace import own_parameters, trace, trace_info, trace_sharing


class Total(nn.Module):
    """Its result has no batch, and yet any batch may come in."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum()


class OneFixed(nn.Module):
    """The code fixes one input; what comes out follows the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x.view(2, 3).sum()


def test_the_batch_is_dynamic_unless_fixed_inputs_reach_the_outputs() -> None:
    module = trace(Total().eval(), torch.ones(2, 3))
    assert (trace_info(module).dynamic_batch, trace_info(module).reason) == (True, "")
    assert module(torch.full((5, 3), 2.0)) == 60.0
    module = trace(OneFixed().eval(), torch.ones(2, 3), torch.ones(2, 4))
    assert (trace_info(module).dynamic_batch, trace_info(module).reason) == (True, "")
    assert torch.equal(module(torch.ones(2, 3), torch.ones(7, 4)), torch.full((7, 4), 7.0))


def test_without_a_batch_the_trace_is_static_and_says_why() -> None:
    class Scalar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    module = trace(Scalar().eval(), torch.tensor(2.0))
    info = trace_info(module)
    assert (info.dynamic_batch, info.reason) == (False, "no input has a batch dimension")
    assert module(torch.tensor(5.0)) == 6.0


def test_keywords_beside_unused_and_used_names_are_dynamic() -> None:
    class Open(nn.Module):
        def forward(self, x: Tensor | None = None, scale: float = 2.0, **others: Tensor) -> Tensor:
            total: Any = sum(others.values()) * scale
            return total if x is None else total + x

    y, z = torch.ones(2, 3), torch.full((2, 3), 5.0)
    for args, kwargs in (((), {}), ((torch.ones(2, 3),), {"scale": 3.0})):
        module = trace(Open().eval(), *args, y=y, z=z, **kwargs)
        assert trace_info(module).dynamic_batch
        grown = [torch.cat([t, t]) for t in (y, z, *args)]
        got = module(*grown[2:], y=grown[0], z=grown[1], **kwargs)
        assert torch.equal(got, Open()(*grown[2:], y=grown[0], z=grown[1], **kwargs))
    module = trace(Open().eval(), y)
    assert trace_info(module).dynamic_batch


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.tensor([4.0, 5.0, 6.0])  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table + torch.tensor([1.0, 2.0, 3.0])


def test_constants_become_buffers_that_follow_the_module() -> None:
    module = trace(Constant().eval(), torch.ones(2, 3))
    held = sorted(t.tolist() for t in module.buffers())
    assert held == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert not list(module.parameters())
    module.double()
    x = torch.full((4, 3), 0.1, dtype=torch.float64)
    assert module(x).dtype == torch.float64


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.copy_(self.calls + x.sum())
        return x + self.calls


def test_a_model_that_writes_is_told_of_by_the_name_of_what_it_writes(caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="qgraph"):
        trace(nn.ReLU().eval(), torch.ones(2, 3))
    assert "writes" not in caplog.text
    with caplog.at_level(logging.WARNING, logger="qgraph"):
        module = trace(Counts().eval(), torch.ones(2, 3))
    assert [r.getMessage() for r in caplog.records if "writes" in r.getMessage()] == [
        "the model writes calls during forward; calls depend on history"
    ]
    module(torch.ones(2, 3))
    assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 13.0))


def test_only_what_is_the_models_is_copied() -> None:
    model = nn.Linear(3, 2).eval()
    model.empty = nn.Parameter(torch.empty(0))
    shared = trace_sharing(model, (torch.ones(2, 3),), {})
    own, spare = torch.ones(2), torch.empty(0)
    names = [add_buffer(shared, "own", own), add_buffer(shared, "spare", spare)]
    before = [shared.get_buffer(name) for name in names]
    weight = shared.get_parameter("weight")
    own_parameters(shared, model)
    assert all(shared.get_buffer(n) is t for n, t in zip(names, before, strict=True))
    assert shared.get_parameter("weight") is not weight
    assert torch.equal(shared.get_parameter("weight"), weight)
    assert isinstance(shared.get_parameter("weight"), nn.Parameter)
    assert not shared.get_parameter("weight").requires_grad
    kept = shared.get_parameter("weight")
    own_parameters(shared, "no module")
    assert shared.get_parameter("weight") is kept
