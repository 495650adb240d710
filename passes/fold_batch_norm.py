# SPDX-License-Identifier: Apache-2.0
"""Fold inference batch norm into the preceding convolution or linear; else multiply and add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.fold_batch_norm import fold_batch_norm, fold_channel_affine
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold inference batch norm into the preceding convolution or linear; else multiply and add."""

    name: ClassVar[str] = "fold-batch-norm"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    requires: ClassVar[frozenset[str]] = frozenset({Fact.TRACED})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.CANONICAL})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        changed = fold_batch_norm(module) or changed
        return fold_channel_affine(module) or changed
