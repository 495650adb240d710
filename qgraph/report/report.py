# SPDX-License-Identifier: Apache-2.0
"""The report of one compilation: layers, decisions, steps, warnings; as text, JSON and data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qgraph.context import Decision
from qgraph.pipeline import Step
from qgraph.report.layers import LayerRecord
from qgraph.report.plain import number, plain
from qgraph.report.text import table


@dataclass(frozen=True)
class Report:
    """What happened and where accuracy went.

    Attributes:
        pipeline: its name.
        layers: one record per quantized operand.
        decisions: what passes applied, kept or refused, with reasons and figures.
        steps: the passes that ran.
        notes: things worth knowing, such as a batch that is not dynamic.
    """

    pipeline: str
    layers: tuple[LayerRecord, ...]
    decisions: tuple[Decision, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, object]:
        """All of it as JSON values; infinite numbers as text, nan as None."""
        data = plain(
            {
                "pipeline": self.pipeline,
                "layers": [layer.to_dict() for layer in self.layers],
                "decisions": [asdict(item) for item in self.decisions],
                "steps": [asdict(item) for item in self.steps],
                "notes": list(self.notes),
            }
        )
        assert isinstance(data, dict)
        return data

    def without_times(self) -> Report:
        """A copy in which the times of steps are nan, so that equal results are equal bytes."""
        unknown: dict[str, Any] = {
            f.name: math.nan for f in fields(Step) if f.name.endswith("seconds")
        }
        return replace(self, steps=tuple(replace(step, **unknown) for step in self.steps))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        return cls(
            pipeline=str(data["pipeline"]),
            layers=tuple(LayerRecord.from_dict(item) for item in data["layers"]),
            decisions=tuple(_decision(item) for item in data["decisions"]),
            steps=tuple(_step(item) for item in data["steps"]),
            notes=tuple(map(str, data["notes"])),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        rows = [(r.node, r.op, r.role, r.format, f"{r.sqnr:.1f}", r.reason) for r in self.layers]
        head = ("node", "op", "operand", "format", "dB", "why")
        parts = [f"pipeline {self.pipeline}", table(head, rows, width=100)]
        if self.decisions:
            lines = [(d.by, d.site, d.outcome, d.reason) for d in self.decisions]
            parts.append(table(("pass", "site", "outcome", "reason"), lines, width=100))
        parts.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(parts)


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
