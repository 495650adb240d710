# SPDX-License-Identifier: Apache-2.0
"""Long traced graphs without the tracer: tiny residual blocks, as many as one likes.

torch.export takes milliseconds for each node; what a toolkit does with a big graph is measured
and counted on graphs that are written down directly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.graph.build import insert_buffer, insert_call
from qgraph.graph.trace import trace

WIDTH = 8
NODES_PER_BLOCK = 8
aten = torch.ops.aten


class _Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def chain(blocks: int, *, seed: int = 0) -> GraphModule:
    """A traced graph of ``x + gelu(linear(norm(x)))``, over and over; input [B, 4, 8]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = _Stem().eval()
    module = trace(stem, torch.randn(2, 4, WIDTH, generator=generator))
    output = module.graph.output_node()
    first = value = output.all_input_nodes[0]
    for number in range(blocks):
        value = _block(module, value, output, number, generator)
    output.replace_input_with(first, value)
    module.graph.lint()
    module.recompile()
    return module


def _block(
    module: GraphModule, value: Node, before: Node, number: int, generator: torch.Generator
) -> Node:
    def stored(name: str, tensor: Tensor) -> Node:
        return insert_buffer(module, f"{name}{number}", tensor, before=before)

    gain, shift = stored("gain", torch.ones(WIDTH)), stored("shift", torch.zeros(WIDTH))
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    matrix = stored("weight", weight)
    bias = stored("bias", torch.randn(WIDTH, generator=generator) / 8)
    norm = insert_call(
        module, aten.layer_norm.default, value, [WIDTH], gain, shift, 1e-5, like=value,
        before=before,
    )  # fmt: skip
    linear = insert_call(module, aten.linear.default, norm, matrix, bias, like=value, before=before)
    gelu = insert_call(module, aten.gelu.default, linear, like=value, before=before)
    return insert_call(module, aten.add.Tensor, gelu, value, like=value, before=before)
