# SPDX-License-Identifier: Apache-2.0
"""Canonical graphs of attention models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pipeline, run_pipeline
from qgraph.pipelines import front


def canonical(model: nn.Module, *args: Tensor) -> GraphModule:
    """Trace and canonicalise."""
    module = trace(model.eval(), *args)
    context = Context(sample=Sample(args), batches=[], facts=frozenset({"traced"}), verify=False)
    with torch.no_grad():
        run_pipeline(Pipeline("front", front()), module, context)
    return module
