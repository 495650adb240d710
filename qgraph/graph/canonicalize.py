# SPDX-License-Identifier: Apache-2.0
"""Canonical form: few kinds of ops reach the passes.

Each rewrite is a function ``(GraphModule) -> bool``, keeps the model's function, is idempotent,
and says honestly whether it changed the graph.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from qgraph.graph.build import prune

Rewrite = Callable[[GraphModule], bool]

REWRITES: tuple[Rewrite, ...] = ()


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
