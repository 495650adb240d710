# SPDX-License-Identifier: Apache-2.0
"""Give weights the log-affine format where it measurably fits them better than a uniform one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.calibration import weight_encoding
from qgraph.calibration.decibels import decibels
from qgraph.calibration.log_affine_fit import log_affine_encoding
from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.formats import Encoding
from qgraph.formats.log_affine import DECODERS, Decoder
from qgraph.graph.build import attribute
from qgraph.graph.detection_heads import find_heads
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Site
from qgraph.graph.tensors import weight_keys
from qgraph.pipeline import Fact, Pass, Promise

PARTS = ("head", "regression", "all")
MAX_BITS = 5  # beyond, uniform steps are finer than what the logarithm could gain
FEW = 64  # a channel with fewer weights than this shares one table with all others


@dataclass(frozen=True)
class UseLogAffine(Pass):
    """Fit the log-affine format to weights of the head, and keep it where its error is smaller.

    Peaked weights gain (Laplace: 0.7 dB at 4 bits), flat ones lose (Gaussian: 0.9 dB), so each
    tensor is measured against the uniform format with its searched clip; uniform is the fallback.
    A weight that several pyramid levels read has one quantizer.

    Attributes:
        part: weights of the ``head``, of the ``regression`` branch, or ``all``.
        min_gain_db: by how much the error must fall; minus infinity forces the format.
        decoder: ``exact``, or ``shift`` for targets without multipliers (3 to 4 bits at most).
        reserve_zero: keep an exact zero, for pruned weights.
        boxes, classes, head: globs, as in `PlanHeads`.
        skip: globs of consumers that stay uniform.
    """

    name: ClassVar[str] = "use-log-affine"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    part: str = "head"
    min_gain_db: float = 0.0
    decoder: str = "exact"
    reserve_zero: bool = False
    boxes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            what = "part of the network"
            raise unknown_name(what, self.part, PARTS)
        if self.decoder not in DECODERS:
            what = "decoder"
            raise unknown_name(what, self.decoder, DECODERS)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        members = self._members(module, context)
        keys = weight_keys(module)
        groups: dict[tuple[str, int, int | None], list[Site]] = {}
        for site in context.plan.weights():
            consumer = site.edge.consumer
            inside = members is None or consumer in members
            if site.encoding is None and site.kind is not OpKind.EMBEDDING and inside:
                target = str(site.value.target)
                key = (keys.get(target, target), site.bits, site.axis)
                groups.setdefault(key, []).append(site)
        for (name, bits, _), sites in groups.items():
            if context.left_alone(self.name, name, sites, self.skip):
                continue
            if bits > MAX_BITS:
                context.record(self.name, name, "kept", f"{bits} bits: uniform steps are finer")
            else:
                self._decide(module, context, name, sites)
        return False

    def _members(self, module: GraphModule, context: Context) -> frozenset[Node] | None:
        """Nodes of the part; None for all, none at all where there is no head."""
        if self.part == "all":
            return None
        heads = find_heads(module, boxes=self.boxes, classes=self.classes, head=self.head)
        if isinstance(heads, str):
            context.record(self.name, "outputs", "refused", heads)
            return frozenset()
        return heads.head if self.part == "head" else heads.regression

    def _decide(self, module: GraphModule, context: Context, name: str, sites: list[Site]) -> None:
        site = sites[0]
        weight = attribute(module, str(site.value.target)).detach()
        axis = None if site.axis is None else site.axis % weight.ndim
        uniform: Encoding = weight_encoding(weight, site.bits, axis)
        small = axis is None or weight.numel() // weight.shape[axis] < FEW
        decoder: Decoder = "shift" if self.decoder == "shift" else "exact"
        if decoder == "shift" and site.bits > 4:
            context.record(self.name, name, "refused", f"{site.bits} bits: too many to shift")
            return
        logarithmic = log_affine_encoding(
            weight, site.bits, axis=None if small else axis, decoder=decoder,
            reserve_zero=self.reserve_zero and site.bits > 2,
        )  # fmt: skip
        errors = [float((e.fake(weight) - weight).double().square().mean())
                  for e in (uniform, logarithmic)]  # fmt: skip
        gain = decibels(errors[0], errors[1])
        numbers = {"gain_db": gain, "bits": float(site.bits), "weights": float(weight.numel())}
        if gain <= self.min_gain_db:
            context.record(
                self.name, name, "kept", f"uniform fits better by {-gain:.2f} dB", **numbers
            )
            return
        reason = f"error {gain:.2f} dB below uniform"
        context.record(self.name, name, "applied", reason, **numbers)
        for each in sites:
            each.decide(logarithmic, self.name, reason)
