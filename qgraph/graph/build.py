# SPDX-License-Identifier: Apache-2.0
"""Building graphs: new calls with complete metadata, new buffers, shallow copies, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

from qgraph.graph.dialect import result_dtype
from qgraph.graph.edges import Edge

_COPIED_META = ("nn_module_stack", "stack_trace", "torch_fn")


def fake_mode(module: GraphModule) -> FakeTensorMode:
    """The fake mode of the graph's values, so that symbolic sizes stay shared."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def set_value(module: GraphModule, node: Node) -> None:
    """Compute `meta["val"]` of one node from its arguments, without running any kernel."""
    mode = fake_mode(module)

    def value_of(item: Node) -> Any:
        if item.op == "get_attr" and "val" not in item.meta:
            value = attribute(module, str(item.target))  # a constant: its sizes are no symbols
            item.meta["val"] = _described(mode, value, value.dtype)
        return item.meta["val"]

    if node.op == "get_attr":
        value_of(node)
        return
    dtype = result_dtype(node)
    if dtype is not None and _is_dense(source := value_of(node.args[0])):  # type: ignore[arg-type]
        node.meta["val"] = _described(mode, source, dtype)
        return
    args: Any = map_arg(node.args, value_of)
    kwargs: Any = map_arg(node.kwargs, value_of)
    shape = _matmul_shape(*args) if node.target is torch.ops.aten.matmul.default else None
    with mode, enable_python_dispatcher():  # resizes in C++ read sizes as numbers, for good
        if shape is not None:
            node.meta["val"] = args[0].new_empty(shape)
        else:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _described(mode: FakeTensorMode, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fake tensor of the same sizes; the dispatcher's way there takes ten times as long.

    Values of one size and dtype share theirs: arithmetic on symbols costs more than all else
    that inserting a node takes.
    """
    if like.dtype == dtype and isinstance(like, FakeTensor) and like.fake_mode is mode:
        return like
    known: dict[Hashable, Tensor] = vars(mode).setdefault(
        "_qgraph_described", {}
    )  # lives as long as the mode
    key = (tuple(map(_plain, like.shape)), tuple(map(_plain, like.stride())), dtype, like.device)
    if key not in known:
        meta = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
        known[key] = FakeTensor(mode, meta, like.device)
    return known[key]


def _plain(size: int | torch.SymInt) -> Hashable:
    """A size as a key: symbols by their expression."""
    return size if isinstance(size, int) else size.node.expr


def _is_dense(value: Tensor) -> bool:
    """Whether only the first size is a symbol, and memory holds the samples without gaps.

    Behind each other, their other axes in any order: so far ops keep strides as they are.
    """
    inner = list(zip(value.stride()[1:], value.shape[1:], strict=True))
    if not value.ndim or not all(isinstance(n, int) for pair in inner for n in pair):
        return False
    expected = 1
    for stride, size in sorted(inner):
        if stride != expected:
            return False
        expected *= size
    return bool(value.stride()[0] == expected)


def _matmul_shape(left: Tensor, right: Tensor) -> tuple[Any, ...] | None:
    """Shape of a batched product without broadcasting; None where it takes more than a look.

    Fake matmul runs as expand, reshape, bmm and view: five symbolic ops instead of one.
    """
    if min(left.ndim, right.ndim) < 3 or left.dtype != right.dtype:
        return None
    a, b = left.shape[:-2], right.shape[:-2]
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    shared = longer[len(longer) - len(shorter) :]
    if any(str(x) != str(y) for x, y in zip(shared, shorter, strict=True)):
        return None
    return (*longer, left.shape[-2], right.shape[-1])


def attribute(module: GraphModule, target: str) -> Tensor:
    """The tensor at a dotted path."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def insert_call(
    module: GraphModule, target: Callable[..., Any], *args: Any, like: Node,
    before: Node | None = None, **kwargs: Any,
) -> Node:  # fmt: skip
    """Insert a call with full metadata.

    Args:
        module: the graph module.
        target: the op.
        *args: its arguments; nodes stand for their values.
        like: the node it stems from; module path and source line are copied from it.
        before: where to insert; default directly after `like`.
        **kwargs: keyword arguments of the op.
    """
    graph = module.graph
    with graph.inserting_before(before) if before is not None else graph.inserting_after(like):
        node = graph.call_function(target, args, kwargs)
    node.meta.update({k: like.meta[k] for k in _COPIED_META if k in like.meta})
    set_value(module, node)
    return node


def insert_move(module: GraphModule, move: Node, source: Node, *, before: Node) -> Node:
    """Insert what `move` does, for a value of the same sizes and another dtype."""
    assert callable(move.target)
    with module.graph.inserting_before(before):
        node = module.graph.call_function(move.target, (source, *move.args[1:]), dict(move.kwargs))
    node.meta.update({k: move.meta[k] for k in _COPIED_META if k in move.meta})
    dtype = source.meta["val"].dtype
    node.meta["val"] = _described(fake_mode(module), move.meta["val"], dtype)
    return node


def add_buffer(module: GraphModule, hint: str, tensor: Tensor) -> str:
    """Register a new buffer under a fresh name derived from `hint`; return the name."""
    base = "_q_" + "".join(c if c.isalnum() else "_" for c in hint)
    taken, name, number = module._buffers, base, 0
    while name in taken or hasattr(module, name):
        number += 1
        name = f"{base}_{number}"
    module.register_buffer(name, tensor.detach())
    return name


def insert_buffer(module: GraphModule, hint: str, tensor: Tensor, *, before: Node) -> Node:
    """Register a buffer and read it just before `before`."""
    name = add_buffer(module, hint, tensor)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    set_value(module, node)
    return node


def replace_tensor(module: GraphModule, edge: Edge, tensor: Tensor, hint: str) -> Node:
    """Let one edge read a new constant; other readers keep the old one."""
    node = insert_buffer(module, hint, tensor, before=edge.consumer)
    edge.redirect(node)
    return node


def shallow_copy(module: GraphModule) -> GraphModule:
    """A copy of the graph that shares all tensors with the original.

    Its code is written when it is first called, or asked for.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, val_map=mapping)
    graph.output(output)
    graph._codegen = copy.copy(module.graph._codegen)  # what it holds is replaced, never changed
    clone = _LazyGraphModule(module, graph)
    clone.meta.update(module.meta)
    clone.train(module.training)
    return clone


def compile_when_called(module: GraphModule) -> None:
    """Put off what `recompile` does until the module is called; `code` is stale until then."""

    def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()
        return self.forward(*args, **kwargs)

    type(module).forward = forward  # each graph module has a class of its own


def prune(module: GraphModule, *, recompile: bool = True) -> bool:
    """Drop dead constants and the tensors no node reads; return whether anything went.

    Without `recompile` the module's code is stale afterwards, which the caller sees to.
    """
    changed = False
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
            changed = True
    if changed and recompile:
        module.recompile()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
            changed = True
    return changed
