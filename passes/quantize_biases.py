# SPDX-License-Identifier: Apache-2.0
"""Store biases as int32 codes on the scale of their product's accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.formats import AffineEncoding
from qgraph.graph.build import attribute, insert_buffer, insert_call
from qgraph.graph.dialect import DEQUANTIZE, encoding_of, is_dequantize
from qgraph.graph.edges import Edge
from qgraph.graph.ops import product
from qgraph.pipeline import Fact, Pass, Promise

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
# A bias beyond this share of int32 leaves too little room for the products themselves.
HEADROOM = 2**30


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """Give each product of two scaled operands an int32 bias with scale ``s_x * s_w``.

    A bias that would come near the int32 limit stays in float and is reported: the weight
    scale of that channel is too small for it. So does the bias of a product whose data has
    more than one scale (free channel groups).
    """

    name: ClassVar[str] = "quantize-biases"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.BIASES})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        changed = False
        for node in list(module.graph.nodes):
            what = product(node)
            if what is None or what.bias is None or what.bias >= len(node.args):
                continue
            bias = node.args[what.bias]
            if isinstance(bias, Node) and bias.op == "get_attr":
                changed |= self._quantize(module, context, node, what.bias)
        return changed

    def _quantize(self, module: GraphModule, context: Context, node: Node, position: int) -> bool:
        scale = accumulator_scale(module, node)
        if scale is None:
            return False
        bias = node.args[position]
        assert isinstance(bias, Node)
        values = attribute(module, str(bias.target)).to(torch.float64)
        codes = torch.round(values / scale.to(torch.float64))
        if bool((codes.abs() > HEADROOM).any()):
            worst = float(codes.abs().max())
            context.record(
                self.name, node, "refused", "bias would overflow int32 at this weight scale",
                largest_code=worst,
            )  # fmt: skip
            return False
        axis = 0 if scale.ndim else None
        zero = torch.zeros_like(scale, dtype=torch.int32)
        stored = insert_buffer(module, f"{bias.target}_codes", codes.to(torch.int32), before=node)
        parameters = (
            insert_buffer(module, f"{bias.target}_scale", scale, before=node),
            insert_buffer(module, f"{bias.target}_zero_point", zero, before=node),
        )
        value = insert_call(
            module, DEQUANTIZE, stored, *parameters, INT32_MIN, INT32_MAX,
            *(() if axis is None else (axis,)), like=node, before=node,
        )  # fmt: skip
        Edge(node, (position,)).redirect(value)
        return True


def accumulator_scale(module: GraphModule, node: Node) -> Tensor | None:
    """fp32 scale of the integer accumulator, [] or [C_out]; None if it has no single one."""
    what = product(node)
    if what is None:
        return None
    data, weight = node.args[what.data], node.args[what.weight]
    if not (is_dequantize(data) and is_dequantize(weight)):
        return None
    assert isinstance(data, Node)
    assert isinstance(weight, Node)
    x, w = encoding_of(module, data), encoding_of(module, weight)
    blocked = any(isinstance(e, AffineEncoding) and e.block is not None for e in (x, w))
    per_output = w.axis is None or w.axis % weight.meta["val"].ndim == what.weight_axis
    if x.scale.ndim or blocked or not per_output:
        return _tied_scale(x.scale, w.scale) if not blocked and per_output else None
    if what.weight_axis == 1 and w.scale.ndim:  # a grouped transposed conv repeats its channels
        groups = int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]
        return (x.scale * w.scale).repeat(groups)
    return x.scale * w.scale


def _tied_scale(x_scale: Tensor, w_scale: Tensor) -> Tensor | None:
    """Product scale when the data scales are power-of-two multiples of their smallest."""
    smallest = x_scale.min()
    mantissa, _ = torch.frexp(x_scale / smallest)
    return smallest * w_scale if bool((mantissa == 0.5).all()) else None
