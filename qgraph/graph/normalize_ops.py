# SPDX-License-Identifier: Apache-2.0
"""One spelling per op: the many forms that exporters give become linear, matmul, reshape, ..."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.build import insert_call
from qgraph.graph.drop_noops import drop_dead_code
from qgraph.graph.ops import argument, constants
from qgraph.graph.sizes import rank_of

aten = torch.ops.aten

_RENAMED = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.bmm.default: aten.matmul.default,
    aten.expand_copy.default: aten.expand.default,
    aten.permute_copy.default: aten.permute.default,
    aten.view_copy.default: aten.reshape.default,
}
_FIRST_ARGUMENTS = {
    # (x, dim, half_to_float) -> (x, dim): half_to_float is never set in a float32 graph
    aten._softmax.default: (aten.softmax.int, 2),
    aten._log_softmax.default: (aten.log_softmax.int, 2),
}
_CONVOLUTIONS = {
    (3, False): aten.conv1d.default,
    (4, False): aten.conv2d.default,
    (5, False): aten.conv3d.default,
    (3, True): aten.conv_transpose1d.default,
    (4, True): aten.conv_transpose2d.input,
    (5, True): aten.conv_transpose3d.input,
}


def rename_ops(module: GraphModule) -> bool:
    """Give ops that mean the same one name; `view` becomes `reshape`, free of strides."""
    changed = False
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _RENAMED:
            node.target = _RENAMED[node.target]
            changed = True
        elif node.target in _FIRST_ARGUMENTS:
            node.target, count = _FIRST_ARGUMENTS[node.target]
            node.args = node.args[:count]
            changed = True
        elif node.target is aten.t.default and rank_of(node) == 2:
            node.target, node.args = aten.transpose.int, (node.args[0], 0, 1)
            changed = True
    return changed


def recompose_norms(module: GraphModule) -> bool:
    """`native_layer_norm(...)[0]` -> `layer_norm(...)`, and likewise for group norm."""
    changed = False
    for node in list(module.graph.nodes):
        build = _NORMS.get(node.target)
        first = only_first_result(node) if build is not None else None
        if build is None or first is None:
            continue
        target, args = build(node)
        new = insert_call(module, target, *args, like=node, before=node)
        _replace(module, first, new)
        module.graph.erase_node(node)
        changed = True
    if changed:
        drop_dead_code(module)  # sizes that nothing reads any more
    return changed


def only_first_result(node: Node) -> Node | None:
    """The `getitem(node, 0)` if that is the node's only user."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
        return users[0]
    return None


def _layer_norm(node: Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.layer_norm.default, tuple(argument(node, at) for at in range(5))


def _group_norm(node: Node) -> tuple[Any, tuple[Any, ...]]:
    data, weight, bias = (argument(node, at) for at in range(3))
    return aten.group_norm.default, (data, argument(node, 6), weight, bias, argument(node, 7))


_NORMS: dict[object, Callable[[Node], tuple[Any, tuple[Any, ...]]]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


def specialise_convolutions(module: GraphModule) -> bool:
    """`convolution` -> `conv1d` ... `conv_transpose3d`."""
    changed = False
    for node in list(module.graph.nodes):
        if node.target is not aten.convolution.default:
            continue
        data, weight, bias, stride, padding, dilation, transposed, extra, groups = (
            argument(node, at) for at in range(9)
        )
        if not isinstance(data, Node):
            continue
        target = _CONVOLUTIONS[rank_of(data), bool(transposed)]
        tail = (extra, groups, dilation) if transposed else (dilation, groups)
        new = insert_call(
            module, target, data, weight, bias, stride, padding, *tail, like=node, before=node
        )
        _replace(module, node, new)
        changed = True
    return changed


def recompose_products(module: GraphModule) -> bool:
    """addmm, mm, matmul with a constant matrix -> linear; baddbmm and the rest -> matmul."""
    known = constants(list(module.graph.nodes))
    changed = False
    for node in list(module.graph.nodes):
        rewrite = _PRODUCTS.get(node.target) if node.op == "call_function" else None
        new = rewrite(module, node, known) if rewrite is not None else None
        if new is not None:
            _replace(module, node, new)
            changed = True
    if changed:
        drop_dead_code(module)  # transposes that nothing reads any more
    return changed


def _product(module: GraphModule, node: Node, known: set[Node]) -> Node | None:
    pair: Any = node.args[:2]
    if node.target is aten.matmul.default:
        return _as_linear(module, node, pair, None, known)
    return _matmul(module, node, pair, known)


def _matmul(module: GraphModule, node: Node, pair: Any, known: set[Node]) -> Node:
    """A linear where the right operand is a constant matrix, else a matmul."""
    linear = _as_linear(module, node, pair, None, known)
    return linear or insert_call(module, aten.matmul.default, *pair, like=node, before=node)


def _as_linear(
    module: GraphModule, node: Node, pair: tuple[Node, Node], bias: Node | None, known: set[Node]
) -> Node | None:
    left, right = pair
    if right not in known or left in known or rank_of(right) != 2 or rank_of(left) < 1:
        return None
    weight = _transposed_source(right)
    if weight is None:
        weight = insert_call(module, aten.transpose.int, right, 0, 1, like=node, before=node)
    args = (left, weight) if bias is None else (left, weight, bias)
    return insert_call(module, aten.linear.default, *args, like=node, before=node)


def _transposed_source(node: Node) -> Node | None:
    """The matrix that the node transposes, or None."""
    flips = node.target is aten.transpose.int and node.args[1] != node.args[2]
    flips |= node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    source = node.args[0] if flips or node.target is aten.numpy_T.default else None
    return source if isinstance(source, Node) else None


def _addmm(module: GraphModule, node: Node, known: set[Node]) -> Node:
    bias, left, right = cast("list[Node]", node.args)
    plain = node.kwargs.get("beta", 1) == 1 and node.kwargs.get("alpha", 1) == 1
    if plain and rank_of(bias) == 1 and bias in known and _same_width(bias, right):
        linear = _as_linear(module, node, (left, right), bias, known)
        if linear is not None:
            return linear
    return _add_product(module, node, known)


def _same_width(bias: Node, right: Node) -> bool:
    return bool(bias.meta["val"].shape[0] == right.meta["val"].shape[1])


def _add_product(module: GraphModule, node: Node, known: set[Node]) -> Node:
    """`beta * input + alpha * (a @ b)` of addmm and baddbmm, with factors of 1 left out."""
    summand: Any = node.args[0]
    product = _scaled(
        module,
        node,
        _matmul(module, node, (node.args[1], node.args[2]), known),
        node.kwargs.get("alpha", 1),
    )
    beta = node.kwargs.get("beta", 1)
    if beta == 0:  # then the input is not even read
        return product
    summand = _scaled(module, node, summand, beta)
    return insert_call(module, aten.add.Tensor, summand, product, like=node, before=node)


def _scaled(module: GraphModule, like: Node, value: Node, factor: Any) -> Node:
    if factor == 1:
        return value
    return insert_call(module, aten.mul.Tensor, value, factor, like=like, before=like)


_PRODUCTS: dict[object, Callable[[GraphModule, Node, set[Node]], Node | None]] = {
    aten.mm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _add_product,
}


def _replace(module: GraphModule, old: Node, new: Node) -> None:
    value = new.meta.get("val")
    assert isinstance(value, Tensor), "a replacement is a tensor"
    old.replace_all_uses_with(new)
    module.graph.erase_node(old)
