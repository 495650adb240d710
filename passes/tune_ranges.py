# SPDX-License-Identifier: Apache-2.0
"""Tune activation ranges and log-affine tables by what the whole network's outputs lose."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qgraph.calibration.filtered_loss import objective_of
from qgraph.calibration.global_tuning import Schedule, WholeNetwork, descend
from qgraph.calibration.loader import adapter
from qgraph.calibration.streams import Shelf, begin, split
from qgraph.calibration.student import without_quantizers
from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.graph.build import shallow_copy
from qgraph.graph.extract import extract
from qgraph.pipeline import Fact, Pass, Promise

LOGGER = logging.getLogger("qgraph")
GUARD_BATCH = 32


@dataclass(frozen=True)
class TuneRanges(Pass):
    """Fine-tune every activation step and every log-affine slope and offset by ``loss=``.

    The best scale for a tensor is not the best one for the task, and for box regression the two
    lie far apart (Reg-PTQ, CVPR 2024, figure 3). So after the usual search all steps move together
    under the objective of ``qgraph.compile(..., loss=)``, such as `FilteredGlobalLoss`, and with
    them, where a rate is given, what rounding has shifted: biases, and scales of rounded weights.
    Nothing changes unless the objective fell on samples held out. Without ``loss=`` the pass does
    nothing.

    Attributes:
        steps, batch: Adam steps, samples per step.
        step_lr: rate of the logarithm of activation steps.
        table_lr: rate of log-affine slopes and offsets.
        bias_lr: rate of biases, in standard deviations of their product's output; 0: they stay.
        scale_lr: rate of the logarithm of weight scales, where codes are settled; 0: they stay.
        max_samples: calibration samples used.

    Raises:
        ConfigError: negative steps or an empty batch.
        CalibrationError: the loader is unusable.
        PassError: weights are rounded, and no earlier pass kept the float network.
    """

    name: ClassVar[str] = "tune-ranges"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})

    steps: int = 120
    batch: int = 16
    step_lr: float = 4e-3
    table_lr: float = 1e-2
    bias_lr: float = 1e-3
    scale_lr: float = 5e-4
    max_samples: int | None = 256

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            msg = f"steps is {self.steps}, batch {self.batch}; allowed: steps >= 0, batch >= 1"
            raise ConfigError(msg)

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        objective = objective_of(context.loss)
        if objective is None:
            context.record(self.name, "outputs", "kept", "no teacher-student loss= was given")
            return False
        exact = self._teacher(module, context)
        adapt = context.adapt or adapter(module)
        shelf = Shelf(max_memory=context.max_memory)
        stream = begin(exact, context.batches, adapt, shelf, max_samples=self.max_samples)
        network = WholeNetwork(module, exact, stream, objective)
        report_filter(context, self.name, network)
        return self._tune(network, context)

    def _teacher(self, module: GraphModule, context: Context) -> GraphModule:
        """The float network: behind rounding, the quantized graph holds codes of weights only."""
        if context.reference is not None:
            return context.reference
        twin = shallow_copy(module)
        without_quantizers(twin, by=self.name)
        return twin

    def _tune(self, network: WholeNetwork, context: Context) -> bool:
        module = network.module
        size, batch = (GUARD_BATCH, self.batch) if network.stream.batching.dynamic else (1, 1)
        train, guard = split(network.stream, context.seed)
        guard = guard if any(guard) else train
        before = network.mean_loss(extract(module, network.inputs, network.made), guard, size)
        learned = network.learned(train, size)
        schedule = Schedule(
            self.steps, batch, self.step_lr, self.table_lr, self.bias_lr, self.scale_lr
        )

        def tick(step: int) -> None:
            if step % 10 == 0:
                context.progress_step(self.name, step, self.steps)

        descend(network, learned, schedule, train, seed=context.seed, tick=tick)
        changed = shallow_copy(module)
        moved = learned.write(changed)
        after = network.mean_loss(extract(changed, network.inputs, network.made), guard, size)
        numbers = {"before": before, "after": after, "steps": float(moved),
                   "tables": float(len(learned.distinct()))}  # fmt: skip
        if not after < before:
            reason = "the held-out objective did not fall"
            context.record(self.name, "outputs", "refused", reason, **numbers)
            return False
        adopt(module, changed)
        context.record(
            self.name, "outputs", "applied", f"objective {before:.4g} -> {after:.4g}", **numbers
        )
        return True


def adopt(module: GraphModule, changed: GraphModule) -> None:
    """Take over the graph and the tensors of a changed copy."""
    for name, value in changed.named_buffers():
        if "." not in name and not hasattr(module, name):
            module.register_buffer(name, value)
    module.graph = changed.graph
    module.graph.lint()
    module.recompile()


def report_filter(context: Context, name: str, network: WholeNetwork) -> None:
    """Put into the report what the objective's filter keeps; warn when that is nothing."""
    kept = network.kept()
    if kept is None:
        return
    numbers = {
        "rows": float(kept.rows), "confident": float(kept.confident), "kept": float(kept.kept),
        "mean_overlap": kept.mean_overlap,
    }  # fmt: skip
    if kept.kept:
        context.record(name, "loss filter", "applied", str(kept), **numbers)
        return
    reason = f"no box survives the filter, so only classes count: {kept}"
    LOGGER.warning("%s; lower theta_c or theta_i, or check decode", reason)
    context.record(name, "loss filter", "refused", reason, **numbers)
