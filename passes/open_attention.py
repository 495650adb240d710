# SPDX-License-Identifier: Apache-2.0
"""Open scaled_dot_product_attention into products and softmax; each can then be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.decompose_attention import decompose_attention
from qgraph.graph.drop_noops import drop_noops
from qgraph.graph.fold_constants import fold_constants
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Open scaled_dot_product_attention into products and softmax; each can then be quantized."""

    name: ClassVar[str] = "open-attention"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    requires: ClassVar[frozenset[str]] = frozenset({Fact.TRACED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        changed = decompose_attention(module) or changed
        changed = drop_noops(module) or changed
        return fold_constants(module) or changed
