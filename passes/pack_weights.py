# SPDX-License-Identifier: Apache-2.0
"""Replace ``quantize(constant)`` by its integer codes: the float copy of a weight goes away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.dialect import encoding_of, is_quantize
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class PackWeights(Pass):
    """Fold every quantize node that reads a stored tensor.

    Promise: bit for bit the same outputs. Tied weights stay one tensor of codes.
    """

    name: ClassVar[str] = "pack-weights"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.PACKED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        del context
        changed = False
        for node in list(module.graph.nodes):
            source = node.args[0] if is_quantize(node) else None
            if not isinstance(source, torch.fx.Node) or source.op != "get_attr":
                continue
            codes = encoding_of(module, node).encode(attribute(module, str(source.target)))
            packed = insert_buffer(module, f"{source.target}_codes", codes, before=node)
            node.replace_all_uses_with(packed)
            module.graph.erase_node(node)
            changed = True
        return changed
