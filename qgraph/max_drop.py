# SPDX-License-Identifier: Apache-2.0
"""The cheapest bits whose measured drop of a metric stays within a limit."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qgraph import passes
from qgraph.errors import ConfigError
from qgraph.model import QuantizedModel
from qgraph.pipeline import Pipeline
from qgraph.pipelines import budgeted

LOGGER = logging.getLogger("qgraph")
STEPS = 32  # efforts tried lie on this grid, by bisection: at most 6 compilations
Metric = Callable[[Callable[..., Any]], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One assignment that was measured.

    Attributes:
        effort: place between the cheapest (0) and the dearest (1) assignment.
        drop: metric of the float model minus that of this one.
        model: the quantized model.
    """

    effort: float
    drop: float
    model: QuantizedModel


def check_limits(metric_fn: Metric | None, max_drop: float | None) -> None:
    """Raise `ConfigError` unless both are given, or neither, and the limit is a number >= 0."""
    if (metric_fn is None) != (max_drop is None):
        given = "metric_fn" if max_drop is None else "max_drop"
        msg = f"metric_fn and max_drop belong together; only {given} was given"
        raise ConfigError(msg)
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        msg = f"max_drop is {max_drop}; allowed: 0 or more"
        raise ConfigError(msg)


def cheapest_within(
    build: Callable[[Pipeline], QuantizedModel],
    pipeline: Pipeline,
    metric_fn: Metric,
    *,
    reference: float,
    max_drop: float,
) -> QuantizedModel:
    """Bisect over `AssignBits.effort`, and return the cheapest model that holds the limit.

    If none does, or the search is interrupted, the best so far: the cheapest that held, else the
    smallest drop. The report notes what was tried.

    Args:
        build: compiles one pipeline.
        pipeline: any; bits are assigned behind calibration.
        metric_fn: a callable with the model's signature -> a number, larger is better.
        reference: the metric of the float model.
        max_drop: allowed difference, in the metric's units.
    """
    trials: list[Trial] = []

    def holds(step: int) -> bool:
        effort = step / STEPS
        model = build(with_effort(pipeline, effort))
        drop = reference - float(metric_fn(model))
        trials.append(Trial(effort, drop, model))
        LOGGER.info("effort %.3f: the metric drops by %.4g of %.4g", effort, drop, max_drop)
        return drop <= max_drop

    try:
        low, high = -1, STEPS
        if holds(STEPS):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if holds(middle) else (middle, high)
    except KeyboardInterrupt:
        if not trials:
            raise
        LOGGER.warning("interrupted: the best of %d assignments is returned", len(trials))
    return _noted(trials, max_drop)


def with_effort(pipeline: Pipeline, effort: float) -> Pipeline:
    """A copy that assigns bits at an effort, within the budget it has."""
    name = passes.AssignBits.name
    built = pipeline if any(p.name == name for p in pipeline) else budgeted(pipeline, {})
    item = built[name]
    assert isinstance(item, passes.AssignBits)
    if item.mode == "uniform" and len(item.weight_choices) == 1:
        built = budgeted(built, dict(item.budget))
        item = built[name]
        assert isinstance(item, passes.AssignBits)
    return built.replace(name, dataclasses.replace(item, effort=effort))


def _noted(trials: list[Trial], max_drop: float) -> QuantizedModel:
    within = [t for t in trials if t.drop <= max_drop]
    best = (
        min(within, key=lambda t: t.effort) if within
        else min(trials, key=lambda t: (t.drop if math.isfinite(t.drop) else math.inf, t.effort))
    )  # fmt: skip
    verdict = "holds" if within else "is missed: no assignment holds it, this one drops least"
    told = ", ".join(
        f"{t.effort:.3f}: {t.drop:.4g}" for t in sorted(trials, key=lambda t: t.effort)
    )
    note = (
        f"max_drop {max_drop:g} {verdict}; drop {best.drop:.4g} at effort {best.effort:.3f} "
        f"(tried {told})"
    )
    report = best.model.report
    best.model.report = dataclasses.replace(report, notes=(*report.notes, note))
    return best.model
