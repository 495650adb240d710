# SPDX-License-Identifier: Apache-2.0
"""Exact rewrites of the quantized graph that let onnxruntime use integer kernels.

Quantizers move up through max pooling, pixel shuffles and concatenation (quantization is
monotone and elementwise, so the codes stay the same), until they sit behind the convolution
that makes the value. Transposed convolutions, for which no integer kernel exists, become a
convolution with one output channel per phase, and a pixel shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.formats import AffineEncoding
from qgraph.graph import dialect
from qgraph.graph.build import attribute, insert_buffer, insert_call
from qgraph.graph.edges import in_edges

aten = torch.ops.aten
# quantize(f(x)) = f(quantize(x)) for these: they pick or move elements, and order is kept.
_COMMUTING = frozenset(
    {aten.max_pool2d.default, aten.max_pool1d.default, aten.pixel_shuffle.default}
)


def place(module: GraphModule) -> None:
    """Apply the rewrites, in place."""
    for node in list(module.graph.nodes):
        if node.target is aten.conv_transpose2d.input:
            _transposed_to_phases(module, node)
    pending = [n for n in module.graph.nodes if n.target is dialect.QUANTIZE]
    while pending:
        pending.extend(_raise(module, pending.pop()))
    module.graph.eliminate_dead_code()


def _raise(module: GraphModule, node: Node) -> list[Node]:
    """Move one quantizer up one step; returns the quantizers that may move further."""
    source = node.args[0]
    encoding = dialect.encoding_of(module, node)
    if not isinstance(source, Node) or not isinstance(encoding, AffineEncoding):
        return []
    if (
        encoding.axis is not None
        or encoding.zero_point.ndim
        or not _only_this(module, source, node)
    ):
        return []
    if source.target in _COMMUTING:
        operands = [source.args[0]]
    elif source.target is aten.cat.default:
        operands = [e.source for e in in_edges(source)]
    else:
        return []
    quantized = {o: _quantize_before(module, node, o) for o in dict.fromkeys(operands)}
    first: Any = (
        [quantized[o] for o in operands] if source.target is aten.cat.default
        else quantized[operands[0]]
    )  # fmt: skip
    moved = insert_call(
        module,
        source.target,
        first,
        *source.args[1:],
        like=source,
        before=node,
        **source.kwargs,
    )
    node.replace_all_uses_with(moved)
    module.graph.erase_node(node)
    if not source.users:
        module.graph.erase_node(source)
    return [n for n in quantized.values() if n.target is dialect.QUANTIZE]


def _only_this(module: GraphModule, source: Node, node: Node) -> bool:
    """Whether nothing reads the value in float and no second encoding is asked of it."""
    return all(u is node or _same(module, u, node) for u in source.users)


def _same(module: GraphModule, other: Node, node: Node) -> bool:
    if other.target is not dialect.QUANTIZE:
        return False
    mine, theirs = (dialect.encoding_of(module, n) for n in (node, other))
    assert isinstance(mine, AffineEncoding)
    assert isinstance(theirs, AffineEncoding)
    return (
        mine.axis == theirs.axis and (mine.qmin, mine.qmax) == (theirs.qmin, theirs.qmax)
        and torch.equal(mine.scale, theirs.scale)
        and torch.equal(mine.zero_point, theirs.zero_point)
    )  # fmt: skip


def _quantize_before(module: GraphModule, node: Node, value: Any) -> Node:
    """The quantizer of `value` with the encoding of `node`: one that exists, or a new one."""
    if value.target is dialect.DEQUANTIZE and _same_decode(module, value, node):
        return value.args[0]  # type: ignore[no-any-return]
    for user in value.users:
        if user is not node and _same(module, user, node) and user < node:
            return user  # type: ignore[no-any-return]
    return insert_call(module, dialect.QUANTIZE, value, *node.args[1:], like=node, before=node)


def _same_decode(module: GraphModule, value: Node, node: Node) -> bool:
    """Whether `value` decodes codes of the very encoding asked for (then codes pass through)."""
    mine, theirs = dialect.encoding_of(module, node), dialect.encoding_of(module, value)
    assert isinstance(mine, AffineEncoding)
    assert isinstance(theirs, AffineEncoding)
    same_codes = (mine.qmin, mine.qmax, mine.axis) == (theirs.qmin, theirs.qmax, theirs.axis)
    return same_codes and torch.equal(mine.scale, theirs.scale) and torch.equal(
        mine.zero_point, theirs.zero_point
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phases:
    """A transposed convolution of one axis, seen as a convolution per output phase.

    Output position ``s*m + r`` reads input ``m + shift(r, j)`` through tap ``tap(r, j)``.

    Attributes:
        kernel: taps of the equal convolution.
        before, after: its padding.
        taps: (phase, tap of the equal convolution, tap of the transposed one).
    """

    kernel: int
    before: int
    after: int
    taps: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int) -> Phases:
        """Phases of a transposed convolution whose output is `stride` times as long."""
        found = [
            (phase, (phase + padding) // stride - j, (phase + padding) % stride + stride * j)
            for phase in range(stride)
            for j in range(-(-kernel // stride))
            if (phase + padding) % stride + stride * j < kernel
        ]
        low, high = min(s for _, s, _ in found), max(s for _, s, _ in found)
        low, high = min(low, 0), max(high, 0)
        return cls(high - low + 1, -low, high, tuple((r, s - low, t) for r, s, t in found))


def _transposed_to_phases(module: GraphModule, node: Node) -> None:
    """``conv_transpose2d(dq, dq weight, bias)`` to conv2d and pixel_shuffle: the same products."""
    data, weight, bias, stride, padding, extra, groups, dilation = _arguments(node)
    if not (dialect.is_dequantize(data) and dialect.is_dequantize(weight)):
        return
    encoding = dialect.encoding_of(module, weight)
    codes = weight.args[0]
    if not isinstance(encoding, AffineEncoding) or codes.op != "get_attr" or groups != 1:
        return
    if stride[0] != stride[1] or dilation != [1, 1] or encoding.block is not None:
        return
    kernel = list(weight.meta["val"].shape[2:])
    if any(k + e != 2 * p + s for k, e, p, s in zip(kernel, extra, padding, stride, strict=True)):
        return
    if encoding.axis not in {None, 1} or not encoding.is_symmetric:
        return
    rows, columns = (Phases.of(k, s, p) for k, s, p in zip(kernel, stride, padding, strict=True))
    if (rows.before, columns.before) != (rows.after, columns.after):
        return
    phases = stride[0] * stride[1]
    spread = phase_weights(attribute(module, str(codes.target)), rows, columns, stride[0])
    new_weight = _decode_new(module, node, weight, spread, encoding, phases)
    new_bias = _repeat_bias(module, node, bias, phases)
    if bias is not None and new_bias is None:
        return
    product = insert_call(
        module, aten.conv2d.default, data, new_weight, new_bias, [1, 1],
        [rows.before, columns.before], like=node, before=node,
    )  # fmt: skip
    shuffled = insert_call(
        module, aten.pixel_shuffle.default, product, stride[0], like=node, before=node
    )
    node.replace_all_uses_with(shuffled)
    module.graph.erase_node(node)


def _arguments(node: Node) -> tuple[Any, ...]:
    defaults = (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    given = (*node.args, *defaults[len(node.args) :])
    pairs = [_pair(given[i]) for i in (3, 4, 5, 7)]
    return (*given[:3], pairs[0], pairs[1], pairs[2], given[6], pairs[3])


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] * (2 // len(value))


def phase_weights(codes: Tensor, rows: Phases, columns: Phases, stride: int) -> Tensor:
    """Weights [C_in, C_out, k, k] as [C_out * s * s, C_in, K, K], absent taps zero."""
    c_in, c_out = codes.shape[:2]
    new = codes.new_zeros(c_out, stride, stride, c_in, rows.kernel, columns.kernel)
    for row_phase, row, row_tap in rows.taps:
        for column_phase, column, column_tap in columns.taps:
            new[:, row_phase, column_phase, :, row, column] = codes[:, :, row_tap, column_tap].T
    return new.flatten(0, 2)


def _decode_new(
    module: GraphModule,
    node: Node,
    old: Node,
    codes: Tensor,
    encoding: AffineEncoding,
    repeats: int,
) -> Node:
    """A dequantize node of repeated channels, axis 0, that mirrors `old`."""
    scale, zero, axis = encoding.scale, encoding.zero_point, None
    if scale.ndim:
        scale, zero, axis = scale.repeat_interleave(repeats), zero.repeat_interleave(repeats), 0
    stored = insert_buffer(module, f"{old.name}_phases", codes, before=node)
    parameters = [
        insert_buffer(module, f"{old.name}_{what}", tensor, before=node)
        for what, tensor in (("scale", scale), ("zero", zero))
    ]
    return insert_call(
        module, dialect.DEQUANTIZE, stored, *parameters, encoding.qmin, encoding.qmax, axis,
        like=node, before=node,
    )  # fmt: skip


def _repeat_bias(module: GraphModule, node: Node, bias: Any, repeats: int) -> Node | None:
    if not isinstance(bias, Node):
        return None
    if bias.op == "get_attr":
        values = attribute(module, str(bias.target)).repeat_interleave(repeats)
        return insert_buffer(module, f"{bias.target}_phases", values, before=node)
    encoding = dialect.encoding_of(module, bias) if bias.target is dialect.DEQUANTIZE else None
    codes = bias.args[0] if encoding is not None else None
    if (
        not isinstance(encoding, AffineEncoding)
        or not isinstance(codes, Node)
        or codes.op != "get_attr"
    ):
        return None
    repeated = attribute(module, str(codes.target)).repeat_interleave(repeats)
    return _decode_new(module, node, bias, repeated, encoding, repeats)
