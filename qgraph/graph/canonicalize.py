# SPDX-License-Identifier: Apache-2.0
"""Canonical form: few kinds of ops reach the passes.

Each rewrite is a function ``(GraphModule) -> bool``, keeps the model's function, is idempotent,
and says honestly whether it changed the graph.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from qgraph.graph.build import prune
from qgraph.graph.decompose_attention import decompose_attention
from qgraph.graph.drop_noops import drop_asserts, drop_noops
from qgraph.graph.einsum import decompose_einsum
from qgraph.graph.fold_batch_norm import fold_batch_norm, fold_channel_affine
from qgraph.graph.fold_constants import fold_constants
from qgraph.graph.normalize_ops import (
    recompose_norms,
    recompose_products,
    rename_ops,
    specialise_convolutions,
)

Rewrite = Callable[[GraphModule], bool]

# Constants are folded before attention, so that it can look into masks, and again after it.
REWRITES: tuple[Rewrite, ...] = (
    drop_asserts,
    rename_ops,
    recompose_norms,
    specialise_convolutions,
    drop_noops,
    decompose_einsum,
    recompose_products,
    fold_constants,
    decompose_attention,
    drop_noops,
    fold_constants,
    fold_batch_norm,
    fold_channel_affine,
)


def canonicalize(module: GraphModule) -> bool:
    """Bring a traced graph into canonical form, in place; return whether it changed."""
    changed = False
    for rewrite in REWRITES:
        changed = rewrite(module) or changed
    if changed:
        prune(module)
        module.graph.lint()
        module.recompile()
    return changed
