# SPDX-License-Identifier: Apache-2.0
"""Convolutions in the forms for which onnxruntime has integer kernels; all exact.

* a transposed convolution: a convolution with its output channels once per phase, interleaved
* patches (kernel = stride) whose result stays float: a linear over the patches, since QLinearConv
  needs an output quantizer and QGemm does not
* a result read in two encodings: one convolution for each, since QLinearConv has one output
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

aten = torch.ops.aten


def is_open(node: Node) -> bool:
    """Whether something reads the convolution's result in float."""
    return not node.users or any(user.target is not dialect.QUANTIZE for user in node.users)


def one_per_encoding(module: GraphModule, node: Node) -> None:
    """Give every quantizer behind a quantized convolution a convolution of its own.

    onnxruntime merges equal nodes before it fuses, so the twins must differ: they name the
    axis of their weight or bias from the other end.
    """
    data, weight, bias = (*node.args, None)[:3]
    if not (dialect.is_dequantize(data) and dialect.is_dequantize(weight)):
        return
    places = [p for p, v in ((2, bias), (1, weight)) if _has_axis(module, v)]
    variants = [places[:1], places[1:], places[:2]][: 2 ** len(places) - 1]
    for user, variant in zip(list(node.users)[1:], variants, strict=False):
        arguments = list(node.args)
        for place in variant:
            arguments[place] = _axis_from_end(module, node, arguments[place])
        twin = insert_call(module, node.target, *arguments, like=node, before=user)  # type: ignore[arg-type]
        user.replace_input_with(node, twin)


def _has_axis(module: GraphModule, value: Any) -> bool:
    return bool(
        dialect.is_dequantize(value) and dialect.encoding_of(module, value).axis is not None
    )


def _axis_from_end(module: GraphModule, node: Node, value: Any) -> Node:
    """The same dequantize node, its axis written as a negative number."""
    arguments = list(value.args)
    arguments[5] = arguments[5] - value.meta["val"].ndim
    return insert_call(module, value.target, *arguments, like=value, before=node)


def patches_to_linear(module: GraphModule, node: Node) -> None:
    """``conv2d`` with kernel = stride and no padding: permuted codes, a linear, permuted back."""
    data, weight, bias, stride, padding, dilation, groups = _conv_arguments(node)
    if not (dialect.is_dequantize(data) and dialect.is_dequantize(weight)):
        return
    x, w = dialect.encoding_of(module, data), dialect.encoding_of(module, weight)
    kernel = list(weight.meta["val"].shape[2:])
    size = list(data.meta["val"].shape)
    if kernel != stride or padding != [0, 0] or dilation != [1, 1] or groups != 1:
        return
    if not all(isinstance(s, int) for s in size[1:]) or any(
        s % k for s, k in zip(size[2:], kernel, strict=True)
    ):
        return
    if not isinstance(x, AffineEncoding) or x.scale.ndim or not isinstance(w, AffineEncoding):
        return
    codes = weight.args[0]
    if codes.op != "get_attr" or w.axis not in {None, 0} or w.block is not None:
        return
    flat = insert_buffer(
        module, f"{codes.target}_flat", attribute(module, str(codes.target)).flatten(1), before=node
    )
    matrix = insert_call(
        module, dialect.DEQUANTIZE, flat, *weight.args[1:], like=weight, before=node
    )
    rows, columns = size[2] // kernel[0], size[3] // kernel[1]
    patches = _patches(module, node, data, (rows, columns), kernel)
    product = insert_call(
        module, aten.linear.default, patches, matrix, bias, like=node, before=node
    )
    image = insert_call(
        module, aten.reshape.default, product, [-1, rows, columns, int(flat.meta["val"].shape[0])],
        like=node, before=node,
    )  # fmt: skip
    new = insert_call(module, aten.permute.default, image, [0, 3, 1, 2], like=node, before=node)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _patches(
    module: GraphModule, node: Node, data: Node, grid: tuple[int, int], kernel: list[int]
) -> Node:
    """Dequantized patches [B * rows * columns, C * k * k]: the codes move, then are decoded."""
    channels = int(data.meta["val"].shape[1])
    codes, *parameters = data.args

    def moved(target: Any, *args: Any) -> None:
        nonlocal codes
        codes = insert_call(module, target, codes, *args, like=node, before=node)

    if kernel == [1, 1]:  # one permutation, so that onnxruntime can cancel it with its own
        moved(aten.permute.default, [0, 2, 3, 1])
    else:
        moved(aten.reshape.default, [-1, channels, grid[0], kernel[0], grid[1], kernel[1]])
        moved(aten.permute.default, [0, 2, 4, 1, 3, 5])
    moved(aten.reshape.default, [-1, channels * kernel[0] * kernel[1]])
    return insert_call(module, dialect.DEQUANTIZE, codes, *parameters, like=node, before=node)


