# SPDX-License-Identifier: Apache-2.0
"""Plan a detector's head: last layers, adds, and no scale that boxes and classes would share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.graph.detection_heads import DetectionHeads, find_heads
from qgraph.graph.ops import OpKind, product
from qgraph.graph.plan import Site
from qgraph.pipeline import Fact, Pass, Promise

LAST = ("float", "8")
ADDS = ("float", "8")
PARTS = ("all", "backbone and neck")


@dataclass(frozen=True)
class PlanHeads(Pass):
    """Apply a detector's rules to the plan (full quantization of Reg-PTQ, section 2 of the notes).

    A value that holds boxes and class scores together is never quantized: box coordinates in
    pixels beside probabilities leave every score at code 0, and detection quality at zero. Such
    sites are taken off the plan, with a line in the report.

    Attributes:
        last: the last prediction layers stay ``float``, or take at least ``8`` bits.
        adds: residual and pyramid additions at ``8`` bits where they can (`choose-ranges` still
            spares those that would lose too much), or ``float``, as the paper has it.
        parts: ``all``, or ``backbone and neck``: the head stays in float.
        boxes, classes: globs of the box and class values, where shapes do not tell.
        head: globs of the head's nodes, instead of the branches found.

    A graph that is no detector is left as it is, with the reason.
    """

    name: ClassVar[str] = "plan-heads"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    last: str = "float"
    adds: str = "8"
    parts: str = "all"
    boxes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, got, allowed in (
            ("treatment of last layers", self.last, LAST),
            ("treatment of adds", self.adds, ADDS),
            ("part of a detector", self.parts, PARTS),
        ):
            if got not in allowed:
                raise unknown_name(what, got, allowed)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        heads = find_heads(module, boxes=self.boxes, classes=self.classes, head=self.head)
        if isinstance(heads, str):
            context.record(self.name, "outputs", "refused", heads)
            return False
        context.record(self.name, "outputs", "applied", heads.describe())
        for site in list(context.plan):
            reason = self._float_because(site, heads)
            if reason:
                context.plan.remove(site)
                if site.edge.path == (0,):
                    context.record(self.name, site.edge.consumer, "kept", reason)
        return False

    def _float_because(self, site: Site, heads: DetectionHeads) -> str:
        """Why a site stays in float; '' if it does not."""
        consumer = site.edge.consumer
        if site.value in heads.joined:
            return "float: boxes and class scores would share one scale"
        if consumer in heads.last and self.last == "float":
            return "float: a last prediction layer"
        if site.kind is OpKind.ADD and self.adds == "float":
            return "float: an addition"
        if self.parts != "all" and consumer in heads.head and product(consumer) is not None:
            return "float: in the head"
        return ""
