# SPDX-License-Identifier: Apache-2.0
"""An exact rewrite: pool first, then clip, which a quarter of the elements have to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph import Context, Promise, Rewrite
from qgraph.graph.build import insert_call
from qgraph.graph.matching import Call, Match, call, value

aten = torch.ops.aten


@dataclass(frozen=True)
class PoolBeforeRelu(Rewrite):
    """``max_pool(relu(x))`` is ``relu(max_pool(x))``, bit for bit."""

    name: ClassVar[str] = "pool-before-relu"
    promise: ClassVar[Promise] = Promise.IDENTICAL

    def pattern(self) -> Call:
        """A pool that reads a ReLU."""
        return call(aten.max_pool2d.default, call(aten.relu.default, value("x"), name="relu"))

    def check(self, match: Match, context: Context) -> str:
        """If others read the ReLU too, it has to stay where it is."""
        return match.read_elsewhere()

    def rewrite(self, module: GraphModule, match: Match, context: Context) -> Node:
        """The same two ops in the other order."""
        pool, relu = match.root, match["relu"]
        pooled = insert_call(module, aten.max_pool2d.default, match["x"], *pool.args[1:], like=pool)
        return insert_call(module, aten.relu.default, pooled, like=relu, before=pooled.next)
