# SPDX-License-Identifier: Apache-2.0
"""Give sensitive parts of the network more bits, by an explicit rule that the report prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.formats import check_bits
from qgraph.graph.ignore import Ignore
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.plan import Role
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class RaisePrecision(Pass):
    """Plan at least `high_bits` for chosen products; each is reported with its reason.

    Attributes:
        high_bits: the floor.
        high_kinds: op kinds that get it (stems, necks and upscaling are convolutions).
        heads: products from which no attention can be reached any more get it: the last
            projections and the heads, whose error nothing averages out.
        high: further globs on module paths, node or parameter names.
        roles: which operands: ``"weight"``, ``"activation"``.
    """

    name: ClassVar[str] = "raise-precision"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    high_bits: int = 8
    high_kinds: tuple[str, ...] = ("conv", "conv_transpose")
    heads: bool = True
    high: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("weight", "activation")

    def __post_init__(self) -> None:
        check_bits(self.high_bits)
        for role in self.roles:
            if role not in {item.value for item in Role}:
                what = "role"
                raise unknown_name(what, role, [item.value for item in Role])
        for each in self.high_kinds:
            if each not in {item.value for item in OpKind}:
                what = "op kind"
                raise unknown_name(what, each, [item.value for item in OpKind])

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        behind = behind_attention(module.graph.nodes) if self.heads else set()
        chosen = Ignore.of(self.high)
        if self.high:
            chosen.check(module)
        raised: dict[Node, str] = {}
        for site in context.plan:
            node = site.edge.consumer
            reason = ""
            if site.kind.value in self.high_kinds:
                reason = f"{site.kind.value} layers"
            elif node in behind:
                reason = "behind the last attention"
            elif chosen.matches(node):
                reason = "asked for"
            if reason and site.role.value in self.roles and site.bits < self.high_bits:
                site.bits = self.high_bits
                raised[node] = reason
        only = "" if len(self.roles) == len(Role) else f" ({', '.join(self.roles)})"
        for node, reason in raised.items():
            context.record(
                self.name, node, "applied", f"{self.high_bits} bits: {reason}{only}",
                bits=float(self.high_bits),
            )  # fmt: skip
        return False


def behind_attention(nodes: Iterable[Node]) -> set[Node]:
    """Nodes that attention comes before, but none behind; empty without attention."""
    order = list(nodes)
    before: set[Node] = set()
    for node in order:
        if any(i in before or kind(i) is OpKind.SOFTMAX for i in node.all_input_nodes):
            before.add(node)
    reaches: set[Node] = set()
    for node in reversed(order):
        if kind(node) is OpKind.SOFTMAX or any(user in reaches for user in node.users):
            reaches.add(node)
    contexts = {user for node in order if kind(node) is OpKind.SOFTMAX for user in node.users}
    return before - reaches - contexts
