# SPDX-License-Identifier: Apache-2.0
"""Operands wider than 8 bits as sums of 8-bit planes: ``x = sum_p 256^p x_p``.

Each pair of planes is one int8 product; the products are added up in float64, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.bounds import FLOAT32_EXACT, total_range
from qgraph.backends.integer.values import Coded
from qgraph.backends.products import ProductForm
from qgraph.formats import AffineEncoding
from qgraph.graph.ops import OpKind, kind

if TYPE_CHECKING:
    from qgraph.backends.integer.emitter import Emitter

aten = torch.ops.aten
# More int8 products than this, and one float64 product is quicker.
MAX_PRODUCTS = 3
MAX_DIGITS = 8  # of an int64

# (data in uint8, its zero point, int8 weight) -> float32 sums
Kernel = Callable[[Node, int, Tensor], Node]


def digits(values: Tensor) -> list[Tensor]:
    """Digits of integers to base 256, each in -128 ... 127, lowest first (int64)."""
    rest = values.to(torch.int64)
    found: list[Tensor] = []
    for _ in range(MAX_DIGITS):
        low = ((rest + 128) & 255) - 128
        found.append(low)
        rest = (rest - low) >> 8
        if not bool(rest.any()):
            break
    return found


def wide_product(
    emitter: Emitter, form: ProductForm, data: Coded, weight: Tensor, kernel: Kernel
) -> tuple[Node, int] | None:
    """float32 sums of a product with wide operands, and how many int8 products it took.

    None where an operand has no planes, they are too many, or a sum leaves float32's integers.
    """
    planes = data_planes(emitter, form, data)
    weights = digits(weight)
    if not planes or len(planes) * len(weights) > MAX_PRODUCTS:
        return None
    terms: list[tuple[int, Node, int, Tensor]] = []
    for p, (node, zero) in enumerate(planes):
        for q, digit in enumerate(weights):
            sums = total_range(digit, 0, (-zero, 255 - zero))
            if max(float(s.abs().max()) for s in sums) >= FLOAT32_EXACT:
                return None
            terms.append((p + q, node, zero, digit.to(torch.int8)))
    total: Node | None = None
    for power, node, zero, digit in terms:
        part = emitter.arithmetic(aten.to.dtype, kernel(node, zero, digit), torch.float64)
        if power:
            part = emitter.arithmetic(aten.mul.Tensor, part, 256**power)
        total = part if total is None else emitter.arithmetic(aten.add.Tensor, total, part)
    start = _start(form, data, weight)
    if bool(start.any()):
        shape = [-1] if form.channel_axis == -1 else [-1] + [1] * (weight.ndim - 2)
        bias = emitter.buffer(f"{form.node.name}_bias", start.to(torch.float64).view(shape))
        total = emitter.arithmetic(aten.add.Tensor, total, bias)
    return emitter.arithmetic(aten.to.dtype, total, torch.float32), len(terms)


def _start(form: ProductForm, data: Coded, weight: Tensor) -> Tensor:
    """Bias codes, and the correction of zero points that differ by channel (int64 [N])."""
    start = torch.zeros(weight.shape[0], dtype=torch.int64)
    if form.bias_codes is not None:
        start = start + form.bias_codes
    if form.data.axis is not None:
        assert isinstance(form.data.encoding, AffineEncoding)
        zero = form.data.encoding.zero_point + data.storage.offset
        start = start - (zero * weight.to(torch.int64)).sum(1)
    return start


def data_planes(emitter: Emitter, form: ProductForm, data: Coded) -> list[tuple[Node, int]]:
    """Planes of the data: uint8 nodes and the zero point of each, which padding also takes."""
    encoding = form.data.encoding
    if form.data.axis is not None:
        linear = kind(form.node) is not OpKind.CONV and data.storage.dtype is torch.uint8
        return [(data.node, 0)] if linear else []
    key = ("planes", data.node)
    if key in emitter.memo:
        planes: list[tuple[Node, int]] = emitter.memo[key]
        return planes
    if not isinstance(encoding, AffineEncoding):
        planes = [
            (emitter.lookup("plane", (digit + 128).to(torch.uint8), data.node), 128)
            for digit in digits(encoding.table().reshape(-1))
        ]
    elif data.storage.dtype is torch.uint8:
        planes = [(data.node, int(encoding.zero_point) + data.storage.offset)]
    else:
        planes = _bytes(emitter, data, int(encoding.zero_point))
    emitter.memo[key] = planes
    return planes


def _bytes(emitter: Emitter, data: Coded, zero: int) -> list[tuple[Node, int]]:
    """Low byte, and the rest shifted into uint8, of 16-bit codes and of their zero point."""
    lift = 128 if data.storage.dtype is torch.int16 else 0
    low = emitter.call(aten.bitwise_and.Scalar, data.node, 255)
    high = emitter.call(aten.__rshift__.Scalar, data.node, 8)
    if lift:
        high = emitter.call(aten.add.Tensor, high, lift)
    return [
        (emitter.call(aten.to.dtype, low, torch.uint8), zero & 255),
        (emitter.call(aten.to.dtype, high, torch.uint8), (zero >> 8) + lift),
    ]
