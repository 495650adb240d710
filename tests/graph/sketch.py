# SPDX-License-Identifier: Apache-2.0
"""Graphs of ATen calls drawn node by node: with all metadata, and without the cost of an export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from qgraph.graph.build import set_value

aten = torch.ops.aten


class Sketch:
    """A graph in the making.

    Attributes:
        module: the graph module; its code is written by `returns`.
    """

    def __init__(self) -> None:
        self.module = GraphModule(nn.Module(), Graph())
        self.graph = self.module.graph
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def input(
        self, *shape: int, name: str = "x", dtype: torch.dtype = torch.float32, free: int = 0
    ) -> Node:
        """A placeholder; its first `free` sizes are symbols, equal ones (of 3 or more) alike."""
        node = self.graph.placeholder(name)
        kinds = [DimDynamic.DUCK if i < free else DimDynamic.STATIC for i in range(len(shape))]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        value = torch.empty(shape, dtype=dtype)
        node.meta["val"] = self._mode.from_tensor(value, symbolic_context=context)
        return node

    def stored(self, value: Tensor, name: str = "w") -> Node:
        """A buffer and the node that reads it; a name that is taken reads what is there."""
        name = name.replace(".", "_")
        if not hasattr(self.module, name):
            self.module.register_buffer(name, value)
        node = self.graph.get_attr(name)
        set_value(self.module, node)
        return node

    def call(self, target: Any, *args: Any, within: str = "", **kwargs: Any) -> Node:
        """A call; `within` is the path of the module that it belongs to."""
        node = self.graph.call_function(target, args, kwargs)
        if within:
            parts = within.split(".")
            paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
            node.meta["nn_module_stack"] = {p: (p, f"Kind{p.count('.')}") for p in paths}
        set_value(self.module, node)
        return node

    def linear(self, x: Node, outputs: int, *, bias: bool = True, name: str = "fc") -> Node:
        """A linear layer of random weights, inside a module of that name."""
        inputs = int(x.meta["val"].shape[-1])
        args = [self.stored(torch.randn(outputs, inputs), f"{name}_weight")]
        if bias:
            args.append(self.stored(torch.randn(outputs), f"{name}_bias"))
        return self.call(aten.linear.default, x, *args, within=name)

    def conv(
        self, x: Node, outputs: int, kernel: int = 3, *, stride: int = 1, name: str = "conv"
    ) -> Node:
        """A padded two-dimensional convolution of random weights."""
        inputs = int(x.meta["val"].shape[1])
        weight = self.stored(torch.randn(outputs, inputs, kernel, kernel), f"{name}_weight")
        bias = self.stored(torch.randn(outputs), f"{name}_bias")
        pad = kernel // 2
        return self.call(aten.conv2d.default, x, weight, bias, [stride] * 2, [pad] * 2, within=name)

    def returns(self, *values: Node) -> GraphModule:
        """End the graph."""
        self.graph.output(values if len(values) != 1 else values[0])
        self.graph.lint()
        self.module.recompile()
        return self.module
