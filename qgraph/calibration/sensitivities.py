# SPDX-License-Identifier: Apache-2.0
"""How much each unit of a network suffers at each width, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qgraph.calibration.assignment import Candidate, Group, Problem, repair_monotone
from qgraph.graph.bit_units import Bits, Units
from qgraph.graph.encoder_decoder import Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Of one unit.

    Attributes:
        name, block, level, side: of the unit; see `qgraph.graph.bit_units.Unit`.
        nodes: names of its products.
        parameters, macs, elements: weights, multiply-accumulates, stored activations.
        weights, activations: omega by bits; the omega of a pair is their sum.
        clips: share of the full range that was best, by activation bits.
        pinned: bits it keeps, or None.
    """

    name: str
    block: str
    level: int | None
    side: Side
    nodes: tuple[str, ...]
    parameters: int
    macs: int
    elements: int
    weights: Mapping[int, float]
    activations: Mapping[int, float]
    clips: Mapping[int, float] = field(default_factory=dict)
    pinned: Bits | None = None

    def omega(self, bits: Bits) -> float:
        """Of a pair of widths; widths that were not measured (pinned ones) count 0."""
        return self.weights.get(bits[0], 0.0) + self.activations.get(bits[1], 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name, "block": self.block, "level": self.level, "side": self.side.value,
            "nodes": list(self.nodes), "parameters": self.parameters, "macs": self.macs,
            "elements": self.elements, "weights": {str(k): v for k, v in self.weights.items()},
            "activations": {str(k): v for k, v in self.activations.items()},
            "clips": {str(k): v for k, v in self.clips.items()},
            "pinned": None if self.pinned is None else list(self.pinned),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Read what `to_json` gave."""
        widths = {
            key: {int(k): float(v) for k, v in data[key].items()}
            for key in ("weights", "activations", "clips")
        }
        pinned = data["pinned"]
        return cls(
            name=data["name"], block=data["block"], level=data["level"], side=Side(data["side"]),
            nodes=tuple(data["nodes"]), parameters=data["parameters"], macs=data["macs"],
            elements=data["elements"], pinned=None if pinned is None else (pinned[0], pinned[1]),
            **widths,
        )  # fmt: skip


def problem_of(
    units: Units,
    found: Mapping[str, Sensitivity],
    pairs: Iterable[Bits],
    budgets: Mapping[str, float],
    *,
    extra: Mapping[str, Mapping[Bits, Mapping[str, float]]] | None = None,
) -> Problem:
    """The assignment problem: a group for each unit, and one for what no unit decides.

    Args:
        units: of the plan.
        found: sensitivities by unit name.
        pairs: widths to choose from.
        budgets: absolute limits.
        extra: further resources by unit name and widths, such as milliseconds; missing ones are 0.
    """
    choices = list(pairs)
    names = sorted({r for by in (extra or {}).values() for c in by.values() for r in c})
    groups = []
    for unit in units.units:
        more = (extra or {}).get(unit.name, {})
        candidates = []
        for bits in [unit.pinned] if unit.pinned else choices:
            costs = unit.costs(bits) | {r: more.get(bits, {}).get(r, 0.0) for r in names}
            omega = 0.0 if unit.pinned else found[unit.name].omega(bits)
            candidates.append(Candidate(bits=bits, omega=omega, costs=costs))
        group = Group(
            name=unit.name, index=unit.index, candidates=tuple(candidates),
            level=None if unit.pinned else unit.level, side=unit.side,
        )  # fmt: skip
        groups.append(repair_monotone(group))
    rest = dict(units.rest) | dict.fromkeys(names, 0.0)
    fixed = Candidate(bits=(32, 32), omega=0.0, costs=rest)
    groups.append(Group(name="(rest)", index=1 << 30, candidates=(fixed,)))
    return Problem(tuple(groups), dict(budgets))
