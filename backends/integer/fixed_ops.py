# SPDX-License-Identifier: Apache-2.0
"""Which fixed-point function computes an ATen op; what has none becomes a float island."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends import fixed_point as fixed
from qgraph.graph.ops import argument

if TYPE_CHECKING:
    from qgraph.backends.integer.fixed_emitter import FixedEmitter

aten = torch.ops.aten
Lowering = Callable[["FixedEmitter", Node], Node | None]

# Smooth functions as tables of 2^16 segments over [-16, 16): (grows like x on the right).
TABLES: dict[Any, bool] = {
    aten.gelu.default: True, aten.silu.default: True, aten.mish.default: True,
    aten.softplus.default: True, aten.elu.default: True, aten.sigmoid.default: False,
    aten.tanh.default: False, aten.erf.default: False, aten.hardswish.default: True,
    aten.hardsigmoid.default: False,
}  # fmt: skip
TABLE_STEPS = 11  # fractional bits of a segment: 2^16 segments cover [-16, 16)


def table_of(node: Node) -> Tensor:
    """Fixed-point values of a function at the segment ends."""
    ends = torch.arange(2**16 + 1, dtype=torch.float64) - 2**15
    kwargs: dict[str, Any] = dict(node.kwargs)
    return fixed.to_fixed(node.target(ends / 2**TABLE_STEPS, *node.args[1:], **kwargs))  # type: ignore[operator]


def _table(emitter: FixedEmitter, node: Node) -> Node:
    x = emitter.plain(node.args[0])  # type: ignore[arg-type]
    table = emitter.buffer(f"{node.name}_table", table_of(node))
    return emitter.call(
        fixed.interpolate, x, table, TABLE_STEPS, grows=TABLES[node.target]
    )  # fmt: skip


def _periodic(emitter: FixedEmitter, node: Node) -> Node:
    turns = torch.arange(2**16 + 1, dtype=torch.float64) / 2**16
    table = fixed.to_fixed(node.target(turns * (2 * math.pi)))  # type: ignore[operator]
    tensors = (table, *fixed.factor(torch.tensor(1 / (2 * math.pi), dtype=torch.float64)))
    buffers = [emitter.buffer(f"{node.name}_table", tensor) for tensor in tensors]
    return emitter.call(fixed.periodic, emitter.plain(node.args[0]), *buffers)  # type: ignore[arg-type]


def _operands(emitter: FixedEmitter, node: Node) -> list[Any]:
    return [emitter.operand(item) for item in node.args[:2]]


def _add(emitter: FixedEmitter, node: Node) -> Node | None:
    a, b = _operands(emitter, node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return emitter.call(fixed.saturate, emitter.call(aten.add.Tensor, a, b))


def _sub(emitter: FixedEmitter, node: Node) -> Node | None:
    a, b = _operands(emitter, node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = (b, a) if node.target is aten.rsub.Scalar else (a, b)
    if not isinstance(first, Node):
        return emitter.call(fixed.saturate, emitter.call(aten.rsub.Scalar, second, first))
    return emitter.call(fixed.saturate, emitter.call(aten.sub.Tensor, first, second))


def _scaled(emitter: FixedEmitter, x: Node, real: float) -> Node:
    multiplier, shift = fixed.factor(torch.tensor(real))
    values = [emitter.buffer("factor", multiplier), emitter.buffer("shift", shift)]
    return emitter.call(fixed.saturate, emitter.call(fixed.rescale_wide, x, *values))


def _mul(emitter: FixedEmitter, node: Node) -> Node | None:
    for x, y in (node.args[:2], node.args[1::-1]):
        if isinstance(y, (int, float)) and isinstance(x, Node):
            return _scaled(emitter, emitter.plain(x), float(y)) if abs(y) < 2**29 else None
    a, b = _operands(emitter, node)
    return emitter.call(fixed.multiply, a, b)


def _div(emitter: FixedEmitter, node: Node) -> Node | None:
    a, b = node.args[:2]
    if "rounding_mode" in node.kwargs:
        return None
    if isinstance(b, (int, float)) and isinstance(a, Node):
        return _scaled(emitter, emitter.plain(a), 1 / b) if abs(b) > 2**-29 else None
    return emitter.call(fixed.divide, *_operands(emitter, node))


def _clamp(emitter: FixedEmitter, node: Node) -> Node | None:
    from qgraph.backends.semantics import clamp_bounds

    bounds = clamp_bounds(node)
    if bounds is None:
        return None
    low, high = (int(fixed.to_fixed(torch.tensor(b))) for b in bounds)
    return emitter.call(aten.clamp.default, emitter.plain(node.args[0]), low, high)  # type: ignore[arg-type]


def _leaky_relu(emitter: FixedEmitter, node: Node) -> Node:
    x = emitter.plain(node.args[0])  # type: ignore[arg-type]
    slope: Any = argument(node, 1)
    below = _scaled(emitter, emitter.call(aten.clamp_max.default, x, 0), float(slope))
    return emitter.call(aten.add.Tensor, emitter.call(aten.clamp_min.default, x, 0), below)


def _same(emitter: FixedEmitter, node: Node) -> Node:
    """Ops that mean the same on integers."""
    args, kwargs = emitter.arguments(node)
    return emitter.call(node.target, *args, **kwargs)


def _softmax(emitter: FixedEmitter, node: Node) -> Node:
    x, dim = emitter.plain(node.args[0]), node.args[1]  # type: ignore[arg-type]
    return emitter.call(fixed.softmax, x, dim, *emitter.exp_tables())


def _affine(emitter: FixedEmitter, y: Node, weight: Any, bias: Any, shape: list[int]) -> Node:
    for target, parameter in ((fixed.multiply, weight), (aten.add.Tensor, bias)):
        if isinstance(parameter, Node):
            operand = emitter.call(aten.reshape.default, emitter.plain(parameter), shape)
            y = emitter.call(target, y, operand)
    return y


def _layer_norm(emitter: FixedEmitter, node: Node) -> Node:
    dims: Any = list(range(-len(node.args[1]), 0))  # type: ignore[arg-type]
    eps: Any = argument(node, 4)
    y = emitter.call(fixed.normalize, emitter.plain(node.args[0]), dims, eps)  # type: ignore[arg-type]
    shape: Any = list(node.args[1])  # type: ignore[arg-type]
    return _affine(emitter, y, argument(node, 2), argument(node, 3), shape)


def _rms_norm(emitter: FixedEmitter, node: Node) -> Node:
    dims: Any = list(range(-len(node.args[1]), 0))  # type: ignore[arg-type]
    eps: Any = argument(node, 3)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    x = emitter.plain(node.args[0])  # type: ignore[arg-type]
    y = emitter.call(fixed.normalize, x, dims, eps, centred=False)
    shape: Any = list(node.args[1])  # type: ignore[arg-type]
    return _affine(emitter, y, argument(node, 2), None, shape)


def _group_norm(emitter: FixedEmitter, node: Node) -> Node:
    x, groups, eps = emitter.plain(node.args[0]), node.args[1], argument(node, 4)  # type: ignore[arg-type]
    flat = emitter.call(
        aten.reshape.default, x, [emitter.call(aten.sym_size.int, x, 0), groups, -1]
    )
    y = emitter.call(fixed.normalize, flat, [-1], eps)
    y = emitter.call(aten.reshape.default, y, emitter.call(torch.Tensor.size, x))
    ndim = node.meta["val"].ndim
    shape = [-1] + [1] * (ndim - 2)
    return _affine(emitter, y, argument(node, 2), argument(node, 3), shape)


def _mean(emitter: FixedEmitter, node: Node) -> Node:
    dims: Any = node.args[1]
    keepdim = bool(argument(node, 2))
    return emitter.call(fixed.mean, emitter.plain(node.args[0]), list(dims), keepdim=keepdim)  # type: ignore[arg-type]


def _adaptive(emitter: FixedEmitter, node: Node) -> Node | None:
    size: Any = node.args[1]
    if list(size) not in ([1, 1], [1]):
        return None
    return emitter.call(fixed.mean, emitter.plain(node.args[0]), [-2, -1], keepdim=True)  # type: ignore[arg-type]


def _avg_pool(emitter: FixedEmitter, node: Node) -> Node | None:
    """Sums of windows, one rounded division; windows that padding cuts are left to floats."""
    kernel, padding, ceil = (argument(node, i) for i in (1, 3, 4))
    sizes: Any = kernel
    whole = argument(node, 6) or sizes[0] * sizes[-1]
    padded: Any = padding
    if ceil or (any(padded) and not argument(node, 5)):
        return None
    x = emitter.plain(node.args[0])  # type: ignore[arg-type]
    total = emitter.call(
        aten.avg_pool2d.default, x, kernel, argument(node, 2) or kernel, padding, False, True, 1
    )
    multiplier, shift = fixed.factor(torch.tensor(1 / whole))  # type: ignore[operator]
    values = [emitter.buffer("factor", multiplier), emitter.buffer("shift", shift)]
    return emitter.call(fixed.rescale_wide, total, *values)


def _factors_are_ratios(node: Node) -> bool:
    """Whether scale factors are the ratios of the sizes; others round the result's size down."""
    source, *_, factors = node.args
    sizes = source.meta["val"].shape[2:]  # type: ignore[union-attr]
    return all(
        factor.is_integer() or (isinstance(size, int) and (size * factor).is_integer())
        for size, factor in zip(sizes, factors, strict=True)  # type: ignore[arg-type]
    )


