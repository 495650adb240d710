# SPDX-License-Identifier: Apache-2.0
"""Folding per-channel affine maps into the product before them.

BatchNorm at inference is ``y = x * f + b`` per channel, with ``f = gamma / sqrt(var + eps)`` and
``b = beta - mean * f``; after a convolution it moves into weight and bias. Where it cannot, it
becomes a plain mul and add, which is also how frozen batch norms and layer scales are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.build import attribute, insert_buffer, insert_call
from qgraph.graph.normalize_ops import only_first_result
from qgraph.graph.ops import argument
from qgraph.graph.sizes import rank_of, shape_of

aten = torch.ops.aten

_CONVS = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
})  # fmt: skip
_TRANSPOSED = frozenset({
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
})  # fmt: skip
_NORMS = frozenset({
    aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default, aten.cudnn_batch_norm.default,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Affine:
    """``y = x * factor + shift``; float64 vectors of one entry per channel.

    Attributes:
        dtype: what the constants of the graph had, and get again.
    """

    factor: Tensor
    shift: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Norm:
    """A batch norm in either form: the node, the node that stands for its result, its map."""

    node: Node
    result: Node
    affine: _Affine


def fold_batch_norm(module: GraphModule) -> bool:
    """Fold batch norms into the product before them; make the others a mul and an add."""
    changed = False
    for node in list(module.graph.nodes):
        norm = _match(module, node) if node.target in _NORMS else None
        if norm is None:
            continue
        source = node.args[0]
        assert isinstance(source, Node), "a batch norm has a data input"
        if _can_fold(source, node) and _channel_axis(source) == 1 - rank_of(source):
            _fold(module, source, norm.affine)
            replacement = source
        else:
            replacement = _as_mul_add(module, norm, source)
        norm.result.replace_all_uses_with(replacement)
        for old in dict.fromkeys((norm.result, norm.node)):
            module.graph.erase_node(old)
        changed = True
    return changed


def fold_channel_affine(module: GraphModule) -> bool:
    """Fold ``* constant``, ``+ constant`` per channel (frozen batch norm, layer scale) likewise."""
    changed = False
    for node in list(module.graph.nodes):
        matched = _match_affine(module, node)
        if matched is None:
            continue
        source, affine = matched
        _fold(module, source, affine)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        changed = True
    return changed


def _tensor(module: GraphModule, value: object) -> Tensor | None:
    if isinstance(value, Node) and value.op == "get_attr":
        tensor = attribute(module, str(value.target))
        return tensor.detach() if isinstance(tensor, Tensor) else None
    return None


def _match(module: GraphModule, node: Node) -> _Norm | None:
    """The map of an inference batch norm with constant statistics; None for any other."""
    legit = node.target is aten._native_batch_norm_legit_no_training.default
    if not legit and argument(node, 5):
        return None  # uses the statistics of the batch
    result = node if node.target is aten.batch_norm.default else only_first_result(node)
    mean, variance = _tensor(module, argument(node, 3)), _tensor(module, argument(node, 4))
    if result is None or mean is None or variance is None:
        return None
    epsilon: Any = argument(node, 6 if legit else 7)
    weight, bias = argument(node, 1), argument(node, 2)
    gamma, beta = _tensor(module, weight), _tensor(module, bias)
    if (weight is not None and gamma is None) or (bias is not None and beta is None):
        return None
    factor = (variance.double() + epsilon).rsqrt()
    factor = factor if gamma is None else factor * gamma.double()
    shift = -mean.double() * factor
    shift = shift if beta is None else shift + beta.double()
    return _Norm(node, result, _Affine(factor, shift, variance.dtype))


def _can_fold(source: Node, reader: Node) -> bool:
    """Whether the source is a product of constants that nothing but `reader` reads."""
    if source.target not in _CONVS | _TRANSPOSED | {aten.linear.default}:
        return False
    weight, bias = argument(source, 1), argument(source, 2)
    return (
        set(source.users) == {reader}
        and isinstance(weight, Node)
        and weight.op == "get_attr"
        and (bias is None or (isinstance(bias, Node) and bias.op == "get_attr"))
    )


def _channel_axis(source: Node) -> int:
    """Axis of the output channels, counted from the end."""
    return -1 if source.target is aten.linear.default else 1 - rank_of(source)


def _fold(module: GraphModule, source: Node, affine: _Affine) -> None:
    """Scale the weight's output channels and the bias; both become fresh buffers.

    Fresh, because the same weight may be read by another call or under another name.
    """
    weight_node, bias_node = argument(source, 1), argument(source, 2)
    weight, bias = _tensor(module, weight_node), _tensor(module, bias_node)
    assert weight is not None, "checked by _can_fold"
    assert isinstance(weight_node, Node), "checked by _can_fold"
    groups: Any = argument(source, 6) if source.target in _TRANSPOSED else 1
    scaled = _scale_outputs(weight.double(), affine.factor, source, groups).to(weight.dtype)
    shift = affine.shift if bias is None else affine.shift + bias.double() * affine.factor
    path = str(weight_node.target)
    bias_path = str(bias_node.target) if isinstance(bias_node, Node) else f"{path}_bias"
    new_weight = insert_buffer(module, path, scaled, before=source)
    new_bias = insert_buffer(module, bias_path, shift.to(weight.dtype), before=source)
    source.args = (source.args[0], new_weight, new_bias, *source.args[3:])
    source.kwargs = {k: v for k, v in source.kwargs.items() if k not in {"weight", "bias"}}


def _scale_outputs(weight: Tensor, factor: Tensor, source: Node, groups: int) -> Tensor:
    if source.target not in _TRANSPOSED:
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    # [in, out / groups, ...]: rows of group g produce the outputs g * (out / groups) + j
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    scale = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (grouped * scale).reshape(weight.shape)


def _as_mul_add(module: GraphModule, norm: _Norm, source: Node) -> Node:
    shape = (-1, *[1] * (rank_of(source) - 2))
    result, node = source, norm.node
    for hint, target, values in (
        ("scale", aten.mul.Tensor, norm.affine.factor),
        ("shift", aten.add.Tensor, norm.affine.shift),
    ):
        value = values.to(norm.affine.dtype).reshape(shape)
        constant = insert_buffer(module, f"{node.name}_{hint}", value, before=node)
        result = insert_call(module, target, result, constant, like=node, before=node)
    return result


def _match_affine(module: GraphModule, node: Node) -> tuple[Node, _Affine] | None:
    """A mul, add, sub or div of a foldable product by a per-channel constant."""
    if node.target not in _AFFINE or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[0], node.args[1]
    constant, source, swapped = _tensor(module, second), first, False
    if constant is None and node.target is not aten.div.Tensor:
        constant, source, swapped = _tensor(module, first), second, True
    if constant is None or not isinstance(source, Node) or not _can_fold(source, node):
        return None
    axis, value = _channel_axis(source), source.meta["val"]
    promotes = node.meta["val"].dtype != value.dtype
    if promotes or not constant.is_floating_point() or constant.ndim > value.ndim:
        return None
    shape = (*[1] * (value.ndim - constant.ndim), *constant.shape)
    channels = int(shape_of(source)[axis])
    if any(s != 1 for at, s in enumerate(shape) if at - value.ndim != axis):
        return None
    vector = constant.double().reshape(-1).expand(channels)
    one, zero = torch.ones_like(vector), torch.zeros_like(vector)
    if node.target is aten.mul.Tensor:
        factor, shift = vector, zero
    elif node.target is aten.div.Tensor:
        factor, shift = one / vector, zero
    elif node.target is aten.sub.Tensor:
        factor, shift = (-one, vector) if swapped else (one, -vector)
    else:
        factor, shift = one, vector
    return source, _Affine(factor, shift, constant.dtype)


_AFFINE = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor})
