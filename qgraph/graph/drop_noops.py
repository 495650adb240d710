# SPDX-License-Identifier: Apache-2.0
"""Dropping what does nothing at inference: asserts, inactive dropout, copies, identity moves."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qgraph.graph.ops import argument
from qgraph.graph.sizes import rank_of, same_shape, shape_of

aten = torch.ops.aten

_ASSERTS = frozenset({
    aten._assert_tensor_metadata.default, aten._assert_scalar.default,
    aten._assert_async.default, aten._assert_async.msg, aten._functional_assert_scalar.default,
    aten._functional_assert_async.msg, aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default, torch._check,
})  # fmt: skip
_COPIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default,
})  # fmt: skip
_ALIASES = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh.default})
_DROPOUTS = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
})  # fmt: skip
# With these the value is the input's whenever the shape is.
_IDENTITY_IF_SAME_SHAPE = frozenset({
    aten.reshape.default, aten.view.default, aten.expand.default, aten.slice.Tensor,
    aten.flatten.using_ints, aten.narrow.default, aten.repeat.default,
})  # fmt: skip
# With these in the graph strides carry meaning, and copies that make them stay.
_STRIDE_SENSITIVE = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.as_strided.default, aten.view.dtype,
    aten.view_as_complex.default, aten.view_as_real.default,
})  # fmt: skip


def drop_asserts(module: GraphModule) -> bool:
    """Drop runtime asserts, and what only they needed."""
    asserts = [node for node in module.graph.nodes if node.target in _ASSERTS and not node.users]
    for node in asserts:
        module.graph.erase_node(node)
    return drop_dead_code(module) or bool(asserts)


def drop_dead_code(module: GraphModule) -> bool:
    """Drop every pure call whose result nothing reads."""
    changed = False
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            module.graph.erase_node(node)
            changed = True
    return changed


def drop_noops(module: GraphModule) -> bool:
    """Replace nodes that return their input by that input."""
    strided = any(node.target in _STRIDE_SENSITIVE for node in module.graph.nodes)
    changed = False
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        source = _identity_of(node, keep_copies=strided)
        if source is None:
            continue
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        changed = True
    if changed:
        drop_dead_code(module)  # sizes that only the dropped nodes read
    return changed


def _identity_of(node: Node, *, keep_copies: bool) -> Node | None:
    """The node whose value this one repeats, or None."""
    source = node.args[0]
    assert isinstance(source, Node), "checked by the caller"
    if node.target is operator.getitem:
        return _inactive_native_dropout(node, source)
    if node.target in _COPIES or _is_same_cast(node, source):
        # a result must not alias an input or a parameter that the caller may write to
        returned = any(user.op == "output" for user in node.users)
        owned = source.op in {"placeholder", "get_attr"}
        return None if keep_copies or (returned and owned) else source
    rule = _RULES.get(node.target)
    return source if rule is not None and rule(node, source) else None


def _is_same_cast(node: Node, source: Node) -> bool:
    if node.target is not aten._to_copy.default:
        return False
    old, new = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)
    )


def _inactive_native_dropout(node: Node, source: Node) -> Node | None:
    """`native_dropout(x, p, train=False)[0]` is x; the mask must be unused."""
    if source.target is not aten.native_dropout.default or node.args[1] != 0:
        return None
    probability, train = source.args[1], source.args[2]
    data = source.args[0]
    return data if isinstance(data, Node) and (not train or probability == 0) else None


def _always(_node: Node, _source: Node) -> bool:
    return True


def _inactive_dropout(node: Node, _source: Node) -> bool:
    return not argument(node, 2) or argument(node, 1) == 0


def _is_identity_permute(node: Node, source: Node) -> bool:
    rank = rank_of(source)
    dims = node.args[1]
    return isinstance(dims, (list, tuple)) and [d % rank for d in dims] == list(range(rank))  # type: ignore[operator]


def _is_identity_transpose(node: Node, source: Node) -> bool:
    first, second = node.args[1], node.args[2]
    return isinstance(first, int) and isinstance(second, int) and (
        first % rank_of(source) == second % rank_of(source)
    )  # fmt: skip


def _is_identity_squeeze(node: Node, source: Node) -> bool:
    """Only for sizes known not to be 1: a symbolic batch may well be 1 at run time."""
    size = shape_of(source)[node.args[1]]  # type: ignore[index]
    return is_concrete_int(size) and int(size) != 1


def _is_identity_pad(node: Node, _source: Node) -> bool:
    pads = node.args[1]
    return isinstance(pads, (list, tuple)) and all(isinstance(p, int) and p == 0 for p in pads)


_RULES: dict[object, Callable[[Node, Node], bool]] = {
    **dict.fromkeys(_ALIASES, _always),
    **dict.fromkeys(_DROPOUTS, _inactive_dropout),
    **dict.fromkeys(_IDENTITY_IF_SAME_SHAPE, same_shape),
    aten.permute.default: _is_identity_permute,
    aten.transpose.int: _is_identity_transpose,
    aten.squeeze.dim: _is_identity_squeeze,
    aten.pad.default: _is_identity_pad,
    aten.constant_pad_nd.default: _is_identity_pad,
}
