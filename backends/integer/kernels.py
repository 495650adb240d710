# SPDX-License-Identifier: Apache-2.0
"""Integer kernels as registered ops: exact accumulators of uint8 codes and int8 weights.

`linear_u8` and `conv_u8` give ``float32(acc)`` from oneDNN's int8 kernels with unit scales, the
zero point handled inside; `linear_i32` gives int32 through `torch._int_mm`. Whether this
machine's kernels are exact (16-bit pair sums saturate without VNNI) is probed once, not assumed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("qgraph", "FRAGMENT")
_LIBRARY.define(
    "linear_u8(Tensor x, Tensor packed, Tensor ones, Tensor zeros, Tensor? bias, int zero_point)"
    " -> Tensor"
)
_LIBRARY.define("linear_i32(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_LIBRARY.define("lookup(Tensor table, Tensor index) -> Tensor")
_LIBRARY.define(
    "conv_u8(Tensor x, Tensor packed, Tensor ones, Tensor zeros, Tensor? bias, int zero_point,"
    " SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups) -> Tensor"
)


def pack_linear(weight: Tensor) -> Tensor:
    """int8 [N, K] weight in the layout of `linear_u8`."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def pack_conv(
    weight: Tensor, zero_point: int, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """int8 [N, C/groups, kh, kw] weight in the layout of `conv_u8`."""
    ones = torch.ones(weight.shape[0])
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight.contiguous(), ones, 1.0, zero_point, stride, padding, dilation, groups, None
    )
    return packed


def _linear_u8(
    x: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor, bias: Tensor | None, zero_point: int
) -> Tensor:
    accumulator: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero_point, packed, ones, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return accumulator


def _linear_i32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    signed = x.bitwise_xor(128).view(torch.int8)
    return torch._int_mm(signed.reshape(-1, x.shape[-1]), weight).add_(bias).view(
        *x.shape[:-1], weight.shape[1]
    )  # fmt: skip


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    if _is_channels_last(index):
        return _lookup(table, index.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.index_select(table, 0, index.reshape(-1).to(torch.int32)).view(index.shape)


def _is_channels_last(index: Tensor) -> bool:
    """The one layout besides the plain one that a lookup keeps."""
    last = index.is_contiguous(memory_format=torch.channels_last)
    return last and not index.is_contiguous()


def _conv_u8(  # noqa: PLR0913, PLR0917 - the op's schema
    x: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor, bias: Tensor | None, zero_point: int,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    del kernel
    x = x.contiguous(memory_format=torch.channels_last)
    accumulator: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x, 1.0, zero_point, packed, ones, zeros, bias, stride, padding, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return accumulator


for _name, _kernel in (
    ("linear_u8", _linear_u8), ("linear_i32", _linear_i32), ("conv_u8", _conv_u8),
    ("lookup", _lookup),
):  # fmt: skip
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("qgraph::linear_u8")
def _linear_u8_meta(
    x: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor, bias: Tensor | None, zero_point: int
) -> Tensor:
    del packed, zeros, bias, zero_point
    return x.new_empty((*x.shape[:-1], ones.shape[0]), dtype=torch.float32)


@torch.library.register_fake("qgraph::linear_i32")
def _linear_i32_meta(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    del bias
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=torch.int32)


@torch.library.register_fake("qgraph::lookup")
def _lookup_meta(table: Tensor, index: Tensor) -> Tensor:
    last = _is_channels_last(index)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(index, dtype=table.dtype, memory_format=layout)


@torch.library.register_fake("qgraph::conv_u8")
def _conv_u8_meta(  # noqa: PLR0913, PLR0917 - the op's schema
    x: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor, bias: Tensor | None, zero_point: int,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    del packed, zeros, bias, zero_point, groups
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    out = x.new_empty((x.shape[0], ones.shape[0], *sizes), dtype=torch.float32)
    return out.to(memory_format=torch.channels_last)


LINEAR_U8 = torch.ops.qgraph.linear_u8.default
LINEAR_I32 = torch.ops.qgraph.linear_i32.default
LOOKUP = torch.ops.qgraph.lookup.default
CONV_U8 = torch.ops.qgraph.conv_u8.default


@functools.cache
def has_exact_u8_kernels() -> bool:
    """Whether oneDNN's int8 kernels exist here and do not saturate 16-bit pair sums."""
    zero, unit = 3, [1, 1]
    weight = torch.full((16, 8, 3, 3), 127, dtype=torch.int8)  # pairs of the largest products
    image = torch.full_like(weight, 255, dtype=torch.uint8)
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    x, matrix = image.flatten(1), weight.flatten(1)
    try:
        y = _linear_u8(x, pack_linear(matrix), ones, zeros, None, zero)
        packed = pack_conv(weight, zero, unit, unit, unit, 1)
        size = [*weight.shape[-2:]]
        z = _conv_u8(image, packed, ones, zeros, None, zero, size, unit, unit, unit, 1)
    except (RuntimeError, AttributeError):
        return False
    products = (x.double() - zero) @ matrix.double().T
    sums = torch.conv2d(image.double() - zero, weight.double(), None, unit, unit, unit)
    return torch.equal(y.double(), products) and torch.equal(z.double(), sums)
