# SPDX-License-Identifier: Apache-2.0
"""Spell each op one way: einsum as products, addmm as linear, constants computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.drop_noops import drop_noops
from qgraph.graph.einsum import decompose_einsum
from qgraph.graph.fold_constants import fold_constants
from qgraph.graph.normalize_ops import (
    recompose_norms,
    recompose_products,
    rename_ops,
    specialise_convolutions,
)
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class NormalizeOps(Pass):
    """Spell each op one way: einsum as products, addmm as linear, constants computed once."""

    name: ClassVar[str] = "normalize-ops"
    promise: ClassVar[Promise] = Promise.EQUIVALENT
    requires: ClassVar[frozenset[str]] = frozenset({Fact.TRACED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        changed = rename_ops(module) or changed
        changed = recompose_norms(module) or changed
        changed = specialise_convolutions(module) or changed
        changed = drop_noops(module) or changed
        changed = decompose_einsum(module) or changed
        changed = recompose_products(module) or changed
        return fold_constants(module) or changed