def _resize(emitter: FixedEmitter, node: Node) -> Node | None:
    if node.args[1] is None and not _factors_are_ratios(node):
        return None
    x = emitter.plain(node.args[0])  # type: ignore[arg-type]
    size: Any = [emitter.size_of(node, axis) for axis in (2, 3)]
    if node.target is aten.upsample_nearest2d.vec:
        return emitter.call(fixed.nearest, x, size)
    return emitter.call(fixed.bilinear, x, size, corners=bool(node.args[2]))


def _masked_fill(emitter: FixedEmitter, node: Node) -> Node:
    x, mask, value = (emitter.operand(item) for item in node.args[:3])
    target = aten.masked_fill.Tensor if isinstance(value, Node) else aten.masked_fill.Scalar
    return emitter.call(target, x, mask, value)


def _where(emitter: FixedEmitter, node: Node) -> Node:
    condition, a, b = (emitter.operand(item) for item in node.args[:3])
    return emitter.call(torch.where, condition, a, b)


def _full_like(emitter: FixedEmitter, node: Node) -> Node:
    x, value = emitter.operand(node.args[0]), emitter.operand(node.args[1])
    return emitter.call(aten.full_like.default, x, value, dtype=torch.int64)


def _to(emitter: FixedEmitter, node: Node) -> Node | None:
    """Masks and integers that become floats."""
    source: Any = node.args[0]
    x: Node = emitter.plain(source)
    if source.meta["val"].is_floating_point():
        return x
    wide = emitter.call(aten.to.dtype, x, torch.int64)
    return emitter.call(aten.__lshift__.Scalar, wide, fixed.FRACTION)


