# SPDX-License-Identifier: Apache-2.0
"""The dialect: registered ops that carry quantization in a graph.

    qgraph::quantize          affine codes of a float tensor
    qgraph::dequantize        values of affine codes
    qgraph::quantize_levels   ranks in a table of levels
    qgraph::dequantize_levels values of such ranks

Arguments alone define the meaning: scales, zero points and tables are buffers of the graph
module, code ranges are literals. An op and its inverse take the same parameters, so
`encoding_of` reads a quantizer back from either node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.errors import PassError
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding, code_dtype
from qgraph.formats.affine import affine_decode, affine_encode
from qgraph.formats.levels import levels_decode, levels_encode, rank_dtype
from qgraph.graph.ops import argument

_AFFINE = "Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis=None, int? block=None"
_LEVELS = "Tensor scale, Tensor levels, Tensor thresholds, str format, int bits, int? axis=None"

_LIBRARY = torch.library.Library("qgraph", "DEF")
_LIBRARY.define(f"quantize(Tensor x, {_AFFINE}) -> Tensor")
_LIBRARY.define(f"dequantize(Tensor codes, {_AFFINE}) -> Tensor")
_LIBRARY.define(f"quantize_levels(Tensor x, {_LEVELS}) -> Tensor")
_LIBRARY.define(f"dequantize_levels(Tensor codes, {_LEVELS}) -> Tensor")


def _settled(values: Tensor) -> Tensor:
    """The same memory, with strides of axes of size 1 that follow from the others.

    Such a stride means nothing, yet convolutions choose their kernel by it, so that values would
    round differently for where their quantizer stands among moves. The fake kernels do without:
    whoever reads their strides passes over axes of size 1.
    """
    if 1 not in values.shape:
        return values
    strides = list(values.stride())
    for axis in reversed(range(values.ndim)):
        if values.shape[axis] == 1:
            last = axis == values.ndim - 1
            strides[axis] = 1 if last else strides[axis + 1] * values.shape[axis + 1]
    return values.as_strided(values.shape, strides)


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int,
    axis: int | None = None, block: int | None = None,
) -> Tensor:  # fmt: skip
    return affine_encode(x, scale, zero_point, qmin, qmax, axis, block)


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int,
    axis: int | None = None, block: int | None = None,
) -> Tensor:  # fmt: skip
    del qmin, qmax
    return _settled(affine_decode(codes, scale, zero_point, axis, block))


def _quantize_levels(
    x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, format: str, bits: int,  # noqa: A002
    axis: int | None = None,
) -> Tensor:  # fmt: skip
    del levels, format, bits
    return levels_encode(x, scale, thresholds, axis)


def _dequantize_levels(
    codes: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, format: str, bits: int,  # noqa: A002
    axis: int | None = None,
) -> Tensor:  # fmt: skip
    del thresholds, format, bits
    return _settled(levels_decode(codes, scale, levels, axis))


for _name, _kernel in (
    ("quantize", _quantize),
    ("dequantize", _dequantize),
    ("quantize_levels", _quantize_levels),
    ("dequantize_levels", _dequantize_levels),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("qgraph::quantize")
def _quantize_meta(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *_: Any, **__: Any
) -> Tensor:
    del scale, zero_point
    return torch.empty_like(x, dtype=code_dtype(qmin, qmax))


@torch.library.register_fake("qgraph::quantize_levels")
def _quantize_levels_meta(x: Tensor, scale: Tensor, levels: Tensor, *_: Any, **__: Any) -> Tensor:
    del scale
    return torch.empty_like(x, dtype=rank_dtype(levels.shape[-1]))


@torch.library.register_fake("qgraph::dequantize")
@torch.library.register_fake("qgraph::dequantize_levels")
def _dequantize_meta(codes: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


QUANTIZE = torch.ops.qgraph.quantize.default
DEQUANTIZE = torch.ops.qgraph.dequantize.default
QUANTIZE_LEVELS = torch.ops.qgraph.quantize_levels.default
DEQUANTIZE_LEVELS = torch.ops.qgraph.dequantize_levels.default
QUANTIZERS = frozenset({QUANTIZE, QUANTIZE_LEVELS})
DEQUANTIZERS = frozenset({DEQUANTIZE, DEQUANTIZE_LEVELS})


def is_quantize(node: object) -> bool:
    """Whether the node turns values into codes."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in QUANTIZERS


def is_dequantize(node: object) -> bool:
    """Whether the node turns codes into values."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in DEQUANTIZERS


def quantizer_of(operand: object) -> Node | None:
    """The quantize node behind a dequantized operand; None for float ones and stored codes."""
    source = operand.args[0] if isinstance(operand, Node) and is_dequantize(operand) else None
    return source if isinstance(source, Node) and is_quantize(source) else None


def result_dtype(node: Node) -> torch.dtype | None:
    """Dtype of a dialect op's result, which has the sizes of its input; None for other ops."""
    if node.target in DEQUANTIZERS:
        return torch.float32
    if node.target is QUANTIZE:
        return code_dtype(argument(node, 3), argument(node, 4))  # type: ignore[arg-type]
    return None


def buffer(module: GraphModule, argument: Any, reader: Node) -> Tensor:
    """The tensor behind a get_attr argument of `reader`.

    Raises:
        PassError: the argument is not a get_attr node.
    """
    if not isinstance(argument, Node) or argument.op != "get_attr":
        msg = f"{reader.name}: quantizer parameters must be buffers, got {argument!r}"
        raise PassError(msg, node=reader.name)
    value: Any = module
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def encoding_of(module: GraphModule, node: Node) -> Encoding:
    """Read the encoding of a quantize or dequantize node.

    Raises:
        PassError: the node is neither, or its parameters are not buffers.
    """
    if not (is_quantize(node) or is_dequantize(node)):
        msg = f"{node.name} ({node.target}) is neither a quantize nor a dequantize node"
        raise PassError(msg, node=node.name)
    args: dict[str, Any] = dict(
        zip((a.name for a in node.target._schema.arguments), node.args, strict=False)  # type: ignore[union-attr]
    )
    args.update(node.kwargs)
    scale = buffer(module, args["scale"], node)
    if node.target in {QUANTIZE, DEQUANTIZE}:
        return AffineEncoding(
            scale=scale, zero_point=buffer(module, args["zero_point"], node),
            qmin=args["qmin"], qmax=args["qmax"], axis=args.get("axis"), block=args.get("block"),
        )  # fmt: skip
    return LevelEncoding(
        name=args["format"], scale=scale, levels=buffer(module, args["levels"], node),
        thresholds=buffer(module, args["thresholds"], node), storage_bits=args["bits"],
        axis=args.get("axis"),
    )  # fmt: skip
