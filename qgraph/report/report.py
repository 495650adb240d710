# SPDX-License-Identifier: Apache-2.0
"""The report of one compilation, as text for a terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from qgraph.atomic import write_file
from qgraph.context import Decision
from qgraph.pipeline import Step
from qgraph.report.accounting import Cost
from qgraph.report.graph_view import GraphNode
from qgraph.report.html import page
from qgraph.report.layers import LayerRecord
from qgraph.report.plain import number, plain
from qgraph.report.samples import SampleImage
from qgraph.report.sensitivity import SensitivityPoint
from qgraph.report.text import table


class _Row(Protocol):
    @property
    def codes(self) -> int: ...
    @property
    def runtime(self) -> Any: ...


class Compared(Protocol):
    """A parity report, such as `QuantizedModel.verify` returns."""

    @property
    def rows(self) -> tuple[Any, ...]:
        """One per quantizer."""
        ...

    @property
    def codes(self) -> int:
        """Codes compared."""
        ...

    @property
    def mismatches(self) -> int:
        """Integer against reference."""
        ...


@dataclass(frozen=True, slots=True)
class Parity:
    """Totals of a comparison of the backends.

    Attributes:
        codes, mismatches: integer against reference, each op on the same codes.
        runtime_codes, runtime_mismatches, runtime_worst: onnxruntime, free-running.
    """

    codes: int
    mismatches: int
    runtime_codes: int = 0
    runtime_mismatches: int = 0
    runtime_worst: int = 0

    @classmethod
    def of(cls, found: Compared) -> Parity:
        """The totals of a parity report."""
        ran: list[_Row] = [row for row in found.rows if row.runtime is not None]
        return cls(
            codes=found.codes,
            mismatches=found.mismatches,
            runtime_codes=sum(row.codes for row in ran),
            runtime_mismatches=sum(row.runtime.mismatches for row in ran),
            runtime_worst=max((row.runtime.worst for row in ran), default=0),
        )


@dataclass(frozen=True)
class Report:
    """What happened and where accuracy went.

    Attributes:
        pipeline: the pipeline as text, its name first.
        layers: one record per quantized operand.
        decisions: what passes applied, kept or refused, with reasons and figures.
        steps: the passes that ran.
        notes: things worth knowing, such as a batch that is not dynamic.
        graph: the ops of the quantized graph.
        cost: what the widths buy, or None.
        parity: how the backends compared, None before they were.
        images: of segmentation models, with both masks.
        sensitivity: what layers would cost at other widths, where that was measured.
    """

    pipeline: str
    layers: tuple[LayerRecord, ...]
    decisions: tuple[Decision, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = field(default=())
    graph: tuple[GraphNode, ...] = field(default=())
    cost: Cost | None = None
    parity: Parity | None = None
    images: tuple[SampleImage, ...] = field(default=())
    sensitivity: tuple[SensitivityPoint, ...] = field(default=())

    @property
    def name(self) -> str:
        """Name of the pipeline."""
        return self.pipeline.split("\n", 1)[0].removesuffix(":")

    def worst(self) -> LayerRecord | None:
        """The operand whose op strays furthest from the float model, None if none was measured."""
        known = [layer for layer in self.layers if not math.isnan(layer.sqnr)]
        return min(known, key=lambda layer: layer.sqnr, default=None)

    def with_parity(self, found: Compared) -> Report:
        """A copy that tells how the backends compared."""
        return replace(self, parity=Parity.of(found))

    def with_sensitivity(self, points: Iterable[SensitivityPoint]) -> Report:
        """A copy that shows what layers would cost at other widths."""
        return replace(self, sensitivity=tuple(points))

    def without_times(self) -> Report:
        """A copy in which the times of steps are nan, so that equal results are equal bytes."""
        unknown: dict[str, Any] = {
            f.name: math.nan for f in fields(Step) if f.name.endswith("seconds")
        }
        return replace(self, steps=tuple(replace(step, **unknown) for step in self.steps))

    def to_dict(self) -> dict[str, object]:
        """All of it as JSON values; infinite numbers as text, nan as None."""
        data = plain({
            "pipeline": self.pipeline,
            "layers": [layer.to_dict() for layer in self.layers],
            "decisions": [asdict(item) for item in self.decisions],
            "steps": [asdict(item) for item in self.steps],
            "notes": list(self.notes),
            "graph": [node.to_dict() for node in self.graph],
            "cost": None if self.cost is None else self.cost.to_json(),
            "parity": None if self.parity is None else asdict(self.parity),
            "images": [image.to_dict() for image in self.images],
            "sensitivity": [point.to_dict() for point in self.sensitivity],
        })  # fmt: skip
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        cost, parity = data["cost"], data["parity"]
        return cls(
            pipeline=str(data["pipeline"]),
            layers=tuple(LayerRecord.from_dict(item) for item in data["layers"]),
            decisions=tuple(_decision(item) for item in data["decisions"]),
            steps=tuple(_step(item) for item in data["steps"]),
            notes=tuple(map(str, data["notes"])),
            graph=tuple(GraphNode.from_dict(item) for item in data["graph"]),
            cost=None if cost is None else Cost.from_json(cost),
            parity=None if parity is None else Parity(**{k: int(v) for k, v in parity.items()}),
            images=tuple(SampleImage.from_dict(i) for i in data.get("images", ())),
            sensitivity=tuple(map(SensitivityPoint.from_dict, data.get("sensitivity", ()))),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path` if given.

        Raises:
            ExportError: the path cannot be written to.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            _write(Path(path), text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One HTML page that needs nothing else, also written to `path` if given.

        Raises:
            ExportError: the path cannot be written to.
        """
        text = page(self)
        if path is not None:
            _write(Path(path), text)
        return text

    def summary(self) -> str:
        """The few lines that matter, at most 100 characters wide."""
        lines = (textwrap.wrap(x, 100, subsequent_indent=" " * 13) for x in self._summary())
        return "\n".join(line for wrapped in lines for line in wrapped)

    def _summary(self) -> Iterator[str]:
        widths = Counter(layer.bits for layer in self.layers)
        shown = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(widths.items()))
        yield f"pipeline {self.name}: {len(self.layers)} quantized operands ({shown or 'none'})"
        outcomes = Counter(item.outcome for item in self.decisions)
        if outcomes:
            yield f"decisions    {', '.join(f'{n} {o}' for o, n in sorted(outcomes.items()))}"
        if self.cost is not None:
            yield from str(self.cost).splitlines()
        if self.parity is not None:
            of = f"{self.parity.mismatches} of {self.parity.codes} codes"
            yield f"parity       integer against reference: {of} differ"
        worst = sorted(
            {r.node: r for r in self.layers if not math.isnan(r.sqnr)}.values(),
            key=lambda record: record.sqnr,
        )
        if worst:
            names = ", ".join(f"{r.path or r.node} {r.sqnr:.1f} dB" for r in worst[:3])
            yield f"lowest SQNR  {names}"
        yield from (f"note: {note}" for note in self.notes)

    def __str__(self) -> str:
        rows = [(r.node, r.op, r.role, r.format, _decibels(r.sqnr), r.reason) for r in self.layers]
        parts = [self.summary()]
        if rows:
            parts.append(table(("node", "op", "operand", "format", "dB", "why"), rows, width=100))
        if self.decisions:
            lines = [(d.by, d.site, d.outcome, d.reason) for d in self.decisions]
            parts.append(table(("pass", "site", "outcome", "reason"), lines, width=100))
        return "\n\n".join(parts)


def _decibels(value: float) -> str:
    return "–" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f}"


def _write(path: Path, text: str) -> None:
    write_file(path, [text.encode()])


def _decision(data: dict[str, Any]) -> Decision:
    outcome = data["outcome"]
    if outcome not in {"applied", "kept", "refused"}:
        msg = f"unknown outcome {outcome!r}"
        raise ValueError(msg)
    numbers = {str(k): number(v) for k, v in data["numbers"].items()}
    return Decision(str(data["by"]), str(data["site"]), outcome, str(data["reason"]), numbers)


def _step(data: dict[str, Any]) -> Step:
    times = {f.name: number(data.get(f.name)) for f in fields(Step) if f.name.endswith("seconds")}
    max_abs = data["max_abs"]
    return Step(
        name=str(data["name"]), changed=bool(data["changed"]), nodes=int(data["nodes"]),
        max_abs=None if max_abs is None else number(max_abs), **times,
    )  # fmt: skip
