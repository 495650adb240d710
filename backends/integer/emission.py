# SPDX-License-Identifier: Apache-2.0
"""Writing a lowered graph: calls, constants, tables, and movement applied to other operands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qgraph.backends.integer.kernels import LOOKUP
from qgraph.backends.integer.values import Coded, KernelChoice
from qgraph.backends.semantics import Semantics
from qgraph.formats.base import along

aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
COPIED_META = ("nn_module_stack", "stack_trace", "val")


class Emission(ABC):
    """A graph under construction.

    Attributes:
        semantics: the decisions for the source graph.
        graph, root: the lowered graph and the module that holds its constants.
        env: what each source node has become.
        choices: kernels by product.
        codes: codes by quantize node.
        memo: results to share, by key.
        compiled: whether torch.compile will fuse the graph.
    """

    def __init__(self, semantics: Semantics, *, compiled: bool = False) -> None:
        self.compiled = compiled
        self.semantics = semantics
        self.source = semantics.module
        self.graph = Graph()
        self.root = nn.Module()
        self.env: dict[Node, Any] = {}
        self.choices: dict[Node, KernelChoice] = {}
        self.codes: dict[str, Coded] = {}
        self.memo: dict[Any, Any] = {}
        self.names: dict[str, int] = {}
        self.owned: set[Node] = set()
        self.current: Node | None = None

    @abstractmethod
    def plain(self, node: Node) -> Any:
        """The value of a source node as an ordinary tensor."""

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Emit one call."""
        node = self.graph.call_function(target, args, kwargs)
        if self.current is not None:
            for key in COPIED_META[:2]:
                if key in self.current.meta:
                    node.meta[key] = self.current.meta[key]
            node.meta["qgraph_source"] = self.current.name
        return node

    def arithmetic(self, target: Any, *args: Any) -> Node:
        """Emit a call of lowering's own, whose float result nobody else can hold."""
        node = self.call(target, *args)
        self.owned.add(node)
        return node

    def buffer(self, hint: str, tensor: Tensor) -> Node:
        """Register a constant and read it."""
        name = "_c_" + "".join(c if c.isalnum() else "_" for c in hint)
        number = self.names.get(name, 0)
        self.names[name] = number + 1
        name = f"{name}_{number}" if number else name
        self.root.register_buffer(name, tensor.detach())
        return self.graph.get_attr(name)

    def lookup(self, hint: str, table: Tensor, index: Node) -> Node:
        """Entries of a table at non-negative integers; compilers see a gather they can fuse."""
        entries = self.buffer(hint, table)
        if not self.compiled:
            return self.call(LOOKUP, entries, index)
        return self.call(aten.index.Tensor, entries, [self.call(aten.to.dtype, index, torch.int32)])

    def moved(self, move: Node, *operands: Node) -> Node:
        """Apply a movement to other operands."""
        target = aten.reshape.default if move.target in VIEWS else move.target
        if target is aten.cat.default:
            return self.call(target, list(operands), *move.args[1:], **move.kwargs)
        rest = map_arg(move.args[1:], self.plain)
        return self.call(target, operands[0], *rest, **map_arg(move.kwargs, self.plain))

    def replay(self, payload: Node, moves: tuple[Node, ...]) -> Node:
        """Apply a chain of movements, each once per operand."""
        for move in moves:
            key = ("move", payload, move)
            if key not in self.memo:
                self.memo[key] = self.moved(move, payload)
            payload = self.memo[key]
        return payload

    def along(self, hint: str, values: Tensor, axis: int | None, ndim: int) -> Node:
        """A constant that broadcasts along an axis of a tensor of rank `ndim`."""
        return self.buffer(hint, along(values, axis, ndim) if values.ndim else values)
