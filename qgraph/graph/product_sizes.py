# SPDX-License-Identifier: Apache-2.0
"""Parameters, multiply-accumulates and activation elements of every product, from traced shapes.

Counts are for one sample (axis 0 is the batch); sizes that are symbolic count as traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.ops import OpKind, argument, constants, kind, product


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSize:
    """Counts of one convolution, linear or matmul.

    Attributes:
        parameters: elements of a constant weight, 0 where both operands are activations.
        channels: output channels of the weight, hence its number of per-channel scales.
        biases: elements of a constant bias.
        macs: multiply-accumulates.
        inputs, outputs: activation elements read (without the weight) and written.
    """

    parameters: int
    channels: int
    biases: int
    macs: int
    inputs: int
    outputs: int


def product_sizes(module: GraphModule) -> dict[str, ProductSize]:
    """Return the counts of each product that depends on an input, by name, in graph order."""
    nodes = list(module.graph.nodes)
    fixed = constants(nodes)
    return {
        node.name: _measure(node, fixed)
        for node in nodes
        if product(node) is not None and node not in fixed
    }


def _shape(node: object) -> tuple[int, ...]:
    """Sizes of a tensor node, symbolic ones as traced; () where there is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return ()
    return tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in value.shape)


def _measure(node: Node, fixed: set[Node]) -> ProductSize:
    place = product(node)
    assert place is not None, f"{node.name} is no product"
    data, weight = argument(node, place.data), argument(node, place.weight)
    bias = None if place.bias is None else argument(node, place.bias)
    is_parameter = isinstance(weight, Node) and weight in fixed
    inputs = math.prod(_shape(data)[1:])
    if not is_parameter:
        inputs += math.prod(_shape(weight)[1:])
    outputs = math.prod(_shape(node)[1:])
    return ProductSize(
        parameters=math.prod(_shape(weight)) if is_parameter else 0,
        channels=_shape(weight)[place.weight_axis] if is_parameter else 0,
        biases=math.prod(_shape(bias)) if isinstance(bias, Node) else 0,
        macs=_macs(kind(node), _shape(data), _shape(weight), outputs),
        inputs=inputs,
        outputs=outputs,
    )


def _macs(what: OpKind, data: tuple[int, ...], weight: tuple[int, ...], num_outputs: int) -> int:
    """Multiply-accumulates; padding counts, as in every published figure."""
    if what is OpKind.CONV:
        return num_outputs * math.prod(weight[1:])
    if what is OpKind.CONV_TRANSPOSE:
        return math.prod(data[1:]) * math.prod(weight[1:])
    return num_outputs * data[-1]
