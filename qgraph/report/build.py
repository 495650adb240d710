# SPDX-License-Identifier: Apache-2.0
"""Put the report of a compilation together."""

from __future__ import annotations

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.edges import Path
from qgraph.graph.trace import trace_info
from qgraph.pipeline import Pipeline, Step
from qgraph.report.distributions import Distribution, Operands
from qgraph.report.graph_view import view_and_cost
from qgraph.report.layers import consumers, layer_records, measure
from qgraph.report.report import Report
from qgraph.report.samples import SampleImage, sample_images
from qgraph.report.sensitivity import SensitivityPoint


def build_report(
    pipeline: Pipeline, module: GraphModule, context: Context, steps: list[Step]
) -> Report:
    """The report; layer errors are measured on the verification sample."""
    errors: dict[str, float] = {}
    shapes: dict[tuple[str, Path], Distribution] = {}
    images: tuple[SampleImage, ...] = ()
    if context.reference is not None and context.verify is not False:
        operands = Operands(context.plan, context.reference)
        taps = (operands.before, operands.after)
        names = consumers(context.plan)
        errors = measure(context.reference, module, context.sample, names, taps)
        shapes = operands.distributions()
        images = sample_images(context.reference, module, context.sample)
    info = trace_info(module)
    notes = [] if info.dynamic_batch else [f"static shapes: {info.reason}"]
    view, cost = view_and_cost(module, errors)
    return Report(
        pipeline=str(pipeline),
        layers=tuple(layer_records(context.plan, errors, shapes)),
        decisions=tuple(context.decisions),
        steps=tuple(steps),
        notes=tuple(notes),
        graph=view,
        cost=cost,
        images=images,
        sensitivity=tuple(SensitivityPoint(*point) for point in context.sensitivity),
    )
