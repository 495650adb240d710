# SPDX-License-Identifier: Apache-2.0
"""The fastest exact kernel of a product, chosen from its static bound.

uint8 codes x int8 weights     oneDNN int8 kernel; float32(acc) where bias fits 2^24
                               torch._int_mm in int32 where it does not
everything else                float32 below 2^24, float64 below 2^53: both exact
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.bounds import FLOAT32_EXACT, INT32_LIMIT, total_range
from qgraph.backends.integer.kernels import (
    CONV_U8,
    LINEAR_I32,
    LINEAR_U8,
    has_exact_u8_kernels,
    pack_conv,
    pack_linear,
)
from qgraph.backends.integer.planes import wide_product
from qgraph.backends.integer.values import Coded, KernelChoice
from qgraph.backends.products import (
    ProductForm,
    contraction_axis_of_weight,
    raw_bound,
    shifted_weight,
)
from qgraph.formats import AffineEncoding
from qgraph.formats.base import along
from qgraph.graph.ops import OpKind, argument, kind

if TYPE_CHECKING:
    from qgraph.backends.integer.emitter import Emitter

aten = torch.ops.aten


def choose(emitter: Emitter, form: ProductForm) -> KernelChoice:
    """Emit the product with the fastest exact kernel."""
    if form.weight_levels is None:
        return _dynamic_float(emitter, form)
    weight = form.weight_levels
    if form.shift is not None:
        weight = shifted_weight(form.node, weight, form.shift)
    data = emitter.coded(_operand(form, form.what.data), form.data.encoding)
    why = _not_u8(form, data, weight)
    choice = _planes(emitter, form, data, weight, why) if why else None
    if not why:
        choice, why = _u8(emitter, form, data, weight), "no int8 kernel for this op"
    return choice or _static_float(emitter, form, data, weight, why)


def _planes(
    emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor, why: str
) -> KernelChoice | None:
    if not has_exact_u8_kernels() or form.scale.device.type != "cpu":
        return None
    node, kernel = form.node, None
    if kind(node) is OpKind.LINEAR or (kind(node) is OpKind.MATMUL and weight.ndim == 2):
        weight = weight if kind(node) is OpKind.LINEAR else weight.t()

        def kernel(x: Node, zero: int, plane: Tensor) -> Node:
            packed = emitter.buffer(f"{node.name}_weight", pack_linear(plane))
            ones = _unit_scales(emitter, plane.shape[0])
            return emitter.arithmetic(LINEAR_U8, x, packed, *ones, None, zero)
    elif kind(node) is OpKind.CONV and weight.ndim == 4:

        def kernel(x: Node, zero: int, plane: Tensor) -> Node:
            return _conv_call(emitter, form, x, plane, None, zero)

    if kernel is None:
        return None
    found = wide_product(emitter, form, data, weight, kernel)
    if found is None:
        return None
    return KernelChoice(found[0], f"onednn u8s8 x {found[1]} planes", why)


def _operand(form: ProductForm, position: int) -> Node:
    node = form.node.args[position]
    assert isinstance(node, Node)
    return node


def _not_u8(form: ProductForm, data: Coded, weight: Tensor) -> str:
    """Why the int8 kernels do not apply, or ''."""
    if not has_exact_u8_kernels() or form.scale.device.type != "cpu":
        return "no exact int8 kernels on this machine"
    if data.storage.dtype is not torch.uint8 or not isinstance(form.data.encoding, AffineEncoding):
        return f"operand is {form.data.encoding.describe()}"
    if int(weight.min()) < -128 or int(weight.max()) > 127:
        return "weight levels exceed int8"
    if form.bound + raw_bound(form, weight) >= INT32_LIMIT:
        return "accumulator exceeds int32"
    return ""


def _stored_zero(form: ProductForm, data: Coded) -> Tensor:
    assert isinstance(form.data.encoding, AffineEncoding)
    return form.data.encoding.zero_point + data.storage.offset


def _u8(emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor) -> KernelChoice | None:
    match kind(form.node):
        case OpKind.LINEAR:
            return _linear(emitter, form, data, weight)
        case OpKind.MATMUL if weight.ndim == 2:
            return _linear(emitter, form, data, weight.t())
        case OpKind.CONV if weight.ndim in {3, 4} and form.data.axis is None:
            return _conv(emitter, form, data, weight)
        case OpKind.CONV_TRANSPOSE if weight.ndim == 4 and form.data.axis is None:
            return _upsampling(emitter, form, data, weight)
        case _:
            return None


def _linear(emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor) -> KernelChoice:
    """[..., K] x [N, K]."""
    name, zero = form.node.name, _stored_zero(form, data)
    start = torch.zeros(weight.shape[0], dtype=torch.int64)
    if form.bias_codes is not None:
        start = start + form.bias_codes
    number = 0
    if form.data.axis is None:
        number, total = int(zero.reshape(-1)[0]), total_range(weight, 0, form.data.range())
    else:  # zero points differ by channel: the kernel sums raw codes
        start = start - (zero * weight.to(torch.int64)).sum(1)
        total = total_range(weight, 0, (0, 255))
    if not _fits_float32(total, start):
        # x - z = (x ^ 128) + 128 - z on int8 codes; the constant goes into the bias.
        correction = ((128 - number) * weight.to(torch.int64)).sum(1) + start
        accumulator = emitter.arithmetic(
            LINEAR_I32, data.node,
            emitter.buffer(f"{name}_weight", weight.t().contiguous().to(torch.int8)),
            emitter.buffer(f"{name}_bias", correction.to(torch.int32)),
        )  # fmt: skip
        wide = emitter.arithmetic(aten.to.dtype, accumulator, torch.float32)
        return KernelChoice(wide, "_int_mm", "sums beyond 2^24 start from an int32 bias")
    bias = emitter.buffer(f"{name}_bias", start.float()) if bool(start.any()) else None
    accumulator = emitter.arithmetic(
        LINEAR_U8, data.node, emitter.buffer(f"{name}_weight", pack_linear(weight.to(torch.int8))),
        *_unit_scales(emitter, weight.shape[0]), bias, number,
    )  # fmt: skip
    return KernelChoice(accumulator, "onednn qlinear u8s8", "8-bit codes")


def _fits_float32(total: tuple[Tensor, Tensor], bias: Tensor) -> bool:
    """Whether ``float32(sum) + float32(bias)`` is the exact sum rounded once."""
    if not bool(bias.any()):
        return True
    start = bias.to(torch.float64)
    parts = (start, *total, total[0] + start, total[1] + start)
    return all(float(part.abs().max()) < FLOAT32_EXACT for part in parts)


def _unit_scales(emitter: Emitter, channels: int) -> tuple[Node, Node]:
    key = ("unit", channels)
    if key not in emitter.memo:
        emitter.memo[key] = (
            emitter.buffer(f"ones_{channels}", torch.ones(channels)),
            emitter.buffer(f"zeros_{channels}", torch.zeros(channels, dtype=torch.int64)),
        )
    pair: tuple[Node, Node] = emitter.memo[key]
    return pair


def _pair(value: Any, fill: int | None = None) -> list[int]:
    """Numbers of both axes; `fill` stands in front of those of one axis alone."""
    numbers = [value] if isinstance(value, int) else list(value)
    if fill is not None:
        return [fill, *numbers]
    return numbers * 2 if len(numbers) == 1 else numbers


def _conv(emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor) -> KernelChoice | None:
    flat = weight.ndim == 3
    if flat:
        weight = weight.unsqueeze(2)
    zero = int(_stored_zero(form, data).reshape(-1)[0])
    x = emitter.call(aten.unsqueeze.default, data.node, 2) if flat else data.node
    bias = torch.zeros(1) if form.bias_codes is None else form.bias_codes
    total = total_range(weight, 0, form.data.range())
    if _fits_float32(total, bias):
        start = bias.float() if form.bias_codes is not None else None
        accumulator: Node | None = _conv_call(emitter, form, x, weight, start, zero)
        reason = "8-bit codes"
    else:
        accumulator = _conv_in_int32(emitter, form, x, weight, zero)
        reason = "summed in int32 over slices of the channels"
    if accumulator is None:
        return None
    if flat:
        accumulator = emitter.call(aten.squeeze.dim, accumulator, 2)
    return KernelChoice(accumulator, "onednn qconv u8s8", reason)


def _conv_call(
    emitter: Emitter, form: ProductForm, x: Node, weight: Tensor, bias: Tensor | None, zero: int
) -> Node:
    """[B, C, H, W] x [N, C/groups, kh, kw]."""
    node, flat = form.node, form.node.meta["val"].ndim == 3
    stride, padding, dilation = (
        _pair(argument(node, i), fill if flat else None) for i, fill in ((3, 1), (4, 0), (5, 1))
    )
    groups: Any = argument(node, 6)
    packed = pack_conv(weight.to(torch.int8), zero, stride, padding, dilation, int(groups))
    start = None if bias is None else emitter.buffer(f"{node.name}_bias", bias)
    return emitter.arithmetic(
        CONV_U8, x, emitter.buffer(f"{node.name}_weight", packed),
        *_unit_scales(emitter, weight.shape[0]), start, zero, list(weight.shape[2:]),
        stride, padding, dilation, int(groups),
    )  # fmt: skip


def _upsampling(
    emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor
) -> KernelChoice | None:
    """A transposed convolution whose windows do not overlap: 1 x 1, then pixel shuffle."""
    node, size = form.node, weight.shape[2]
    stride, padding, extra, dilation = (_pair(argument(node, i)) for i in (3, 4, 5, 7))
    tiled = stride == [size, size] == list(weight.shape[2:]) and dilation == [1, 1]
    if not tiled or any(padding) or any(extra) or argument(node, 6) != 1:
        return None
    flat = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
    bias = torch.zeros(1) if form.bias_codes is None else form.bias_codes
    start = bias.repeat_interleave(size * size) if form.bias_codes is not None else bias
    if not _fits_float32(total_range(flat, 0, form.data.range()), start):
        return None
    one, none = [1, 1], [0, 0]
    zero = int(_stored_zero(form, data).reshape(-1)[0])
    packed = pack_conv(flat.to(torch.int8), zero, one, none, one, 1)
    phases = emitter.arithmetic(
        CONV_U8, data.node, emitter.buffer(f"{node.name}_weight", packed),
        *_unit_scales(emitter, flat.shape[0]),
        emitter.buffer(f"{node.name}_bias", start.float()) if bool(start.any()) else None,
        zero, one, one, none, one, 1,
    )  # fmt: skip
    accumulator = emitter.call(aten.pixel_shuffle.default, phases, size)
    return KernelChoice(accumulator, "onednn qconv u8s8 + shuffle", "windows do not overlap")


def _conv_in_int32(
    emitter: Emitter, form: ProductForm, x: Node, weight: Tensor, zero: int
) -> Node | None:
    """Slices of channels whose sums float32 holds, added up in int32 together with the bias."""
    groups: Any = argument(form.node, 6)
    assert form.bias_codes is not None
    slices = _channel_slices(weight, form.data.range())
    if slices is None or (len(slices) > 1 and int(groups) != 1):
        return None
    total = None
    for start, stop in slices:
        part = x
        if len(slices) > 1:
            part = emitter.call(aten.slice.Tensor, x, 1, start, stop)
        partial = _conv_call(emitter, form, part, weight[:, start:stop], None, zero)
        wide = emitter.arithmetic(aten.to.dtype, partial, torch.int32)
        total = wide if total is None else emitter.arithmetic(aten.add.Tensor, total, wide)
    bias = emitter.buffer(f"{form.node.name}_bias", form.bias_codes.view(-1, 1, 1))
    summed = emitter.arithmetic(aten.add.Tensor, total, bias)
    return emitter.arithmetic(aten.to.dtype, summed, torch.float32)


def _channel_slices(weight: Tensor, data: tuple[int, int]) -> list[tuple[int, int]] | None:
    """Few slices of input channels whose complete sums stay below 2^24; None if there are none."""
    channels = weight.shape[1]
    for count in range(1, channels + 1):
        edges = [round(i * channels / count) for i in range(count + 1)]
        slices = list(itertools.pairwise(edges))
        if all(
            max(float(v.abs().max()) for v in total_range(weight[:, a:b], 0, data)) < FLOAT32_EXACT
            for a, b in slices
        ):
            return slices
    return None


def _static_float(
    emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor, why: str
) -> KernelChoice:
    node, dtype = form.node, form.exact_dtype
    source = _operand(form, form.what.data)
    x = emitter.levels(data, form.data, source.meta["val"].ndim, dtype)
    w = emitter.buffer(f"{node.name}_weight", weight.to(dtype))
    accumulator = _with(emitter, form, x, w, _bias(emitter, form))
    return _float_choice(emitter, form, accumulator, why)


def _bias(emitter: Emitter, form: ProductForm) -> Node | None:
    if form.bias_codes is None:
        return None
    return emitter.buffer(f"{form.node.name}_bias", form.bias_codes.to(form.exact_dtype))


def _dynamic_float(emitter: Emitter, form: ProductForm) -> KernelChoice:
    operands = []
    for position, levels in ((form.what.data, form.data), (form.what.weight, form.weight)):
        source = _operand(form, position)
        coded = emitter.coded(source, levels.encoding)
        ndim = source.meta["val"].ndim
        x = emitter.levels(coded, levels, ndim, form.exact_dtype)
        if position == form.what.data and form.shift is not None:
            growth = torch.pow(2.0, form.shift.double()).to(form.exact_dtype)
            factor = emitter.buffer("shift", along(growth, form.what.data_axis % ndim, ndim))
            x = emitter.call(aten.mul.Tensor, x, factor)
        operands.append(x)
    accumulator = _with(emitter, form, operands[0], operands[1], _bias(emitter, form))
    return _float_choice(emitter, form, accumulator, "both operands are computed")


def _with(emitter: Emitter, form: ProductForm, data: Node, weight: Node, bias: Node | None) -> Node:
    """The product's own op on other operands."""
    args = list(form.node.args)
    args[form.what.data], args[form.what.weight] = data, weight
    if form.what.bias is not None:
        if form.what.bias < len(args):
            args[form.what.bias] = bias
        elif bias is not None:
            args.append(bias)
    return emitter.arithmetic(form.node.target, *args)


