# SPDX-License-Identifier: Apache-2.0
"""Edges: a consumer and the path of one of its arguments, where quantizers sit.

fx has no edges, and replacing a producer in ``matmul(x, x)`` or ``cat([x, x])`` would replace
both operands; an `Edge` addresses exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

Path = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """One argument of one consumer.

    Attributes:
        consumer: the node that reads the value.
        path: position or keyword name, then indices into nested lists.

    >>> # Edge(cat, (0, 1)) is the second tensor of cat([a, b])
    """

    consumer: Node
    path: Path

    @property
    def source(self) -> Node:
        """The node whose value flows along this edge."""
        value: Any = self.consumer.kwargs if isinstance(self.path[0], str) else self.consumer.args
        for step in self.path:
            value = value[step]
        assert isinstance(value, Node), f"{self} holds {value!r}, not a node"
        return value

    def redirect(self, source: Node) -> None:
        """Let the consumer read `source` on this edge, and on no other."""
        head, rest = self.path[0], self.path[1:]
        if isinstance(head, str):
            self.consumer.update_kwarg(head, _replaced(self.consumer.kwargs[head], rest, source))
        else:
            self.consumer.update_arg(head, _replaced(self.consumer.args[head], rest, source))

    def __str__(self) -> str:
        return f"{self.consumer.name}[{'.'.join(map(str, self.path))}]"


def _replaced(value: Any, path: Path, new: Node) -> Any:
    if not path:
        return new
    items = list(value)
    items[path[0]] = _replaced(items[path[0]], path[1:], new)  # type: ignore[index]
    return type(value)(items) if isinstance(value, tuple) else items


def in_edges(node: Node) -> Iterator[Edge]:
    """All edges into `node`, in argument order."""
    for position, argument in enumerate(node.args):
        yield from _walk(node, (position,), argument)
    for name, argument in node.kwargs.items():
        yield from _walk(node, (name,), argument)


def out_edges(node: Node) -> Iterator[Edge]:
    """All edges that leave `node`, in the order of its users."""
    for user in node.users:
        yield from (edge for edge in in_edges(user) if edge.source is node)


def _walk(consumer: Node, path: Path, argument: Any) -> Iterator[Edge]:
    if isinstance(argument, Node):
        yield Edge(consumer, path)
    elif isinstance(argument, (list, tuple)):
        for index, item in enumerate(argument):
            yield from _walk(consumer, (*path, index), item)
