# SPDX-License-Identifier: Apache-2.0
"""Activations with a scale per channel (or group), in ops that onnxruntime does not fuse wrongly.

Its integer products, adds and tables want one scale per activation, but its fusions do not all
check: a QuantizeLinear or DequantizeLinear with an axis beside them makes MatMul fail when it
runs, Add and Concat when the session is created, and Softmax round to wrong codes in silence
(measured on onnxruntime 1.31). Division, rounding and the zero point as ops of their own mean the
same, bit for bit, and fuse with nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.formats import AffineEncoding
from qgraph.formats.base import along
from qgraph.graph.build import insert_buffer, insert_call

aten = torch.ops.aten
# Producers without an integer kernel: a QuantizeLinear with an axis behind them stays one.
_FLOAT_PRODUCERS = frozenset({
    aten.layer_norm.default, aten.native_layer_norm.default, aten.group_norm.default,
    aten.gelu.default,
})  # fmt: skip


def may_keep_axis(source: Any) -> bool:
    """Whether QuantizeLinear with an axis is safe behind `source`."""
    return isinstance(source, Node) and (
        source.op == "placeholder" or source.target in _FLOAT_PRODUCERS
    )


def fits_product(node: Node, encoding: AffineEncoding) -> bool:
    """Whether all products that read a decoded weight have it scaled along their output axis."""
    if encoding.axis is None or encoding.block is not None:
        return True
    ndim: int = node.meta["val"].ndim
    places: dict[Any, int] = {aten.linear.default: 0, aten.matmul.default: ndim - 1}
    axis = encoding.axis % ndim
    return all(places.get(user.target, axis) == axis for user in node.users)


def quantize_by_channel(
    module: GraphModule, node: Node, encoding: AffineEncoding, shift: int, dtype: torch.dtype
) -> Node:
    """Codes ``clamp(round(x / s) + z)`` of a quantize node, stored as ``code + shift``."""
    ndim = node.meta["val"].ndim

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return insert_call(module, target, *args, like=node, before=node, **kwargs)

    def constant(name: str, value: Tensor) -> Node:
        return insert_buffer(module, f"{node.name}_{name}", value, before=node)

    units = call(
        aten.div.Tensor,
        node.args[0],
        constant("scales", along(encoding.scale, encoding.axis, ndim)),
    )
    zeros = along((encoding.zero_point + shift).to(torch.float32), encoding.axis, ndim)
    shifted = call(aten.add.Tensor, call(aten.round.default, units), constant("zeros", zeros))
    low, high = float(encoding.qmin + shift), float(encoding.qmax + shift)
    return call(aten._to_copy.default, call(aten.clamp.default, shifted, low, high), dtype=dtype)


def dequantize_by_channel(
    module: GraphModule, node: Node, codes: Node, zero_point: Tensor, encoding: AffineEncoding
) -> Node:
    """Values ``(code - z) * s`` of a dequantize node whose stored zero points are given."""
    ndim = node.meta["val"].ndim

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return insert_call(module, target, *args, like=node, before=node, **kwargs)

    def constant(name: str, value: Tensor) -> Node:
        vector = along(value.to(torch.float32), encoding.axis, ndim)
        return insert_buffer(module, f"{node.name}_{name}", vector, before=node)

    wide = call(aten._to_copy.default, codes, dtype=torch.float32)
    if bool(zero_point.any()):
        wide = call(aten.sub.Tensor, wide, constant("zeros", zero_point))
    return call(aten.mul.Tensor, wide, constant("scales", encoding.scale))
