# SPDX-License-Identifier: Apache-2.0
"""What passes share while a pipeline runs: data, statistics, the plan, the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.fx import GraphModule, Node

from qgraph.graph.ignore import Ignore, Pattern
from qgraph.graph.plan import Plan, Site
from qgraph.graph.verify import Sample

if TYPE_CHECKING:
    from qgraph.calibration.fused import FusedStatistics
    from qgraph.pipeline import Pipeline

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the report: what a pass did, or refused to do, at a site.

    Attributes:
        by: name of the pass.
        site: node or edge name.
        outcome: ``applied``, ``kept`` or ``refused``.
        reason: why.
        numbers: the measured figures behind it.
    """

    by: str
    site: str
    outcome: Literal["applied", "kept", "refused"]
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass
class Context:
    """State of one compilation.

    Attributes:
        sample: inputs that verification replays.
        batches: re-iterable calibration batches, as the user gave them.
        adapt: turns a batch into (args, kwargs) of the traced module.
        num_batches: how many the sweep saw.
        reference: the float graph after canonicalisation (set by the compiler), never changed.
        statistics: filled by the sweep, by value.
        plan: sites and decisions.
        decisions: the record for the report.
        ignore: what stays in float.
        facts: what holds now.
        row_masks: optional callable (args, kwargs) -> bool mask [B, T] of rows that count.
        sensitivity: (layer, bits, cost, chosen) of widths that were tried, for the report.
        loss: task loss or teacher-student objective for passes that take one.
        seed: of every random choice.
        latency: (product, bits) -> predicted milliseconds, for budgets in milliseconds.
    """

    sample: Sample
    batches: Iterable[Any]
    adapt: Callable[[Any], Batch] | None = None
    num_batches: int = 0
    reference: GraphModule | None = None
    statistics: dict[Node | tuple[Node, ...], FusedStatistics] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    decisions: list[Decision] = field(default_factory=list)
    ignore: Ignore = field(default_factory=Ignore)
    facts: frozenset[str] = frozenset()
    sensitivity: list[tuple[str, int, float, bool]] = field(default_factory=list)
    pipeline: Pipeline | None = None
    row_masks: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    loss: Any = None
    seed: int = 0
    verify: bool | Literal["full"] = True
    progress: Progress | None = None
    cache_dir: Path | None = None
    max_memory: int | None = None
    latency: Callable[[Node, int], float] | None = None

    def progress_step(self, what: str, done: int, total: int) -> None:
        """Tell the caller how far things are."""
        if self.progress is not None:
            self.progress(what, done, total)

    def left_alone(
        self, by: str, value: object, sites: Iterable[Site], skip: Iterable[Pattern]
    ) -> bool:
        """Whether a pass was asked to skip a consumer of these sites; it says so in the report."""
        asked = Ignore.of(skip)
        skipped = any(asked.matches(site.edge.consumer) for site in sites)
        if skipped:
            self.record(by, value, "kept", "left alone on request")
        return skipped

    def record(
        self, by: str, site: object, outcome: Literal["applied", "kept", "refused"], reason: str,
        **numbers: float,
    ) -> None:  # fmt: skip
        """Add a line to the report."""
        name = site.name if isinstance(site, Node) else str(site)
        given = {key: float(value) for key, value in numbers.items()}  # as they load from a file
        self.decisions.append(Decision(by, name, outcome, reason, given))
