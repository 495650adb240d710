# SPDX-License-Identifier: Apache-2.0
"""What all sensitivities share: how they are measured, and the walk over the batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration.loader import Arguments
from qgraph.calibration.objectives import Loss
from qgraph.calibration.sensitivity_state import State
from qgraph.errors import CalibrationError
from qgraph.graph.bit_units import Unit

Ranges = Mapping[Node, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How sensitivities are measured.

    Attributes:
        method: ``fisher``, or ``sqnr``: squared error over signal inside target masks (method notes
            S6), plus `background` times the same outside.
        output: what the outputs are (``plain``, ``sigmoid``, ``softmax``), without a loss.
        loss: (model's output, batch) -> scalar; replaces `output`.
        targets: (model's output, batch) -> bool [B, 1, H, W], for ``sqnr``.
        background: weight of what is no target.
        rows: drawn per product and sample of a batch, so that the cost follows the network's own.
        seed: of rows and projections.
    """

    method: str = "fisher"
    output: str = "plain"
    loss: Loss | None = None
    targets: Callable[[Any, Any], Tensor] | None = None
    background: float = 0.1
    rows: int = 8
    seed: int = 0


class UnitSweep(ABC):
    """Sums of errors of all units at all widths over batches.

    Args:
        module: the float graph, unchanged.
        units: what to measure; pinned ones are left out.
        ranges: exact range of every quantized activation.
        widths: weight bits and activation bits to measure.
        how: see `Probing`.
    """

    def __init__(
        self, module: GraphModule, units: Sequence[Unit], ranges: Ranges,
        widths: tuple[Sequence[int], Sequence[int]], how: Probing,
    ) -> None:  # fmt: skip
        self.module = module
        self.units = [unit for unit in units if unit.pinned is None]
        self.ranges = ranges
        self.weight_bits, self.activation_bits = (tuple(w) for w in widths)
        self.how = how

    @abstractmethod
    def batch(self, batch: Any, adapt: Callable[[Any], Arguments], seed: int) -> dict[str, Tensor]:
        """Errors of one batch by ``<unit>/w`` and ``<unit>/a``, one entry per width."""

    def run(
        self, batches: Iterable[Any], adapt: Callable[[Any], Arguments], state: State,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> int:  # fmt: skip
        """Measure all batches that the state does not hold yet; returns how many there were."""
        size = len(batches) if isinstance(batches, Sized) else 0
        number = 0
        for number, batch in enumerate(batches, start=1):
            if state.wants(number - 1):
                state.add(number - 1, self.batch(batch, adapt, self.how.seed + number))
            if progress is not None:
                progress("sensitivity", number, size)
        if number == 0:
            msg = "the loader gave 0 batches, so no sensitivity can be measured"
            raise CalibrationError(msg)
        return number
