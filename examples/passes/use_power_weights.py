# SPDX-License-Identifier: Apache-2.0
"""A pass with a format of its own: weights that are 0 or a power of two, so that products shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph import ConfigError, Context, Fact, Pass, Promise
from qgraph.formats import LevelEncoding
from qgraph.graph.build import attribute
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Site

CLIPS = (
    1.0,
    0.9,
    0.8,
    0.7,
)  # shares of a row's largest weight that the largest level may stand for


def power_levels(bits: int) -> Tensor:
    """int32 levels 0, +-1, +-2, +-4, ...: 2^(b-1) - 1 magnitudes on each side.

    >>> power_levels(3).tolist()
    [-4, -2, -1, 0, 1, 2, 4]
    """
    if not 2 <= bits <= 4:
        msg = f"power-of-two weights have 2 to 4 bits (shifts up to 6), got {bits}"
        raise ConfigError(msg)
    positive = 1 << torch.arange((1 << (bits - 1)) - 1, dtype=torch.int32)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.int32), positive])


def power_encoding(weight: Tensor, bits: int) -> LevelEncoding:
    """Per output channel (axis 0), the clip of the smallest squared error."""
    levels = power_levels(bits)
    rows = weight.detach().flatten(1)
    reach = rows.abs().amax(1).clamp(min=1e-12)
    found = [_encoding(reach * clip / float(levels[-1]), levels, bits) for clip in CLIPS]
    errors = torch.stack([(each.fake(rows) - rows).square().sum(1) for each in found])
    scales = torch.stack([each.scale for each in found])
    best = errors.argmin(0)
    return _encoding(scales.gather(0, best[None]).squeeze(0), levels, bits)


def _encoding(scale: Tensor, levels: Tensor, bits: int) -> LevelEncoding:
    return LevelEncoding.nearest("signed powers of two", scale, levels, storage_bits=bits, axis=0)


@dataclass(frozen=True)
class UsePowerWeights(Pass):
    """Give the weights of linears and convolutions power-of-two levels.

    Attributes:
        bits: of a weight, 2 to 4; sites that were planned wider are left alone.
    """

    name: ClassVar[str] = "use-power-weights"
    promise: ClassVar[Promise] = Promise.IDENTICAL  # it decides; insert-quantizers writes
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    bits: int = 4

    def __post_init__(self) -> None:
        power_levels(self.bits)

    def run(self, module: GraphModule, context: Context) -> bool:
        """Decide; the graph does not change yet."""
        for site in context.plan.weights():
            reason = self._refusal(site)
            if reason:
                context.record(self.name, site.edge, "kept", reason)
                continue
            weight = attribute(module, str(site.value.target))
            site.decide(power_encoding(weight, self.bits), self.name, "powers of two")
            context.record(self.name, site.edge, "applied", "powers of two")
        return False

    def _refusal(self, site: Site) -> str:
        if site.kind not in {OpKind.LINEAR, OpKind.CONV} or site.axis != 0:
            return f"a {site.kind} has no rows of weights"
        return "" if site.bits <= self.bits else f"planned at {site.bits} bits"
