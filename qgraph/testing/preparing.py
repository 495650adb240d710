# SPDX-License-Identifier: Apache-2.0
"""Bring a graph to where a pass can run: the passes that establish what it requires."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.calibration.loader import adapter
from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.graph.build import shallow_copy
from qgraph.graph.trace import trace
from qgraph.graph.trace_info import has_trace_info
from qgraph.graph.verify import Sample
from qgraph.pipeline import Fact, Pass, Pipeline, Promise, Step, run_pipeline
from qgraph.pipelines import pipeline


@dataclass(frozen=True)
class _Keep(Pass):
    """Keeps the graph as it was just before the pass under test."""

    name: ClassVar[str] = "keep-the-graph"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    found: list[GraphModule] = field(default_factory=list)

    def run(self, module: GraphModule, context: Context) -> bool:
        del context
        self.found.append(shallow_copy(module))
        return False


@dataclass(frozen=True)
class Run:
    """One run of a pass behind its prefix.

    Attributes:
        before: the graph that the pass was given, sharing tensors with what came of it.
        after: the graph it left.
        context: with plan, statistics and decisions.
        step: what the manager recorded of the pass.
        dynamic: whether the batch may change.
    """

    before: GraphModule
    after: GraphModule
    context: Context
    step: Step
    dynamic: bool


def prefix_of(item: Pass, base: str | Pipeline = "int8") -> tuple[Pass, ...]:
    """The passes of a pipeline, from its start, that establish what `item` requires.

    Raises:
        ConfigError: the pipeline does not establish it.
    """
    source = pipeline(base) if isinstance(base, str) else base
    facts: set[str] = {Fact.TRACED}
    taken: list[Pass] = []
    for each in source:
        if item.requires <= facts:
            break
        if each.name != item.name:
            taken.append(each)
            facts = (facts - each.invalidates) | each.establishes
    missing = sorted(item.requires - facts)
    if missing:
        msg = (
            f"{item.name} requires {missing}, which pipeline {source.name!r} does not establish; "
            "give the passes that do with after="
        )
        raise ConfigError(msg)
    return tuple(taken)


def traced(model: nn.Module, inputs: Sequence[Any]) -> GraphModule:
    """The model's graph; a traced graph is copied."""
    if isinstance(model, GraphModule) and has_trace_info(model):
        return shallow_copy(model)
    return trace(model, *inputs)


def run_behind_prefix(
    item: Pass, module: GraphModule, sample: Sample, *,
    after: Iterable[Pass] | None = None, batches: Iterable[Any] | None = None,
) -> Run:  # fmt: skip
    """Run the prefix and the pass on a copy of a traced graph, under the manager's checks.

    Raises:
        PassError, VerificationError: the manager's findings.
        ConfigError: the pass cannot run here.
    """
    work = shallow_copy(module)
    prefix = prefix_of(item) if after is None else tuple(after)
    keep = _Keep()
    context = Context(
        sample=sample,
        batches=[(sample.args, sample.kwargs)] if batches is None else batches,
        adapt=adapter(work),
        facts=frozenset({Fact.TRACED}),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        steps = run_pipeline(Pipeline("test", (*prefix, keep, item)), work, context)
    dynamic = any(
        not isinstance(size, int)
        for node in work.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape[:1]
    )
    return Run(keep.found[0], work, context, steps[-1], dynamic)
