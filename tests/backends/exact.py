# SPDX-License-Identifier: Apache-2.0
"""One product of two coded operands as a graph, and what it is in float64, which is exact here.

All scales are powers of two, so results of both integer modes can be compared bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends import integer, reference
from qgraph.backends.integer import ExplainRow
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.ops import OpKind, kind
from tests.backends.single_ops import SingleOp

Coded = tuple[Tensor, Encoding]
SCALE = 2.0**-10


def coded(qmin: int, qmax: int, zero: int = 0) -> AffineEncoding:
    """One scale and zero point for the tensor."""
    return AffineEncoding(
        scale=torch.tensor(SCALE), zero_point=torch.tensor(zero), qmin=qmin, qmax=qmax
    )


def by_axis(count: int, axis: int, qmin: int = -128, qmax: int = 127) -> AffineEncoding:
    """Zero point 0, scales that halve from channel to channel."""
    scale = SCALE * 2.0 ** -(torch.arange(count) % 4)
    return AffineEncoding(
        scale=scale, zero_point=torch.zeros(count), qmin=qmin, qmax=qmax, axis=axis
    )


def table(*levels: int) -> LevelEncoding:
    """Levels of their own."""
    return LevelEncoding.nearest("any", torch.tensor(SCALE), torch.tensor(levels), storage_bits=8)


def drawn(encoding: Encoding, shape: tuple[int, ...], seed: int) -> Tensor:
    """Codes of the whole range, both ends among them."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(encoding, AffineEncoding):
        low, high = encoding.qmin, encoding.qmax
    else:
        low, high = 0, encoding.table().shape[-1] - 1
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    codes.view(-1)[0], codes.view(-1)[-1] = low, high
    return codes


def levels(codes: Tensor, encoding: Encoding) -> Tensor:
    """float64 integers, in units of the smallest scale."""
    if isinstance(encoding, LevelEncoding):
        return encoding.levels[codes.long()].double()
    assert isinstance(encoding, AffineEncoding)
    shape = [1] * codes.ndim
    zero, scale = encoding.zero_point.double(), encoding.scale.double()
    if encoding.axis is not None:
        shape[encoding.axis] = -1
        zero, scale = zero.view(shape), (scale / scale.min()).view(shape)
        return (codes.double() - zero) * scale
    return codes.double() - zero


def product_of(
    target: Any, data: Coded, weight: Coded, bias: Tensor | None = None,
    rest: tuple[Any, ...] = (), *, fixed: bool = True,
) -> GraphModule:  # fmt: skip
    """``op(dequantize(data), dequantize(weight), dequantize(bias), *rest)``; codes come in."""
    builder = SingleOp()
    return builder.finish(insert_product(builder, target, data, weight, bias, rest, fixed=fixed))


def insert_product(
    builder: SingleOp, target: Any, data: Coded, weight: Coded, bias: Tensor | None = None,
    rest: tuple[Any, ...] = (), *, fixed: bool = True,
) -> Node:  # fmt: skip
    """The same in a graph that goes on."""
    nodes = [builder.placeholder("data", data[0])]
    if not fixed:
        nodes.append(builder.placeholder("weight", weight[0]))
    if fixed:
        nodes.append(builder.buffer("weight", weight[0]))
    args: list[Any] = [
        decode(builder, nodes[0], "data", data[1]), decode(builder, nodes[1], "weight", weight[1]),
    ]  # fmt: skip
    if bias is not None:
        scale = data[1].scale.min() * weight[1].scale
        grid = AffineEncoding(
            scale=scale, zero_point=torch.zeros_like(scale), qmin=-(2**31), qmax=2**31 - 1,
            axis=0 if scale.ndim else None,
        )  # fmt: skip
        stored = builder.buffer("bias", bias.to(torch.int32))
        args.append(builder.call(DEQUANTIZE, stored, *parameters(builder, "bias", grid)))
    elif rest:
        args.append(None)
    return builder.call(target, *args, *rest)


