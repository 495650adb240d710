# SPDX-License-Identifier: Apache-2.0
"""Rewrites in three parts: a pattern, a check that gives a reason, and the replacement.

The least that a rewriting pass has to say; the walk over the graph, the record of refusals and
the removal of what is no longer read are done here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.errors import PassError
from qgraph.graph.matching import Call, Match, matches
from qgraph.pipeline import Pass


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces every match of a pattern.

    Subclasses give `pattern` and `rewrite`, and `check` where not every match will do. Place
    rewrites of the float graph before `plan-sites`, or transport statistics yourself.

    Example:
        >>> @dataclass(frozen=True)                                       # doctest: +SKIP
        ... class DropDoubleNegation(Rewrite):
        ...     name: ClassVar[str] = "drop-double-negation"
        ...     promise: ClassVar[Promise] = Promise.IDENTICAL
        ...
        ...     def pattern(self):
        ...         return call(aten.neg.default, call(aten.neg.default, value("x")))
        ...
        ...     def rewrite(self, module, match, context):
        ...         return match["x"]
    """

    @abstractmethod
    def pattern(self) -> Call:
        """What to look for; see `qgraph.graph.matching`."""

    def check(self, match: Match, context: Context) -> str:
        """Why this match must be left alone, or ""; reasons go into the report."""
        del match, context
        return ""

    @abstractmethod
    def rewrite(self, module: GraphModule, match: Match, context: Context) -> Node:
        """The node that takes the place of ``match.root``; new nodes through `insert_call`."""

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        changed = False
        for match in matches(module, self.pattern()):
            reason = self.check(match, context)
            if reason:
                context.record(self.name, match.root, "refused", reason)
                continue
            self._replace(match, self.rewrite(module, match, context))
            context.record(self.name, match.root, "applied", "rewritten")
            changed = True
        return changed

    def _replace(self, match: Match, new: object) -> None:
        if not isinstance(new, Node):
            msg = f"{self.name}: rewrite() must return the node that replaces {match.root.name}, "
            raise PassError(f"{msg}got {new!r}", pass_name=self.name, node=match.root.name)
        if new is match.root:
            msg = f"{self.name}: rewrite() returned {match.root.name} itself; refuse it in check()"
            raise PassError(msg, pass_name=self.name, node=match.root.name)
        match.root.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for node in match.calls:
            if not node.users and node is not new:
                node.graph.erase_node(node)
