# SPDX-License-Identifier: Apache-2.0
"""Drop what does nothing at inference: dropout, metadata asserts, no-op casts and copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.drop_noops import drop_asserts, drop_noops
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class DropNoops(Pass):
    """Drop what does nothing at inference: dropout, metadata asserts, no-op casts and copies."""

    name: ClassVar[str] = "drop-noops"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.TRACED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        changed = drop_asserts(module) or changed
        return drop_noops(module) or changed
