# SPDX-License-Identifier: Apache-2.0
"""The plan: what is to be quantized, edge by edge, and what was decided there and why.

Passes fill it (`plan-sites`), decide formats in it (`choose-ranges`, `use-dual-regions`, ...),
and `insert-quantizers` writes it into the graph. Until then the graph is float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from torch.fx import Node

from qgraph.formats import Encoding
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind


class Role(StrEnum):
    """What flows along a quantized edge."""

    ACTIVATION = "activation"
    WEIGHT = "weight"


@dataclass(eq=False, slots=True, kw_only=True)
class Site:
    """One edge to be quantized.

    Attributes:
        edge: consumer and argument path.
        role: activation or weight.
        kind: kind of the consumer.
        bits: width asked for.
        axis: activation: contraction axis; weight: output-channel axis (negative counts from
            the end), or None where neither makes sense (adds).
        encoding: the decision, None while undecided.
        decided_by: name of the pass that decided.
        reason: why, in a few words.
    """

    edge: Edge
    role: Role
    kind: OpKind
    bits: int
    axis: int | None = None
    encoding: Encoding | None = None
    decided_by: str = ""
    reason: str = ""

    @property
    def value(self) -> Node:
        """The node whose value is quantized."""
        return self.edge.source

    def decide(self, encoding: Encoding, by: str, reason: str = "") -> None:
        """Set or replace the decision."""
        self.encoding, self.decided_by, self.reason = encoding, by, reason


@dataclass
class Plan:
    """All sites in graph order."""

    sites: list[Site] = field(default_factory=list)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def add(self, site: Site) -> None:
        """Append a site; edges are unique."""
        self.sites.append(site)

    def at(self, edge: Edge) -> Site | None:
        """The site of an edge, if it is one."""
        return next((s for s in self.sites if s.edge == edge), None)

    def of(self, consumer: Node) -> list[Site]:
        """The sites of one consumer."""
        return [s for s in self.sites if s.edge.consumer is consumer]

    def weights(self) -> list[Site]:
        """Weight sites."""
        return [s for s in self.sites if s.role is Role.WEIGHT]

    def activations(self) -> list[Site]:
        """Activation sites."""
        return [s for s in self.sites if s.role is Role.ACTIVATION]

    def by_value(self, *, undecided_only: bool = False) -> dict[tuple[Node, int], list[Site]]:
        """Activation sites grouped by (value, bits): each group shares one quantizer."""
        groups: dict[tuple[Node, int], list[Site]] = {}
        for site in self.activations():
            if not (undecided_only and site.encoding is not None):
                groups.setdefault((site.value, site.bits), []).append(site)
        return groups

    def remove(self, site: Site) -> None:
        """Leave an edge in float."""
        self.sites.remove(site)
