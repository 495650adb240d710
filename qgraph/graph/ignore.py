# SPDX-License-Identifier: Apache-2.0
"""What the user wants left in float: globs, op kinds, or a predicate on nodes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qgraph.errors import ConfigError
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.provenance import module_path

Pattern = str | Callable[[Node], bool]


def names_of(node: Node) -> Iterator[str]:
    """All names a user may know a node by: node, module path, parameters it reads, op kind."""
    yield node.name
    yield module_path(node)
    yield kind(node).value
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield str(source.target)


@dataclass(frozen=True)
class Ignore:
    """Patterns of nodes that stay in float.

    Attributes:
        patterns: globs on node names, module paths, parameter names or op kinds; or callables
            ``node -> bool``. A glob on a module path also covers what lies inside it.

    >>> Ignore(("head*", "softmax"))
    Ignore(patterns=('head*', 'softmax'))
    """

    patterns: tuple[Pattern, ...] = ()

    @classmethod
    def of(cls, patterns: Pattern | Iterable[Pattern]) -> Ignore:
        """Build from one pattern or several."""
        if isinstance(patterns, str) or callable(patterns):
            return cls((patterns,))
        return cls(tuple(patterns))

    def matches(self, node: Node) -> bool:
        """Whether any pattern covers the node."""
        return any(_covers(pattern, node) for pattern in self.patterns)

    def check(self, module: GraphModule) -> None:
        """Raise `ConfigError` for a pattern that covers nothing in the graph."""
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        for pattern in self.patterns:
            if not any(_covers(pattern, node) for node in nodes):
                kinds = ", ".join(k.value for k in OpKind)
                paths = sorted({module_path(n) for n in nodes} - {""})[:8]
                msg = (
                    f"ignore pattern {pattern!r} matches nothing; give a glob on module paths "
                    f"(such as {paths}), node or parameter names, or an op kind ({kinds})"
                )
                raise ConfigError(msg)


def _covers(pattern: Pattern, node: Node) -> bool:
    if callable(pattern):
        return bool(pattern(node))
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        for name in names_of(node)
        if name
    )
