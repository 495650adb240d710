# SPDX-License-Identifier: Apache-2.0
"""Linear, convolution and matrix products of two operands in levels: their exact form.

A product of levels is an integer. `product_form` says whether a node has such a form, with
which scale, and how large the integer can get; if not, it says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.bounds import (
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    contraction_length,
    dynamic_bound,
    static_bound,
)
from qgraph.backends.levels import Levels, is_blocked
from qgraph.formats import AffineEncoding
from qgraph.formats.base import along
from qgraph.graph.ops import OpKind, Product, argument, kind, product

aten = torch.ops.aten
# More groups than this and one product per group costs more than floats.
MAX_GROUPS = 16


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ProductForm:
    """An exact integer product.

    Attributes:
        node, what: the product and the positions of its operands.
        data, weight: how the operands' codes are read.
        weight_levels: int32 levels where the weight is constant, before `shift`.
        scale: fp32 ``s_x * s_w``, broadcastable against the output.
        bias_codes: int32 [C_out] added to the accumulator, or None.
        bias: node of a float bias added after materialisation, or None.
        shift: int64 [C] left shifts of the data's channels (power-of-two grouped scales).
        groups: channel indices of each group of free scales; empty if one accumulator does.
        group_scales: fp32 ``s_g * s_w`` of each group.
        bound: largest absolute partial sum.
    """

    node: Node
    what: Product
    data: Levels
    weight: Levels
    weight_levels: Tensor | None
    scale: Tensor
    bias_codes: Tensor | None = None
    bias: Node | None = None
    shift: Tensor | None = None
    groups: tuple[Tensor, ...] = ()
    group_scales: tuple[Tensor, ...] = field(default=())
    bound: int = 0

    @property
    def channel_axis(self) -> int:
        """Axis of the output channels, counted from the end or (convolutions) 1."""
        return 1 if kind(self.node) in {OpKind.CONV, OpKind.CONV_TRANSPOSE} else -1

    @property
    def exact_dtype(self) -> torch.dtype:
        """The floating dtype in which all partial sums are exact."""
        return torch.float32 if self.bound < FLOAT32_EXACT else torch.float64

    def call(self, data: Tensor, weight: Tensor) -> Tensor:
        """The op on other operands, without bias."""
        args = list(self.node.args)
        args[self.what.data], args[self.what.weight] = data, weight
        if self.what.bias is not None and self.what.bias < len(args):
            args[self.what.bias] = None
        kwargs = {k: v for k, v in self.node.kwargs.items() if k != "bias"}
        return self.node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def operands(node: Node) -> tuple[Node, Node, Node | None]:
    """Data, weight and bias nodes of a product."""
    what = product(node)
    assert what is not None
    bias = None if what.bias is None else argument(node, what.bias)
    data, weight = node.args[what.data], node.args[what.weight]
    assert isinstance(data, Node)
    assert isinstance(weight, Node)
    return data, weight, bias if isinstance(bias, Node) else None


def scaled_output(node: Node, data: Levels, weight: Levels) -> tuple[Tensor, str]:
    """fp32 ``s_x * s_w`` broadcastable against the output, or a reason why there is none."""
    what, ndim = product(node), node.meta["val"].ndim
    assert what is not None
    if kind(node) is OpKind.MATMUL:
        first, why = _matmul_scale(node, data, what.data, contracted=-1)
        second, reason = _matmul_scale(node, weight, what.weight, contracted=-2)
        return first * second, why or reason
    weight_ndim = _ndim(node, what.weight)
    if weight.axis is not None and weight.axis != what.weight_axis % weight_ndim:
        return weight.scale, "the weight's scales do not lie along its output channels"
    scale = weight.scale
    if kind(node) is OpKind.CONV_TRANSPOSE and scale.ndim:
        scale = scale.repeat(_groups(node))
    scale = _common_scale(data) * scale
    return along(scale, 1 if kind(node) is not OpKind.LINEAR else ndim - 1, ndim), ""


def _matmul_scale(node: Node, levels: Levels, position: int, contracted: int) -> tuple[Tensor, str]:
    """Scale of one operand of a matrix product, as it broadcasts in the output."""
    ndim, out = _ndim(node, position), node.meta["val"].ndim
    if levels.axis is None:
        return levels.scale, ""
    from_end = levels.axis - ndim
    if from_end == contracted:
        why = "" if position == 0 else "scales of the right operand lie along the contraction"
        return _common_scale(levels), why
    return along(levels.scale, out + from_end, out), ""


def _common_scale(data: Levels) -> Tensor:
    """The smallest scale; the levels of channels with a larger one are shifted up to it."""
    return data.scale if data.axis is None else data.scale.min()


def _ndim(node: Node, position: int) -> int:
    source = node.args[position]
    assert isinstance(source, Node)
    return int(source.meta["val"].ndim)


def _groups(node: Node) -> int:
    value: Any = argument(node, 6)
    return int(value)


def grouped(node: Node, data: Levels) -> tuple[Tensor | None, list[Tensor], str]:
    """Shifts, or channel groups, of a data operand with scales along the contraction."""
    what = product(node)
    assert what is not None
    if data.axis is None:
        return None, [], ""
    contraction = what.data_axis % _ndim(node, what.data)
    if data.axis != contraction:
        return None, [], "" if kind(node) is OpKind.MATMUL else "scales along a foreign axis"
    if kind(node) in {OpKind.CONV, OpKind.CONV_TRANSPOSE}:
        groups: Any = argument(node, 6)
        if int(groups) != 1:
            return None, [], "channel groups of scales in a grouped convolution"
    smallest = data.scale.min()
    shift = torch.round(torch.log2(data.scale.double() / smallest.double())).to(torch.int64)
    tied = smallest.double() * torch.pow(2.0, shift.double())
    if torch.equal(tied.to(torch.float32), data.scale) and int(shift.max()) <= 24:
        return shift, [], ""
    distinct = torch.unique(data.scale)
    if distinct.numel() > MAX_GROUPS:
        return None, [], f"{distinct.numel()} free scales along the contraction"
    return None, [torch.nonzero(data.scale == s).flatten() for s in distinct], ""


def product_form(
    node: Node, data: Levels, weight: Levels, codes: Tensor | None, bias: BiasForm
) -> ProductForm | str:
    """The exact form of a product, or the reason why it has none.

    Args:
        node: linear, convolution or matrix product.
        data, weight: how its operands are read.
        codes: the weight's codes where they are constant.
        bias: what is known of its bias.
    """
    what = product(node)
    assert what is not None
    if is_blocked(data.encoding) or is_blocked(weight.encoding):
        return "scales in blocks along an axis"
    shift, groups, why = grouped(node, data)
    if why:
        return why
    scale, why = scaled_output(node, data, weight)
    if why:
        return why
    if groups and codes is None:
        return "free channel groups against a computed operand"
    levels = None if codes is None else weight.of_codes(codes)
    bias_codes = bias.codes_on(scale) if not groups else None
    bound = _bound(node, data, weight, _shifted(node, levels, shift), bias_codes, shift)
    if bound >= FLOAT64_EXACT:
        return f"the accumulator may need {bound.bit_length() + 1} bits"
    group_scales = _group_scales(node, data, weight, groups)
    return ProductForm(
        node=node, what=what, data=data, weight=weight, weight_levels=levels, scale=scale,
        bias_codes=bias_codes, bias=None if bias_codes is not None else bias.node, shift=shift,
        groups=tuple(groups), group_scales=tuple(group_scales), bound=bound,
    )  # fmt: skip


def _group_scales(node: Node, data: Levels, weight: Levels, groups: list[Tensor]) -> list[Tensor]:
    scales = []
    for indices in groups:
        one = AffineEncoding(
            scale=data.scale[indices[0]], zero_point=torch.tensor(0), qmin=-1, qmax=1
        )
        scales.append(scaled_output(node, Levels(one, None), weight)[0])
    return scales


def contraction_axis_of_weight(node: Node, weight_ndim: int) -> int:
    """Axis of a constant weight that meets the data's channels."""
    match kind(node):
        case OpKind.MATMUL:
            return max(weight_ndim - 2, 0)
        case OpKind.CONV_TRANSPOSE:
            return 0
        case _:
            return 1


