# SPDX-License-Identifier: Apache-2.0
"""Biases take back mean shifts, by rows that matter, and stay where that helps nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.context import Decision
from qgraph.errors import ConfigError
from qgraph.graph.build import attribute
from qgraph.passes import CompensateRounding, CorrectBiases, correct_biases
from qgraph.pipeline import Pass
from tests.passes.rounding import rounded


def network(seed: int = 0) -> nn.Module:
    """Inputs of the second layer have a mean, so rounding errors of its weight do not cancel."""
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 16)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def rows(seed: int = 0, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, 12, generator=generator) + 0.5 for _ in range(count)]


def compiled(
    model: nn.Module, *items: Pass, batches: list[Tensor] | None = None
) -> tuple[GraphModule, list[Decision]]:
    module, decisions = rounded(model, batches or rows(), *items)
    return module, [d for d in decisions if d.by == CorrectBiases.name]


def shift(module: GraphModule, model: nn.Module, seed: int = 1) -> Tensor:
    """Mean error of each output on data never seen."""
    x = torch.cat(rows(seed))
    return (module(x) - model(x)).flatten(0, -2).mean(0)


def test_the_mean_shift_of_outputs_goes() -> None:
    model = network()
    plain, _ = compiled(model)
    corrected, lines = compiled(model, CorrectBiases())
    assert [d.outcome for d in lines] == ["applied"] * 2
    assert all(d.numbers["after"] < d.numbers["before"] for d in lines)
    assert float(shift(corrected, model).norm()) < 0.3 * float(shift(plain, model).norm())


def test_kernels_are_summed_over_their_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(8, 3, 16, 16, generator=generator) for _ in range(4)]
    plain, _ = compiled(model, batches=images)
    corrected, lines = compiled(model, CorrectBiases(), batches=images)
    assert "applied" in [d.outcome for d in lines]
    x = torch.rand(16, 3, 16, 16, generator=generator)
    far, near = (
        float((m(x) - model(x)).mean((0, 2, 3)).norm()) for m in (plain, corrected)
    )  # fmt: skip
    assert near < 0.5 * far


def test_a_few_massive_rows_do_not_decide_the_mean() -> None:
    model = network()
    batches = rows()
    for batch in batches:
        batch[:, 0] *= 100
    fair, _ = compiled(model, CorrectBiases(), batches=batches)
    loud, _ = compiled(model, CorrectBiases(relative=0.0), batches=batches)
    usual = torch.cat(batches)[:, 1:]
    off = [float((m(usual) - model(usual)).flatten(0, 1).mean(0).norm()) for m in (fair, loud)]
    assert off[0] < 0.8 * off[1]


def test_a_layer_keeps_its_bias_where_the_held_out_error_rises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correct_biases, "_mean", lambda lost, power: lost.mean(0) + power.sum())
    module, lines = compiled(network(), CorrectBiases())
    assert [d.outcome for d in lines] == ["refused"] * 2
    assert not any("corrected" in name for name, _ in module.named_buffers())


def test_what_cannot_be_corrected_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4)).eval()
    _, lines = compiled(model.requires_grad_(False), CorrectBiases())
    assert [d.reason for d in lines if d.outcome == "kept"] == ["it has no stored bias"]
    _, lines = compiled(network(), CompensateRounding(), CorrectBiases())
    assert {d.reason for d in lines} == {"its weight is settled, or an operand is in float"}
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).eval().requires_grad_(False)
    _, lines = compiled(grouped, CorrectBiases(), batches=[torch.rand(4, 4, 8, 8)] * 2)
    assert [d.reason for d in lines] == ["it is a grouped convolution"]
    with pytest.raises(ConfigError, match="rows is 1"):
        CorrectBiases(rows=1)


def test_the_callers_bias_is_not_touched() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module, _ = compiled(model, CorrectBiases())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert any(
        attribute(module, name).shape == (16,) for name, _ in module.named_buffers()
        if name.endswith("corrected_codes")
    )  # fmt: skip
