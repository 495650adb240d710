# SPDX-License-Identifier: Apache-2.0
"""Opening scaled_dot_product_attention into matmul, mul, mask, softmax, matmul.

Exactly torch's semantics: rows whose keys are all masked give 0. Masked logits take the lowest
finite number instead of -inf, so that no infinity and no NaN flows through the graph: their
probability is exactly 0 either way, and the few rows without any key are zeroed at the output.
Where a mask provably leaves every row a key, nothing is added for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qgraph.graph.build import attribute, insert_call
from qgraph.graph.drop_noops import drop_dead_code
from qgraph.graph.ops import argument
from qgraph.graph.sizes import shape_of, size_of

aten = torch.ops.aten

# Sums and data movement hand an infinity on; products, norms and softmax end the search.
_PASS_ON = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.reshape.default, aten.view.default,
    aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.cat.default, aten.index.Tensor,
    aten.clone.default, aten.flatten.using_ints, aten.repeat.default, aten.where.self,
    aten._to_copy.default, aten.mul.Tensor, aten.neg.default, aten.pad.default,
})  # fmt: skip
_FINITE = frozenset({
    aten.linear.default, aten.matmul.default, aten.conv2d.default, aten.softmax.int,
    aten.layer_norm.default, aten.embedding.default, aten.sigmoid.default, aten.tanh.default,
})  # fmt: skip


@dataclass(slots=True)
class _Shared:
    """Mask nodes that several layers read, by what they were made from."""

    nodes: dict[tuple[object, ...], Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Mask:
    """What is done to the logits, and which rows have no key at all.

    Attributes:
        added: float summand of the logits, or None.
        hidden: bool, True where a key is hidden, or None.
        dead: bool, True for rows without a key, or None where there are none.
    """

    added: Node | None = None
    hidden: Node | None = None
    dead: Node | None = None


def decompose_attention(module: GraphModule) -> bool:
    """Open every inactive-dropout attention whose head size is known."""
    shared = _Shared()
    changed = False
    for node in list(module.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or argument(node, 4):
            continue
        if not is_concrete_int(shape_of(node.args[0])[-1]):
            continue
        result = _open(module, node, shared)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        changed = True
    if changed:
        drop_dead_code(module)  # masks that turned out to hide nothing
    return changed


def _open(module: GraphModule, node: Node, shared: _Shared) -> Node:
    query, key, value = node.args[:3]
    assert isinstance(query, Node), "attention takes tensors"
    if argument(node, 7):
        key, value = (_repeat_heads(module, node, query, item) for item in (key, value))

    def call(target: Any, *args: Any) -> Node:
        return insert_call(module, target, *args, like=node, before=node)

    given = argument(node, 6)
    scale = 1.0 / math.sqrt(int(shape_of(query)[-1])) if given is None else given
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    if scale != 1.0:
        scores = call(aten.mul.Tensor, scores, scale)
    mask = _mask(module, node, scores, shared)
    if mask.added is not None:
        scores = call(aten.add.Tensor, scores, mask.added)
    if mask.hidden is not None:
        lowest = torch.finfo(scores.meta["val"].dtype).min
        scores = call(aten.masked_fill.Scalar, scores, mask.hidden, lowest)
    result = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    if mask.dead is not None:
        result = call(aten.masked_fill.Scalar, result, mask.dead, 0.0)
    return result


def _repeat_heads(module: GraphModule, node: Node, query: Node, item: Any) -> Any:
    """Grouped-query attention: head h of the query reads head h // repeats of the key."""
    heads, own = shape_of(query)[-3], shape_of(item)[-3]
    repeats = int(heads) // int(own)
    if repeats == 1:
        return item
    rank = len(shape_of(item))
    sizes: list[Any] = [size_of(module, item, axis, before=node) for axis in range(rank)]

    def call(target: Any, *args: Any) -> Node:
        return insert_call(module, target, *args, like=node, before=node)

    wide = call(aten.unsqueeze.default, item, -3)
    wide = call(aten.expand.default, wide, [*sizes[:-2], repeats, *sizes[-2:]])
    return call(aten.reshape.default, wide, [*sizes[:-3], int(heads), *sizes[-2:]])


def _mask(module: GraphModule, node: Node, scores: Node, shared: _Shared) -> _Mask:
    given = argument(node, 3)
    if argument(node, 5):
        return _Mask(hidden=_causal(module, node, scores, shared))
    if not isinstance(given, Node):
        return _Mask()
    constant = _broadcast_constant(module, given)
    if constant is not None and _hides_nothing(constant):
        return _Mask()

    def call(target: Any, *args: Any) -> Node:
        key = (target, *args)
        if key not in shared.nodes:
            shared.nodes[key] = insert_call(module, target, *args, like=node, before=node)
        return shared.nodes[key]

    if given.meta["val"].dtype == torch.bool:
        hidden = call(aten.logical_not.default, given)
        every_row_has_a_key = constant is not None and bool(constant.any(-1).all())
        dead = None if every_row_has_a_key else call(aten.all.dim, hidden, -1, True)
        return _Mask(hidden=hidden, dead=dead)
    if not _may_be_infinite(module, given):
        return _Mask(added=given)
    lowest = torch.finfo(given.meta["val"].dtype).min
    added = call(aten.clamp_min.default, given, lowest)
    if constant is not None and not bool((constant == -math.inf).all(-1).any()):
        return _Mask(added=added)
    dead = call(aten.all.dim, call(aten.eq.Scalar, given, -math.inf), -1, True)
    return _Mask(added=added, dead=dead)


def _causal(module: GraphModule, node: Node, scores: Node, shared: _Shared) -> Node:
    """Key j is hidden from query i if j > i; row 0 keeps key 0, so no row is dead."""
    sizes = shape_of(scores)[-2:]
    key = ("causal", *map(str, sizes))
    if key not in shared.nodes:
        device = scores.meta["val"].device

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return insert_call(module, target, *args, like=node, before=node, **kwargs)

        length, keys = (size_of(module, scores, axis, before=node) for axis in (-2, -1))
        rows = call(aten.arange.default, length, device=device)
        columns = call(aten.arange.default, keys, device=device)
        shared.nodes[key] = call(aten.gt.Tensor, columns, call(aten.unsqueeze.default, rows, 1))
    return shared.nodes[key]


def _constant(module: GraphModule, node: Node) -> Tensor | None:
    return attribute(module, str(node.target)) if node.op == "get_attr" else None


def _broadcast_constant(module: GraphModule, node: Node) -> Tensor | None:
    """The constant that a mask is, up to repetition along its axes."""
    while node.target is aten.expand.default and isinstance(node.args[0], Node):
        node = node.args[0]
    return _constant(module, node)


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def _may_be_infinite(module: GraphModule, mask: Node) -> bool:
    """Whether -inf can be in a float mask: it comes in with inputs, constants and fills only."""
    pending, seen = [mask], set()
    while pending:
        node = pending.pop()
        if node in seen or not _is_float(node) or node.target in _FINITE:
            continue
        seen.add(node)
        constant = _constant(module, node)
        if constant is not None:
            if bool(constant.isinf().any()):
                return True
        elif node.target is aten.masked_fill.Scalar and not _is_infinite(node.args[2]):
            pending.append(node.args[0])  # type: ignore[arg-type]
        elif node.target in _PASS_ON and not any(_is_infinite(a) for a in node.args):
            pending.extend(node.all_input_nodes)
        else:
            return True
    return False


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
