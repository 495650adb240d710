# SPDX-License-Identifier: Apache-2.0
"""Running a few passes over a tiny attention model by hand, with everything verified."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.calibration import FusedStatistics, collect
from qgraph.calibration.loader import adapter
from qgraph.context import Context, Decision
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.passes import Calibrate, PlanSites
from qgraph.pipeline import Pass, Pipeline, run_pipeline
from qgraph.pipelines import front

DIM, TOKENS, KEYS = 8, 5, 7


def batches(count: int = 4, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def some(tokens: int) -> Tensor:
        return torch.randn(3, tokens, DIM, generator=generator)

    return [(some(TOKENS), some(KEYS)) for _ in range(count)]


def offset_keys(model: nn.Module, size: float = 8.0) -> nn.Module:
    """Make every key channel live far from zero, on alternating sides."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and name.endswith("k"):
            with torch.no_grad():
                signs = 1.0 - 2.0 * (torch.arange(module.bias.numel()) % 2)
                module.bias.copy_(size * signs)
                module.weight.mul_(0.5)
    return model


def run(
    model: nn.Module, *passes: Pass, bits: int = 4, scope: str = "full"
) -> tuple[GraphModule, Context]:
    """Trace, plan, calibrate once, run the passes; verification is on."""
    data = batches()
    module = trace(model.eval(), *data[0])
    context = Context(
        sample=Sample(data[0]), batches=data, adapt=adapter(module), facts=frozenset({"traced"})
    )
    plan = PlanSites(weight_bits=bits, activation_bits=bits, ends_bits=bits, scope=scope)
    with torch.no_grad():
        run_pipeline(Pipeline("test", (*front(), plan, Calibrate(), *passes)), module, context)
    return module, context


def decisions(context: Context, name: str) -> list[Decision]:
    return [d for d in context.decisions if d.by == name]


def observe_again(module: GraphModule, seen: Mapping[Node, FusedStatistics]) -> None:
    """Check that single-value statistics equal those of a new sweep over the rewritten graph."""
    wanted = {
        node: [type(each)(**each.options()) for each in fused.statistics]
        for node, fused in seen.items()
    }
    collect(module, batches(), wanted)
    for node, fused in seen.items():
        for transported, again in zip(fused.statistics, wanted[node], strict=True):
            fields = again.fields()
            for name, value in transported.fields().items():
                if value.is_floating_point():
                    torch.testing.assert_close(value, fields[name], rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(value, fields[name]), (node, transported, name)
