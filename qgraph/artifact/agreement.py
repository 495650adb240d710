# SPDX-License-Identifier: Apache-2.0
"""What nodes compute must be what the file declares, and computing it may not take long.

Each node is computed without data at the example sizes. Ops whose sizes depend on data are taken
as declared, and so are lists of tensors, of which a few bytes of a file could ask for billions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qgraph.artifact.damage import as_damage, damaged
from qgraph.graph.dialect import result_dtype

MAX_SIZE = 1 << 62  # of anything that sizes are computed from
MAX_PIECES = 4096
# How inputs lie in memory is not in the file; a view that does not fit it is an error of the call.
_ANY_LAYOUT: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_DEPENDS_ON_DATA = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException,
    NotImplementedError,
)  # fmt: skip


def check_work(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Refuse a call on values without data that could take long all the same.

    Raises:
        ArtifactError: powers of powers, repeated lists, a tensor cut into very many.
    """
    if isinstance(target, OpOverload):
        tensors = [a for a in args if isinstance(a, Tensor)]
        if _gives_list(target) and any(hint(s) > MAX_PIECES for t in tensors for s in t.shape):
            raise damaged(f"{target} may give more than {MAX_PIECES} tensors")
        return
    name = target.__name__
    numbers = args[1:] if name == "getitem" else args
    if not all(isinstance(a, _NUMBERS) for a in map(check_size, numbers)):
        raise damaged(f"{name} computes with something else than sizes")
    if name == "pow" and not (isinstance(args[-1], (int, float)) and abs(args[-1]) <= 16):
        raise damaged(f"{name} has the exponent {str(args[-1])[:20]}")


def check_size(value: Any) -> Any:
    """Refuse sizes beyond those of any tensor; returns what it is given.

    Raises:
        ArtifactError: the size, or its example, is too large.
    """
    if isinstance(value, _NUMBERS) and abs(hint(value)) > MAX_SIZE:
        raise damaged("a size is larger than any tensor")
    return value


def hint(size: Any) -> float:
    """An example of a size that may be symbolic; 0 where there is none."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return cast("float", size.node.hint if size.node.has_hint() else 0)
    return cast("float", size)


def check_values(module: GraphModule) -> None:
    """Compute each node's value at the example sizes and compare it with what is declared.

    Raises:
        ArtifactError: naming the node and both sides.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[Node, Any] = {}
    for node in module.graph.nodes:
        told = _at_hints(node.meta.get("val"), mode)
        known[node] = told
        if node.op != "call_function" or any(known[i] is None for i in node.all_input_nodes):
            continue
        with as_damage(f"{node.name} cannot compute", RuntimeError, ValueError, TypeError):
            found = _computed(node, known, mode)
        if found is None:
            continue
        if told is not None and _form(found) != _form(told):
            raise damaged(f"{node.name} computes {_form(found)}, the file says {_form(told)}")
        known[node] = found


def _gives_list(target: OpOverload) -> bool:
    return any(str(result.type).startswith("List") for result in target._schema.returns)


def _at_hints(value: Any, mode: FakeTensorMode) -> Any:
    """A declared value with example sizes; None where a size is unknown."""
    if isinstance(value, Tensor):
        sizes = [_at_hints(size, mode) for size in value.shape]
        if None in sizes:
            return None
        with mode:
            return torch.empty(sizes, dtype=value.dtype, device=value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else None
    if isinstance(value, (list, tuple)):
        items = [_at_hints(item, mode) for item in value]
        return None if any(item is None for item in items) else items
    return value


def _computed(node: Node, known: dict[Node, Any], mode: FakeTensorMode) -> Any:
    """The value without data; None where it depends on data, or is a list."""
    dtype, target = result_dtype(node), cast("Callable[..., Any]", node.target)
    source = known[node.all_input_nodes[0]] if node.all_input_nodes else None
    if dtype is not None and isinstance(source, Tensor):
        with mode:
            return torch.empty(source.shape, dtype=dtype, device=source.device)
    if isinstance(target, OpOverload) and _gives_list(target):
        return None
    target = _ANY_LAYOUT.get(target, target)
    args = cast("tuple[Any, ...]", map_arg(node.args, known.__getitem__))
    kwargs = cast("dict[str, Any]", map_arg(node.kwargs, known.__getitem__))
    check_work(target, args)
    try:
        with mode:
            return check_size(target(*args, **kwargs))
    except _DEPENDS_ON_DATA:
        return None


def _form(value: Any) -> str:
    """Dtype and sizes, or the size itself; fractions may round in another way."""
    if isinstance(value, float):
        return "a fraction"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_form, value))}]"
    return str(value)
