# SPDX-License-Identifier: Apache-2.0
"""Measure the sensitivity of all units by one of several methods, resumable and over ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from qgraph.calibration import fisher, perturb
from qgraph.calibration.fisher import FisherSweep
from qgraph.calibration.loader import Arguments
from qgraph.calibration.perturb import PerturbSweep
from qgraph.calibration.row_errors import FRACTIONS
from qgraph.calibration.sensitivities import Sensitivity
from qgraph.calibration.sensitivity_state import State
from qgraph.calibration.unit_sweep import Probing, Ranges
from qgraph.errors import unknown_name
from qgraph.graph.bit_units import Unit
from qgraph.graph.verify import checksum, structure, tensors

METHODS = (*fisher.METHODS, *perturb.METHODS)
TIE = 1e-9


def check_method(name: str) -> None:
    """Raise `ConfigError` for an unknown method."""
    if name not in METHODS:
        what = "sensitivity method"
        raise unknown_name(what, name, METHODS)


def measure_units(
    module: GraphModule,
    units: Sequence[Unit],
    ranges: Ranges,
    widths: tuple[Sequence[int], Sequence[int]],
    how: Probing,
    *,
    batches: Iterable[Any],
    adapt: Callable[[Any], Arguments],
    path: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Sensitivity]:
    """Sensitivities by unit name, means over batches.

    Args:
        module: the float graph.
        units: what to measure.
        ranges: exact range of every quantized activation of these units.
        widths: weight bits and activation bits.
        how: method, objective, rows, seed.
        batches: re-iterable; every rank reads all of them and takes turns.
        adapt: batch -> (args, kwargs).
        path: state file, or a folder for one; a killed run goes on behind its last batch.
        progress: called with ("sensitivity", batches done, batches or 0).

    Raises:
        ConfigError: an unknown method. CalibrationError: no batches, or nothing to differentiate.
    """
    check_method(how.method)
    key = _key(module, units, ranges, widths, how) if path else ""
    if path is not None and not path.suffix:
        path /= f"sensitivity-{key[:12]}.json"
    state = State(path, key)
    sweep = FisherSweep if how.method in fisher.METHODS else PerturbSweep
    count = sweep(module, units, ranges, widths, how).run(batches, adapt, state, progress)
    sums = {name: value / count for name, value in state.total().items()}
    return {unit.name: _sensitivity(unit, sums, widths) for unit in units}


def _sensitivity(
    unit: Unit, sums: dict[str, Tensor], widths: tuple[Sequence[int], Sequence[int]]
) -> Sensitivity:
    weights = sums.get(f"{unit.name}/w")
    values = sums.get(f"{unit.name}/a")
    by_weight = {} if weights is None else dict(zip(widths[0], weights.tolist(), strict=True))
    by_value: dict[int, float] = {}
    clips: dict[int, float] = {}
    if values is not None:
        for bits, row in zip(widths[1], values.view(len(widths[1]), -1), strict=True):
            least = row.min()
            first = int((row <= least * (1 + TIE)).nonzero()[0])  # the widest of equal clips
            by_value[bits] = float(row[first])
            clips[bits] = FRACTIONS[first]
    return Sensitivity(
        name=unit.name, block=unit.block, level=unit.level, side=unit.side,
        nodes=tuple(n.name for n in unit.products), parameters=unit.parameters, macs=unit.macs,
        elements=unit.elements, weights=by_weight, activations=by_value, clips=clips,
        pinned=unit.pinned,
    )  # fmt: skip


def _key(
    module: GraphModule, units: Sequence[Unit], ranges: Ranges,
    widths: tuple[Sequence[int], Sequence[int]], how: Probing,
) -> str:  # fmt: skip
    """What sums belong to: graph, weights, ranges, widths and method."""
    told = [
        str(structure(module)), str([checksum(t) for t in tensors(module).values()]),
        [unit.name for unit in units], [list(ranges[n]) for n in sorted(ranges, key=str)],
        [list(w) for w in widths], how.method, how.output, how.rows, how.seed, how.background,
        how.loss is not None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