def shifted_weight(node: Node, levels: Tensor, shift: Tensor) -> Tensor:
    """Weight levels (int64) with the data's channel shifts moved onto them."""
    axis = contraction_axis_of_weight(node, levels.ndim)
    return levels.to(torch.int64) << along(shift, axis, levels.ndim)


def _shifted(node: Node, levels: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if levels is None or shift is None:
        return levels
    return shifted_weight(node, levels, shift)


def _bound(
    node: Node, data: Levels, weight: Levels, levels: Tensor | None, bias: Tensor | None,
    shift: Tensor | None,
) -> int:  # fmt: skip
    what = product(node)
    assert what is not None
    if levels is None:
        length = contraction_length(node, what.data)
        growth = 1 if shift is None else 1 << int(shift.max())
        start = 0 if bias is None else int(bias.to(torch.int64).abs().max())
        return growth * dynamic_bound(length, data.range(), weight.range()) + start
    return static_bound(*_with_outputs(what, levels), data.range(), bias)


def raw_bound(form: ProductForm, weight: Tensor) -> int:
    """Largest absolute sum of uint8 codes, zero points not yet taken off, times a weight."""
    return static_bound(*_with_outputs(form.what, weight), (0, 255), None)


def _with_outputs(what: Product, weight: Tensor) -> tuple[Tensor, int]:
    """A weight and its output axis; a vector is one column."""
    return (weight, what.weight_axis) if weight.ndim > 1 else (weight.unsqueeze(-1), -1)


@dataclass(frozen=True, slots=True, eq=False)
class BiasForm:
    """What is known of a bias.

    Attributes:
        node: its node, or None.
        codes: its codes where it is a dequantized constant.
        scale: their fp32 scale.
    """

    node: Node | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None

    def codes_on(self, scale: Tensor) -> Tensor | None:
        """The codes, if they lie on the accumulator's scale bit for bit."""
        if self.codes is None or self.scale is None:
            return None
        ours, theirs = scale.flatten(), self.scale.flatten()
        if ours.numel() != theirs.numel() and 1 not in {ours.numel(), theirs.numel()}:
            return None
        return self.codes if bool((ours == theirs).all()) else None
