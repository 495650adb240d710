# SPDX-License-Identifier: Apache-2.0
"""The report of one compilation: layers, decisions, steps, warnings; as text, JSON and data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qgraph.context import Decision
from qgraph.pipeline import Step
from qgraph.report.layers import LayerRecord
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
        """All of it as plain data."""
        return {
            "pipeline": self.pipeline,
            "layers": [layer.to_dict() for layer in self.layers],
            "decisions": [asdict(item) for item in self.decisions],
            "steps": [asdict(item) for item in self.steps],
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        rows = [
            (r.node, r.op, r.role, r.format, f"{r.sqnr:.1f}", r.reason) for r in self.layers
        ]
        head = ("node", "op", "operand", "format", "dB", "why")
        parts = [f"pipeline {self.pipeline}", table(head, rows, width=100)]
        if self.decisions:
            lines = [(d.by, d.site, d.outcome, d.reason) for d in self.decisions]
            parts.append(table(("pass", "site", "outcome", "reason"), lines, width=100))
        parts.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(parts)
