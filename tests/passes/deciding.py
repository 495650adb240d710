# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline on a small model up to where formats are decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.calibration.loader import adapter
from qgraph.calibration.sample import small_sample
from qgraph.context import Context
from qgraph.graph.build import shallow_copy
from qgraph.graph.trace import trace
from qgraph.pipeline import Pass, Step, run_pipeline
from qgraph.pipelines import pipeline

SCOPE = ("linear", "conv", "matmul")


@dataclass(frozen=True)
class Decided:
    """The float graph before and after, what was decided, and the batches."""

    before: GraphModule
    module: GraphModule
    context: Context
    steps: dict[str, Step]
    batches: list[Tensor]

    def lines(self, name: str) -> list[tuple[str, str]]:
        """(outcome, reason) of the decisions of one pass."""
        return [(d.outcome, d.reason) for d in self.context.decisions if d.by == name]

    def formats(self) -> dict[str, str]:
        """Format of each activation edge."""
        sites = self.context.plan.activations()
        return {str(s.edge): str(s.encoding and s.encoding.describe()) for s in sites}


def decided(
    model: nn.Module, *items: Pass, name: str = "int6", data: list[Tensor] | None = None,
    row_masks: Callable[..., Any] | None = None, verify: bool = False,
) -> Decided:  # fmt: skip
    """Run the pipeline `name` with `items` before choose-ranges, and stop behind that."""
    generator = torch.Generator().manual_seed(0)
    batches = data or [torch.randn(4, 12, 16, generator=generator) for _ in range(4)]
    before = trace(model.eval(), batches[0])
    module = shallow_copy(before)
    chosen = pipeline(name, scope=SCOPE)
    for item in items:
        chosen = chosen.insert_before("choose-ranges", item)
    chosen = dataclasses.replace(chosen, passes=chosen.passes[: chosen.index("choose-ranges") + 1])
    context = Context(
        sample=small_sample(module, (batches[0],), {}, dynamic=True), batches=batches,
        adapt=adapter(module), facts=frozenset({"traced"}), row_masks=row_masks, verify=verify,
    )  # fmt: skip
    with torch.no_grad():
        steps = run_pipeline(chosen, module, context)
    return Decided(before, module, context, {s.name: s for s in steps}, batches)


def seeded(model: nn.Module, seed: int = 0, scale: float = 0.4) -> nn.Module:
    """The model with random weights and no biases, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = module.weight.shape
            module.weight.data = torch.randn(shape, generator=generator) * scale
            module.bias.data.zero_()
    return model
