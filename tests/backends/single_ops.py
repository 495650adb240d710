# SPDX-License-Identifier: Apache-2.0
"""Graphs of one product between quantizers, written by hand rather than traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from qgraph.formats import AffineEncoding
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE

Operand = tuple[Tensor, AffineEncoding]


class SingleOp:
    """Builds ``quantize(op(dequantize(data), dequantize(weight), dequantize(bias)))``."""

    def __init__(self) -> None:
        self.module = GraphModule(nn.Module(), Graph())
        self.mode = FakeTensorMode()
        self.graph = self.module.graph

    def placeholder(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        return node

    def buffer(self, name: str, value: Tensor) -> Node:
        self.module.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value)
        return node

    def parameters(self, name: str, encoding: AffineEncoding) -> tuple[Any, ...]:
        scale = self.buffer(f"{name}_scale", encoding.scale)
        zero = self.buffer(f"{name}_zero", encoding.zero_point)
        axis = () if encoding.axis is None else (encoding.axis,)
        return (scale, zero, encoding.qmin, encoding.qmax, *axis)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        last = list(self.graph.nodes)[-1]
        return insert_call(self.module, target, *args, like=last, **kwargs)

    def finish(self, node: Node) -> GraphModule:
        self.graph.output((node,))
        self.module.recompile()
        return self.module


def product_graph(
    target: Any, data: Operand, weight: Operand, *, bias: Operand | None = None,
    rest: tuple[Any, ...] = (), out: AffineEncoding | None = None, fixed: bool = True,
) -> GraphModule:  # fmt: skip
    """One product; `fixed` makes the weight a buffer, else it is a second input.

    `rest` are the arguments behind the bias; ops without a bias take none.
    """
    builder = SingleOp()
    inputs = [builder.placeholder("data", data[0])]
    weight_parameters = None
    if not fixed:
        inputs.append(builder.placeholder("weight", weight[0]))
    data_parameters = builder.parameters("data", data[1])
    weight_parameters = builder.parameters("weight", weight[1])
    stored = builder.buffer("weight_codes", weight[0]) if fixed else inputs[1]
    args: list[Any] = [
        builder.call(DEQUANTIZE, inputs[0], *data_parameters),
        builder.call(DEQUANTIZE, stored, *weight_parameters),
    ]
    if bias is not None:
        bias_codes = builder.buffer("bias_codes", bias[0])
        args.append(builder.call(DEQUANTIZE, bias_codes, *builder.parameters("bias", bias[1])))
    elif rest:
        args.append(None)
    value = builder.call(target, *args, *rest)
    if out is not None:
        value = builder.call(QUANTIZE, value, *builder.parameters("out", out))
    return builder.finish(value)


def int_bias(codes: Tensor, scale: Tensor) -> Operand:
    """int32 bias codes on the accumulator's scale."""
    zero = torch.zeros_like(scale, dtype=torch.int32)
    axis = 0 if scale.ndim else None
    return codes.to(torch.int32), AffineEncoding(
        scale=scale, zero_point=zero, qmin=-(2**31), qmax=2**31 - 1, axis=axis
    )