def _sqrt(emitter: FixedEmitter, node: Node) -> Node:
    return emitter.call(fixed.square_root, emitter.plain(node.args[0]))  # type: ignore[arg-type]


def _abs_like(emitter: FixedEmitter, node: Node) -> Node:
    return emitter.call(node.target, emitter.plain(node.args[0]))  # type: ignore[arg-type]


LOWERINGS: dict[Any, Lowering] = {
    **dict.fromkeys(TABLES, _table),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _add),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar), _sub),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _div),
    **dict.fromkeys(
        (
            aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default,
            aten.clamp_min.default, aten.clamp_max.default,
        ),
        _clamp,
    ),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _softmax),
    **dict.fromkeys((aten.abs.default, aten.neg.default), _abs_like),
    **dict.fromkeys(
        (
            aten.cat.default, aten.max_pool2d.default, aten.amax.default, aten.amin.default,
            aten.maximum.default, aten.minimum.default, aten.stack.default, aten.embedding.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec), _resize
    ),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), _to),
    aten.leaky_relu.default: _leaky_relu,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive,
    aten.avg_pool2d.default: _avg_pool,
    aten.full_like.default: _full_like,
    aten.sqrt.default: _sqrt,
    aten.sin.default: _periodic,
    aten.cos.default: _periodic,
}  # fmt: skip