def _float_choice(emitter: Emitter, form: ProductForm, accumulator: Node, why: str) -> KernelChoice:
    if form.exact_dtype is torch.float32:
        return KernelChoice(accumulator, "float32 on levels", why)
    narrow = emitter.arithmetic(aten.to.dtype, accumulator, torch.float32)
    return KernelChoice(narrow, "float64 on levels", why)


def group_choices(emitter: Emitter, form: ProductForm) -> list[KernelChoice]:
    """One product per group of channels: the group's weights, zeros elsewhere."""
    assert form.weight_levels is not None
    axis = contraction_axis_of_weight(form.node, form.weight_levels.ndim)
    data = emitter.coded(_operand(form, form.what.data), form.data.encoding)
    choices = []
    for indices in form.groups:
        mask = torch.zeros(form.weight_levels.shape[axis], dtype=torch.int32)
        mask = along(mask.index_fill_(0, indices, 1), axis, form.weight_levels.ndim)
        weight = form.weight_levels * mask
        why = _not_u8(form, data, weight) or "grouped"
        choice = None if why != "grouped" else _u8(emitter, form, data, weight)
        choices.append(choice or _static_float(emitter, form, data, weight, why))
    return choices


def of_groups(choices: list[KernelChoice]) -> KernelChoice:
    """What reports say of a product by groups: each kernel, each reason once."""
    kernels, reasons = ({getattr(c, name): None for c in choices} for name in ("kernel", "reason"))
    return KernelChoice(choices[0].accumulator, ", ".join(kernels), "; ".join(reasons))
