# SPDX-License-Identifier: Apache-2.0
"""Products of the fixed-point mode: integer accumulators, no float dtype anywhere.

    int8 codes x int8 weights     torch._int_mm
    everything else               the op itself on int32, or int64 where the bound asks for it

The reference computes the same accumulators in float64 and turns them into integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.bounds import INT32_LIMIT
from qgraph.backends.integer.kernels import LINEAR_I32
from qgraph.backends.integer.values import Coded, KernelChoice
from qgraph.backends.products import ProductForm, raw_bound, shifted_weight
from qgraph.formats import AffineEncoding
from qgraph.formats.base import along
from qgraph.graph.ops import OpKind, kind

if TYPE_CHECKING:
    from qgraph.backends.integer.fixed_emitter import FixedEmitter

aten = torch.ops.aten


def choose_fixed(
    emitter: FixedEmitter, form: ProductForm, mask: Tensor | None = None
) -> KernelChoice:
    """Emit a product; `mask` keeps the weights of one group of channels."""
    if form.weight_levels is None:
        return _general(emitter, form, None)
    weight = form.weight_levels
    if form.shift is not None:
        weight = shifted_weight(form.node, weight, form.shift)
    if mask is not None:
        weight = weight * mask
    data = emitter.coded(form.node.args[form.what.data], form.data.encoding)  # type: ignore[arg-type]
    if not emitter.exact_floats and _is_int8(form, data, weight):
        return _int_mm(emitter, form, data, weight)
    return _general(emitter, form, weight)


def _is_int8(form: ProductForm, data: Coded, weight: Tensor) -> bool:
    is_linear = kind(form.node) is OpKind.LINEAR or (
        kind(form.node) is OpKind.MATMUL and weight.ndim == 2
    )
    return (
        is_linear
        and isinstance(form.data.encoding, AffineEncoding)
        and data.storage.dtype is torch.uint8
        and int(weight.min()) >= -128
        and int(weight.max()) <= 127
        and 2 * (form.bound + raw_bound(form, weight)) < INT32_LIMIT
    )


def _int_mm(emitter: FixedEmitter, form: ProductForm, data: Coded, weight: Tensor) -> KernelChoice:
    if kind(form.node) is OpKind.MATMUL:
        weight = weight.t()
    assert isinstance(form.data.encoding, AffineEncoding)
    zero = form.data.encoding.zero_point + data.storage.offset
    start = ((128 - zero) * weight.to(torch.int64)).sum(1)
    if form.bias_codes is not None:
        start = start + form.bias_codes
    name = form.node.name
    accumulator = emitter.call(
        LINEAR_I32, data.node,
        emitter.buffer(f"{name}_weight", weight.t().contiguous().to(torch.int8)),
        emitter.buffer(f"{name}_bias", start.to(torch.int32)),
    )  # fmt: skip
    return KernelChoice(accumulator, "_int_mm", "8-bit codes")


def _general(emitter: FixedEmitter, form: ProductForm, weight: Tensor | None) -> KernelChoice:
    """The op itself on levels, in float64 for the reference, else in int32 or int64."""
    dtype = torch.int32 if form.bound < INT32_LIMIT else torch.int64
    if emitter.exact_floats:
        dtype = torch.float64
    operands: list[Node] = []
    for position, levels in ((form.what.data, form.data), (form.what.weight, form.weight)):
        source = form.node.args[position]
        assert isinstance(source, Node)
        if position == form.what.weight and weight is not None:
            operands.append(emitter.buffer(f"{form.node.name}_weight", weight.to(dtype)))
            continue
        coded = emitter.coded(source, levels.encoding)
        x = emitter.levels(coded, levels, source.meta["val"].ndim, dtype)
        if position == form.what.data and form.shift is not None and weight is None:
            ndim = source.meta["val"].ndim
            growth = along(1 << form.shift, form.what.data_axis % ndim, ndim).to(dtype)
            x = emitter.call(aten.mul.Tensor, x, emitter.buffer("shift", growth))
        operands.append(x)
    args = list(form.node.args)
    args[form.what.data], args[form.what.weight] = operands
    if form.what.bias is not None and form.what.bias < len(args):
        args[form.what.bias] = None
    accumulator = emitter.call(_target(form, dtype), *args)
    if form.bias_codes is not None:
        shape = [-1] + [1] * ((form.node.meta["val"].ndim - 2) if form.channel_axis == 1 else 0)
        bias = emitter.buffer(f"{form.node.name}_bias", form.bias_codes.to(dtype).view(shape))
        accumulator = emitter.call(aten.add.Tensor, accumulator, bias)
    if emitter.exact_floats:
        accumulator = emitter.call(aten.to.dtype, accumulator, torch.int64)
    return KernelChoice(accumulator, f"{str(dtype).removeprefix('torch.')} on levels", "general")


def _target(form: ProductForm, dtype: torch.dtype) -> Any:
    """The op, or its spelling for integers: ATen has no dilated or transposed integer kernels."""
    if dtype is torch.float64:
        return form.node.target
    if kind(form.node) is OpKind.CONV:
        return convolve
    return convolve_transposed if kind(form.node) is OpKind.CONV_TRANSPOSE else form.node.target


def spread(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Insert ``step - 1`` zeros between neighbours along the axes behind the second."""
    if all(step == 1 for step in steps):
        return x
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], steps, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in steps))
    wide[places] = x
    return wide


def _each(value: Any, count: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else [int(v) for v in value]
    return numbers * count if len(numbers) == 1 else numbers


def convolve(
    x: Tensor, weight: Tensor, bias: None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Integer convolution (1-D or 2-D); dilation spreads the weights."""
    del bias
    axes = x.ndim - 2
    weight = spread(weight, _each(dilation, axes))
    function = torch.conv1d if axes == 1 else torch.conv2d
    return function(x, weight, None, _each(stride, axes), _each(padding, axes), 1, groups)


def convolve_transposed(
    x: Tensor, weight: Tensor, bias: None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """Integer transposed convolution: a convolution of the spread input, weights mirrored."""
    del bias
    axes = x.ndim - 2
    pads, extra = _each(padding, axes), _each(output_padding, axes)
    weight = spread(weight, _each(dilation, axes))
    inputs, per_group = weight.shape[:2]
    split = weight.reshape(groups, inputs // groups, per_group, *weight.shape[2:])
    mirrored = split.transpose(1, 2).reshape(
        groups * per_group, inputs // groups, *weight.shape[2:]
    )
    mirrored = mirrored.flip(list(range(2, 2 + axes)))
    borders: list[int] = []
    for axis in reversed(range(axes)):
        reach = weight.shape[2 + axis] - 1 - pads[axis]
        borders += [reach, reach + extra[axis]]
    padded = torch.nn.functional.pad(spread(x, _each(stride, axes)), borders)
    return convolve(padded, mirrored, groups=groups)
