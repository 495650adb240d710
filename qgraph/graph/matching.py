# SPDX-License-Identifier: Apache-2.0
"""Patterns over graphs: say what to look for as data, get back the nodes that matched.

    pattern = call(aten.max_pool2d.default, call(aten.relu.default, value("x"), name="relu"))
    for match in matches(module, pattern):
        match.root, match["x"], match["relu"]

Operands are compared by position as far as the pattern gives them; what comes after is free.
A name that occurs twice must stand for the same node both times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

from torch.fx import GraphModule, Node

Target = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Value:
    """Any node. `constant` narrows it: True to stored tensors, False to all others."""

    name: str
    constant: bool | None = None


@dataclass(frozen=True, slots=True)
class Literal:
    """Any argument that is no node: a number, a list of axes, None."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one of `targets` whose first arguments match `operands`."""

    targets: tuple[Target, ...]
    operands: tuple[object, ...]
    name: str = ""
    commutes: bool = False


Pattern = Call | Value | Literal


def call(
    target: Target | Iterable[Target], *operands: object, name: str = "", commutes: bool = False
) -> Call:
    """A pattern for a call.

    Args:
        target: the op, or several of which any will do.
        *operands: patterns, or literals that must be equal.
        name: under which the match offers the node; may be left out.
        commutes: the operands may come in any order.
    """
    targets = (target,) if callable(target) else tuple(target)
    return Call(targets, operands, name, commutes)


def value(name: str) -> Value:
    """A pattern for any value."""
    return Value(name)


def constant(name: str) -> Value:
    """A pattern for a stored tensor (a get_attr node)."""
    return Value(name, constant=True)


def literal(name: str) -> Literal:
    """A pattern for an argument that is no node."""
    return Literal(name)


@dataclass(frozen=True)
class Match:
    """Where a pattern was found.

    Attributes:
        root: the node that the outermost call matched.
        nodes: named nodes.
        literals: named arguments that are no nodes.
        calls: all nodes that calls of the pattern matched, the root first.
    """

    root: Node
    nodes: dict[str, Node] = field(default_factory=dict)
    literals: dict[str, object] = field(default_factory=dict)
    calls: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def read_elsewhere(self) -> str:
        """Why the inner nodes cannot go away ("relu is also read by add_1"), or ""."""
        inside = set(self.calls)
        for node in self.calls[1:]:
            for user in node.users:
                if user not in inside:
                    return f"{node.name} is also read by {user.name}"
        return ""


def find(pattern: Call, node: Node) -> Match | None:
    """The match of a pattern whose root is `node`, or None."""
    found = _Bindings({}, {}, ())
    bound = _bind(pattern, node, found)
    if bound is None:
        return None
    return Match(node, bound.nodes, bound.literals, bound.calls)


def matches(module: GraphModule, pattern: Call) -> Iterator[Match]:
    """All matches in graph order; the graph may be changed while iterating."""
    for node in list(module.graph.nodes):
        if not node._erased and (found := find(pattern, node)) is not None:
            yield found


@dataclass(frozen=True, slots=True)
class _Bindings:
    nodes: dict[str, Node]
    literals: dict[str, object]
    calls: tuple[Node, ...]

    def with_node(self, name: str, node: Node) -> _Bindings | None:
        if name and self.nodes.get(name, node) is not node:
            return None
        nodes = {**self.nodes, name: node} if name else self.nodes
        return _Bindings(nodes, self.literals, self.calls)

    def with_literal(self, name: str, item: object) -> _Bindings | None:
        if name in self.literals and self.literals[name] != item:
            return None
        return _Bindings(self.nodes, {**self.literals, name: item}, self.calls)

    def with_call(self, node: Node) -> _Bindings:
        return _Bindings(self.nodes, self.literals, (*self.calls, node))


def _bind(pattern: object, item: object, found: _Bindings) -> _Bindings | None:
    if isinstance(pattern, Literal):
        return None if isinstance(item, Node) else found.with_literal(pattern.name, item)
    if isinstance(pattern, Value):
        if not isinstance(item, Node):
            return None
        if pattern.constant is not None and (item.op == "get_attr") is not pattern.constant:
            return None
        return found.with_node(pattern.name, item)
    if isinstance(pattern, Call):
        return _bind_call(pattern, item, found)
    return found if not isinstance(item, Node) and item == pattern else None


def _bind_call(pattern: Call, item: object, found: _Bindings) -> _Bindings | None:
    if not isinstance(item, Node) or item.op != "call_function":
        return None
    if item.target not in pattern.targets or len(item.args) < len(pattern.operands):
        return None
    named = found.with_node(pattern.name, item)
    if named is None:
        return None
    orders = permutations(pattern.operands) if pattern.commutes else (pattern.operands,)
    for operands in orders:
        bound: _Bindings | None = named.with_call(item)
        for inner, argument in zip(operands, item.args, strict=False):
            bound = None if bound is None else _bind(inner, argument, bound)
        if bound is not None:
            return bound
    return None
