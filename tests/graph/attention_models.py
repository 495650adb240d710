# SPDX-License-Identifier: Apache-2.0
"""The attention models of `qgraph.testing`, and their canonical graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pipeline, run_pipeline
from qgraph.pipelines import front
from qgraph.testing.attention_kinds import (
    DIM,
    HEAD,
    HEADS,
    ILLEGAL,
    LEGAL,
    Grouped,
    KeysReadElsewhere,
    Masked,
    NoBias,
    Packed,
    PackedSelf,
    RelativePositions,
    Returned,
    RmsNormed,
    RotaryHalf,
    RotaryPairs,
    ScaledKeys,
    Separate,
    SoftCapped,
    Temperature,
    Twice,
    TwoWay,
    UnitNormed,
    join,
    split,
)

__all__ = [
    "DIM",
    "HEAD",
    "HEADS",
    "ILLEGAL",
    "LEGAL",
    "Grouped",
    "KeysReadElsewhere",
    "Masked",
    "NoBias",
    "Packed",
    "PackedSelf",
    "RelativePositions",
    "Returned",
    "RmsNormed",
    "RotaryHalf",
    "RotaryPairs",
    "ScaledKeys",
    "Separate",
    "SoftCapped",
    "Temperature",
    "Twice",
    "TwoWay",
    "UnitNormed",
    "canonical",
    "join",
    "split",
]


def canonical(model: nn.Module, *args: Tensor) -> GraphModule:
    """Trace and canonicalise."""
    module = trace(model.eval(), *args)
    context = Context(sample=Sample(args), batches=[], facts=frozenset({"traced"}), verify=False)
    with torch.no_grad():
        run_pipeline(Pipeline("front", front()), module, context)
    return module
