# SPDX-License-Identifier: Apache-2.0
"""What a pass asks the calibration sweep for: a statistic of a value."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for one statistic of the value that `node` computes.

    Attributes:
        node: the producer of the value.
        kind: class name of the statistic in `qgraph.calibration` (``"Histogram"``, ...).
        options: its keyword options, hashable, so that equal requests are served once.
        partners: further nodes, for statistics over several values at the same rows.
    """

    node: Node
    kind: str
    options: tuple[tuple[str, object], ...] = ()
    partners: tuple[Node, ...] = field(default=())
