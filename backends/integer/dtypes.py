# SPDX-License-Identifier: Apache-2.0
"""Which dtypes a lowered graph really computes in, op by op, down to the ops inside functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    """Dtypes of every tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.seen.add(str(leaf.dtype).removeprefix("torch."))
        return result


class _Watch(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, frozenset[str]] = {}

    def run_node(self, n: Node) -> Any:
        recorder = _Recorder()
        with recorder:
            value = super().run_node(n)
        if n.op == "call_function":
            self.found[n] = frozenset(recorder.seen)
        return value


def example_inputs(source: GraphModule) -> list[Any]:
    """Zeros of the shapes a graph was traced with."""
    inputs: list[Any] = []
    for node in source.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            inputs.append(torch.zeros([_hint(s) for s in value.shape], dtype=value.dtype))
        else:
            inputs.append(_hint(value) if isinstance(value, SymInt) else value)
    return inputs


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 2 if hint is None else int(hint)


def computed_dtypes(module: GraphModule, inputs: list[Any]) -> dict[Node, frozenset[str]]:
    """Dtypes that each call of a lowered graph computes in, found by running it."""
    watch = _Watch(module)
    with torch.no_grad():
        watch.run(*inputs, enable_io_processing=False)
    return watch.found
