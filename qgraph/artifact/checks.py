# SPDX-License-Identifier: Apache-2.0
"""What a quantized graph must satisfy beyond being readable: parameters and codes in range."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from qgraph.artifact.damage import as_damage, damaged
from qgraph.errors import QGraphError
from qgraph.formats import AffineEncoding, Encoding, code_dtype
from qgraph.formats.levels import rank_dtype
from qgraph.graph.build import attribute
from qgraph.graph.dialect import DEQUANTIZE, encoding_of, is_dequantize, is_quantize


def check_quantizers(module: GraphModule) -> None:
    """Check scales, zero points, tables and stored codes of all quantizers.

    Raises:
        ArtifactError: naming the node.
    """
    checked: set[tuple[object, ...]] = set()
    for node in module.graph.nodes:
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        key = tuple(str(a) for a in (*node.args[1:], *node.kwargs.items()))
        stored = node.args[0] if is_dequantize(node) and node.args else None
        codes = stored if isinstance(stored, Node) and stored.op == "get_attr" else None
        if codes is None and key in checked:
            continue  # many nodes share one quantizer
        checked.add(key)
        _check(module, node, codes)


def _check(module: GraphModule, node: Node, codes: Node | None) -> None:
    kinds = (QGraphError, KeyError, TypeError, ValueError, RuntimeError, AttributeError)
    with as_damage(f"quantizer {node.name} is malformed", *kinds):
        encoding = encoding_of(module, node)
        if isinstance(encoding, AffineEncoding):
            low, high = encoding.qmin, encoding.qmax
        else:
            low, high = 0, encoding.table().shape[-1] - 1
        if not -(2**31) <= low < high < 2**31:
            raise damaged(f"quantizer {node.name} has the code range {low}..{high}")
        _check_parameters(module, node, encoding)
        if codes is not None:
            _check_codes(node, attribute(module, str(codes.target)), low, high)


def _check_parameters(module: GraphModule, node: Node, encoding: Encoding) -> None:
    """Encodings convert what they are given; a file holds what they convert to."""
    names = [argument.name for argument in cast("OpOverload", node.target)._schema.arguments]
    for name, argument in {**dict(zip(names, node.args, strict=False)), **node.kwargs}.items():
        wanted = getattr(encoding, name, None)
        if isinstance(wanted, Tensor) and isinstance(argument, Node):
            stored = attribute(module, str(argument.target))
            if stored.dtype != wanted.dtype:
                raise damaged(f"{node.name} has {name} in {stored.dtype}, not {wanted.dtype}")


def _check_codes(node: Node, codes: Tensor, low: int, high: int) -> None:
    expected = code_dtype(low, high) if node.target is DEQUANTIZE else rank_dtype(high + 1)
    if codes.dtype != expected:
        raise damaged(f"{node.name} reads codes of dtype {codes.dtype}, not {expected}")
    if not codes.numel():
        return
    least, most = (int(x) for x in codes.aminmax())
    if least < low or most > high:
        raise damaged(f"{node.name} reads codes {least}..{most}, allowed are {low}..{high}")