def _conv_arguments(node: Node) -> tuple[Any, ...]:
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    given: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
    padding = [-1, -1] if isinstance(given[4], str) else _pair(given[4])
    return (*given[:3], _pair(given[3]), padding, _pair(given[5]), given[6])


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


def transposed_to_phases(module: GraphModule, node: Node) -> None:
    """``conv_transpose2d(dq, dq weight, bias)`` to conv2d and moves: the same products."""
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
    if not all(isinstance(d, int) for d in node.meta["val"].shape[1:]):
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
    node.replace_all_uses_with(_interleaved(module, node, product, stride[0]))
    module.graph.erase_node(node)


def _interleaved(module: GraphModule, node: Node, product: Node, stride: int) -> Node:
    """Phases [B, s * s * C, H, W] to [B, C, H * s, W * s], by way of channels last.

    Channels stay together while the phases move, which is a copy of rows; a pixel shuffle
    would move single bytes.
    """
    _, channels, height, width = node.meta["val"].shape
    steps: list[tuple[Any, list[Any]]] = [
        (aten.permute.default, [0, 2, 3, 1]),
        (aten.reshape.default, [-1, height // stride, width // stride, stride, stride, channels]),
        (aten.permute.default, [0, 1, 3, 2, 4, 5]),
        (aten.reshape.default, [-1, height, width, channels]),
        (aten.permute.default, [0, 3, 1, 2]),
    ]
    value = product
    for target, argument in steps:
        value = insert_call(module, target, value, argument, like=node, before=node)
    return value


def _arguments(node: Node) -> tuple[Any, ...]:
    defaults = (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    given = (*node.args, *defaults[len(node.args) :])
    pairs = [_pair(given[i]) for i in (3, 4, 5, 7)]
    return (*given[:3], pairs[0], pairs[1], pairs[2], given[6], pairs[3])


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] * (2 // len(value))


def phase_weights(codes: Tensor, rows: Phases, columns: Phases, stride: int) -> Tensor:
    """Weights [C_in, C_out, k, k] as [s * s * C_out, C_in, K, K], absent taps zero."""
    c_in, c_out = codes.shape[:2]
    new = codes.new_zeros(stride, stride, c_out, c_in, rows.kernel, columns.kernel)
    for row_phase, row, row_tap in rows.taps:
        for column_phase, column, column_tap in columns.taps:
            new[row_phase, column_phase, :, :, row, column] = codes[:, :, row_tap, column_tap].T
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
        scale, zero, axis = scale.repeat(repeats), zero.repeat(repeats), 0
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
        values = attribute(module, str(bias.target)).repeat(repeats)
        return insert_buffer(module, f"{bias.target}_phases", values, before=node)
    encoding = dialect.encoding_of(module, bias) if bias.target is dialect.DEQUANTIZE else None
    codes = bias.args[0] if encoding is not None else None
    if (
        not isinstance(encoding, AffineEncoding)
        or not isinstance(codes, Node)
        or codes.op != "get_attr"
    ):
        return None
    repeated = attribute(module, str(codes.target)).repeat(repeats)
    return _decode_new(module, node, bias, repeated, encoding, repeats)
