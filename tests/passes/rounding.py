# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline of a few bits with passes behind insert-quantizers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.calibration.loader import adapter
from qgraph.calibration.sample import small_sample
from qgraph.context import Context, Decision
from qgraph.graph.trace import trace
from qgraph.pipeline import Pass, run_pipeline
from qgraph.pipelines import pipeline


def rounded(
    model: nn.Module, batches: list[Tensor], *items: Pass, bits: str = "w3a8", **options: object
) -> tuple[GraphModule, list[Decision]]:
    """The quantized graph, and what the passes decided; `items` run in their order."""
    module = trace(model, batches[0])
    chosen = pipeline(bits, None, ends_bits=3, **options)
    for item in reversed(items):
        chosen = chosen.insert_after("insert-quantizers", item)
    context = Context(
        sample=small_sample(module, (batches[0],), {}, dynamic=True), batches=batches,
        adapt=adapter(module), facts=frozenset({"traced"}),
    )  # fmt: skip
    run_pipeline(chosen, module, context)
    return module, [d for d in context.decisions if d.by in {item.name for item in items}]
