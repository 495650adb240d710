# SPDX-License-Identifier: Apache-2.0
"""Choose the scale of every weight that no other pass gave a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.calibration import weight_encoding
from qgraph.calibration.weight_scales import CLIP_BELOW
from qgraph.context import Context
from qgraph.formats import AffineEncoding
from qgraph.graph.build import attribute
from qgraph.graph.ops import OpKind
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class ChooseWeightScales(Pass):
    """Give every undecided weight a symmetric encoding per output channel, clip by MSE search.

    At 8 bits the whole range is kept. Tables of embeddings are never clipped: they are large, and
    each row is read as it is.

    Attributes:
        norm: exponent of the error (2.0; the published codes use 2.4).
        clip_below: weights of fewer bits are searched (8; `python -m benchmarks.search_effort` says
            what a search at 8 bits would win).
    """

    name: ClassVar[str] = "choose-weight-scales"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    norm: float = 2.0
    clip_below: int = CLIP_BELOW

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        found: dict[tuple[str, int, int | None], AffineEncoding] = {}
        for site in context.plan.weights():
            if site.encoding is None:
                clip = site.bits < self.clip_below and site.kind is not OpKind.EMBEDDING
                key = (str(site.value.target), site.bits, site.axis)
                if key not in found:  # tied weights share one encoding
                    weight = attribute(module, str(site.value.target))
                    found[key] = weight_encoding(
                        weight, site.bits, site.axis, norm=self.norm, clip=clip
                    )
                how = "clip by MSE search" if clip else "whole range"
                site.decide(found[key], self.name, how)
        return False
