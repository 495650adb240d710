# SPDX-License-Identifier: Apache-2.0
"""Finding attention: softmax over the last axis, the product of logits before it and the product
with the values behind it. Opened scaled_dot_product_attention looks the same as eager code.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.ops import MOVES, OpKind, argument, constants, kind

aten = torch.ops.aten

_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.clone.default})
# What probabilities may go through before they meet the values.
_PASSED = _CASTS | MOVES | {aten.masked_fill.Scalar, aten.where.self}
# What may lie between the logits product and the softmax; where it is walked through.
_ELEMENTWISE = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.where.self, aten.tanh.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.neg.default, aten.mul.Scalar,
    aten.div.Scalar, aten.add.Scalar, aten.minimum.default, aten.maximum.default,
})  # fmt: skip
# Of these, the ones that hand a constant per query on to the softmax as such.
_SHIFT_KEEPING = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar,
    aten.div.Scalar, aten.add.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention.

    Attributes:
        softmax: the softmax over keys.
        logits: the product of queries and keys, ``matmul(query, key^T)``.
        context: the product of probabilities and values.
        query, key: operands of `logits`, [..., T, D] and [..., D, S].
        probabilities, values: operands of `context`, [..., T, S] and [..., S, D].
        between: nodes from `logits` to `softmax`, in order, without the ends.
    """

    softmax: Node
    logits: Node
    context: Node
    between: tuple[Node, ...]

    @property
    def query(self) -> Node:  # noqa: D102
        return self.logits.args[0]  # type: ignore[return-value]

    @property
    def key(self) -> Node:  # noqa: D102
        return self.logits.args[1]  # type: ignore[return-value]

    @property
    def probabilities(self) -> Node:  # noqa: D102
        return self.context.args[0]  # type: ignore[return-value]

    @property
    def values(self) -> Node:  # noqa: D102
        return self.context.args[1]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class NoSite:
    """A softmax that is no attention as understood here, and why."""

    softmax: Node
    reason: str


def attention_sites(module: GraphModule) -> Iterator[AttentionSite | NoSite]:
    """All softmax nodes over the last axis whose output meets values in a product, in order."""
    nodes = list(module.graph.nodes)
    fixed = constants(nodes)
    for node in nodes:
        if kind(node) is not OpKind.SOFTMAX or node.target is not aten.softmax.int:
            continue
        context = value_product(node)
        if context is None or node in fixed:
            continue
        rank = node.meta["val"].ndim
        if int(argument(node, 1)) % rank != rank - 1:  # type: ignore[call-overload]
            yield NoSite(node, "softmax is not over the last axis")
            continue
        found = logits_products(node, fixed)
        if len(found) != 1:
            what = "no product of two activations" if not found else f"{len(found)} products"
            yield NoSite(node, f"logits are a sum of {what}" if found else f"logits hold {what}")
            continue
        logits = found[0]
        yield AttentionSite(node, logits, context, _between(logits, node))


def value_product(softmax: Node) -> Node | None:
    """The product whose left operand is the softmax, through casts and moves; None if none is."""
    pending = [softmax]
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if kind(user) is OpKind.MATMUL and user.args[0] is node:
                return user
            if user.target in _PASSED:
                pending.append(user)
    return None


def logits_products(softmax: Node, fixed: set[Node]) -> list[Node]:
    """Products of two activations that reach the softmax through sums, scales and masks."""
    found: list[Node] = []
    pending, seen = [softmax.args[0]], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen or node in fixed:
            continue
        seen.add(node)
        if kind(node) is OpKind.MATMUL:
            if not any(operand in fixed for operand in node.args[:2]):
                found.append(node)
        elif node.target in _ELEMENTWISE | _PASSED or node.target is operator.getitem:
            pending.extend(node.all_input_nodes)
    return found


def _between(logits: Node, softmax: Node) -> tuple[Node, ...]:
    """Nodes on any path from the logits product to the softmax."""
    behind, order = {logits}, []
    node = logits.next
    while node is not softmax:
        if any(i in behind for i in node.all_input_nodes):
            behind.add(node)
            order.append(node)
        node = node.next
    before = {softmax}
    for node in reversed(order):
        if any(user in before for user in node.users):
            before.add(node)
    return tuple(node for node in order if node in before)


def shift_obstacle(site: AttentionSite) -> Node | None:
    """The first node that would not hand on a constant per query to the softmax; None if all do.

    Softmax ignores what is added to all keys of a query alike. Sums with anything, masks, and
    factors that are the same for all keys keep that property; a soft cap does not.
    """
    inside = {site.logits, *site.between}
    return next((node for node in site.between if not _keeps_shift(node, inside)), None)


def _keeps_shift(node: Node, inside: set[Node]) -> bool:
    if sum(i in inside for i in node.all_input_nodes) > 1:
        return False
    if node.target in MOVES or node.target in _CASTS:
        return _keeps_last_axis(node)
    if node.target in {aten.mul.Tensor, aten.div.Tensor}:
        return _scales_keys_alike(node, inside)
    return node.target in _SHIFT_KEEPING


def _keeps_last_axis(node: Node) -> bool:
    before = node.all_input_nodes[0].meta["val"]
    after = node.meta["val"]
    return bool(
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and str(before.shape[-1]) == str(after.shape[-1])
        and node.target not in {aten.transpose.int, aten.permute.default, aten.flip.default}
    )


def _scales_keys_alike(node: Node, inside: set[Node]) -> bool:
    if node.target is aten.div.Tensor and node.args[0] not in inside:
        return False
    for factor in node.args[:2]:
        if isinstance(factor, Node) and factor not in inside:
            value = factor.meta["val"]
            if value.ndim and str(value.shape[-1]) != "1":
                return False
    return True
