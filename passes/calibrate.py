# SPDX-License-Identifier: Apache-2.0
"""The one sweep: gather every statistic that any later pass asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.calibration import all_reduce, build_statistics
from qgraph.calibration.ranks import Ranks
from qgraph.calibration.sweep import collect
from qgraph.context import Context
from qgraph.graph.build import shallow_copy
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run the calibration loader once through the float graph, updating all statistics.

    The float graph at this point becomes the reference that later passes compare with. In a
    torch.distributed job the ranks share the batches, and statistics are merged over ranks.

    Attributes:
        max_batches: stop after so many batches; None uses the whole loader.

    Raises:
        CalibrationError: empty loader, non-finite values, inputs that do not fit.
        RankError: another rank failed or is gone.
    """

    name: ClassVar[str] = "calibrate"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.STATISTICS})

    max_batches: int | None = None

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        asked = [
            request
            for item in (context.pipeline or ())
            for request in item.statistics(module, context)
        ]
        context.reference = shallow_copy(module)
        context.statistics = build_statistics(asked)
        ranks = Ranks.here()
        with ranks.together("calibration"):
            done = collect(
                module, ranks.share(context.batches), context.statistics, adapt=context.adapt,
                row_masks=context.row_masks, progress=context.progress,
                max_batches=None if self.max_batches is None else ranks.quota(self.max_batches),
                allow_empty=ranks.rank > 0,
            )  # fmt: skip
        all_reduce(context.statistics)
        context.num_batches = sum(int(n) for n in ranks.gather(str(done), "counting batches"))
        return False