def encode(builder: SingleOp, value: Node, name: str, encoding: Encoding) -> Node:
    """A quantize node."""
    op = QUANTIZE if isinstance(encoding, AffineEncoding) else QUANTIZE_LEVELS
    return builder.call(op, value, *parameters(builder, name, encoding))


def decode(builder: SingleOp, codes: Node, name: str, encoding: Encoding) -> Node:
    """A dequantize node."""
    op = DEQUANTIZE if isinstance(encoding, AffineEncoding) else DEQUANTIZE_LEVELS
    return builder.call(op, codes, *parameters(builder, name, encoding))


def parameters(builder: SingleOp, name: str, encoding: Encoding) -> tuple[Any, ...]:
    if isinstance(encoding, AffineEncoding):
        block = () if encoding.block is None else (encoding.block,)
        return (*builder.parameters(name, encoding), *block)
    assert isinstance(encoding, LevelEncoding)
    buffers = {"scale": encoding.scale, "levels": encoding.levels, "cuts": encoding.thresholds}
    nodes = [builder.buffer(f"{name}_{what}", value) for what, value in buffers.items()]
    axis = () if encoding.axis is None else (encoding.axis,)
    return (*nodes, encoding.name, encoding.storage_bits, *axis)


def accumulator(
    target: Any, data: Coded, weight: Coded, bias: Tensor | None = None,
    rest: tuple[Any, ...] = (),
) -> Tensor:  # fmt: skip
    """The sums themselves (float64, integers)."""
    plain = weight[1]
    if isinstance(plain, AffineEncoding) and plain.axis is not None:  # its scales come afterwards
        plain = coded(plain.qmin, plain.qmax)
    args: list[Any] = [levels(*data), levels(weight[0], plain)]
    args += [None, *rest] if rest else []
    found: Tensor = target(*args)
    if bias is not None:
        found = found + bias.double().view(_channels(target, found.ndim))
    return found


def _channels(target: Any, ndim: int) -> list[int]:
    name = str(target)
    return [-1] + [1] * (ndim - 2) if "conv" in name else [-1]


def values(
    target: Any, data: Coded, weight: Coded, bias: Tensor | None = None,
    rest: tuple[Any, ...] = (),
) -> Tensor:  # fmt: skip
    """``float32(sum) * (s_x s_w)``."""
    sums = accumulator(target, data, weight, bias, rest)
    scale = data[1].scale.min() * weight[1].scale
    if scale.ndim:
        scale = scale.view(_channels(target, sums.ndim))
    return sums.float() * scale


def row_of(module: GraphModule, mode: Any = "onnxruntime") -> ExplainRow:
    """What `explain` says of the graph's product."""
    lowered = integer.lower(module, mode=mode)
    kinds = {OpKind.LINEAR, OpKind.MATMUL, OpKind.CONV, OpKind.CONV_TRANSPOSE}
    (node,) = [n.name for n in module.graph.nodes if isinstance(n, Node) and kind(n) in kinds]
    (row,) = [r for r in lowered.explain() if r.node == node]
    return row


def check(
    target: Any, data: Coded, weight: Coded, bias: Tensor | None = None,
    rest: tuple[Any, ...] = (), *, fixed: bool = True,
) -> tuple[ExplainRow, ExplainRow]:  # fmt: skip
    """All backends give the exact product; returns the rows of both integer modes."""
    module = product_of(target, data, weight, bias, rest, fixed=fixed)
    inputs = (data[0],) if fixed else (data[0], weight[0])
    wanted = values(target, data, weight, bias, rest)
    for mode in ("onnxruntime", "fixed_point"):
        found = integer.lower(module, mode=mode)(*inputs)[0]
        assert found.dtype is torch.float32
        assert torch.equal(found, wanted), mode
    assert torch.equal(reference.lower(module)(*inputs)[0], wanted)
    return row_of(module), row_of(module, "fixed_point")
