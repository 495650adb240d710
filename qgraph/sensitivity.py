# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model suffer at few bits: a ranked table, with what to leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qgraph import passes
from qgraph.atomic import write_file
from qgraph.calibration.assignment import Assignment
from qgraph.calibration.loader import adapter, first_batch
from qgraph.calibration.measure_units import check_method, measure_units
from qgraph.calibration.objectives import Loss, check_output
from qgraph.calibration.pareto import pareto_front
from qgraph.calibration.sample import example_of, small_sample
from qgraph.calibration.sensitivities import Sensitivity, problem_of
from qgraph.calibration.unit_sweep import Probing
from qgraph.context import Context, Progress
from qgraph.formats import check_bits
from qgraph.graph.bit_units import Bits, Units, find_units
from qgraph.graph.encoder_decoder import find_structure
from qgraph.graph.ignore import Ignore, Pattern
from qgraph.graph.trace import trace, trace_info
from qgraph.pipeline import Fact, Pipeline, run_pipeline
from qgraph.pipelines import front
from qgraph.progress import progress_bar
from qgraph.report.heatmap import curves, heat_map
from qgraph.report.text import table

WIDTHS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class SensitivityTable:
    """What `sensitivity` found, most sensitive first.

    Attributes:
        rows: by unit (products that share their bits), sorted by their omega at the fewest bits.
        method: how it was measured.
        structure_notes: what was unusual in the network's structure.
        units: for budgets; not part of the JSON form.
    """

    rows: tuple[Sensitivity, ...]
    method: str
    structure_notes: tuple[str, ...] = ()
    units: Units | None = field(default=None, repr=False, compare=False)

    def omega(self, row: Sensitivity, bits: int | None = None) -> float:
        """Omega of a row with weights and activations at `bits` (default: the fewest measured)."""
        fewest = (min(row.weights, default=0), min(row.activations, default=0))
        return row.omega(fewest if bits is None else (bits, bits))

    def ignore(self, share: float = 0.5, *, bits: int | None = None) -> list[str]:
        """Patterns for ``compile(ignore=...)``: the fewest products that cause this share of omega.

        Raises:
            ConfigError: `bits` is no width.
        """
        if bits is not None:
            check_bits(bits)
        ranked = sorted(self.rows, key=lambda r: -self.omega(r, bits))
        total = sum(self.omega(r, bits) for r in ranked)
        found: list[str] = []
        covered = 0.0
        for row in ranked:
            if covered >= share * total:
                break
            found += row.nodes
            covered += self.omega(row, bits)
        return found

    def by_block(self) -> dict[str, dict[str, float]]:
        """Omega by block of the network and width: ``{"E0": {"W2": ..., "A3": ...}}``."""
        found: dict[str, dict[str, float]] = {}
        for row in sorted(self.rows, key=lambda r: (r.level is None, r.level or 0, r.block)):
            cells = found.setdefault(row.block, {})
            for letter, values in (("W", row.weights), ("A", row.activations)):
                for bits, value in sorted(values.items()):
                    cells[f"{letter}{bits}"] = cells.get(f"{letter}{bits}", 0.0) + value
        return {block: cells for block, cells in found.items() if cells}

    def front(
        self, resource: str = "size", *, mode: str = "free", points: int = 16,
        budget: Mapping[str, float] | None = None,
    ) -> list[Assignment]:  # fmt: skip
        """The Pareto front of omega against ``size``, ``bops`` or ``activations``, cheapest first.

        Other budgets in absolute amounts stay in force.

        Raises:
            ConfigError: an unknown mode. BudgetInfeasibleError: nothing fits the other budgets.
        """
        assert self.units is not None, "a table read from JSON has no costs"
        pairs = sorted({(w, a) for r in self.rows for w in r.weights for a in r.activations})
        found = {row.name: row for row in self.rows}
        problem = problem_of(self.units, found, pairs, dict(budget or {}))
        return pareto_front(problem, resource, mode=mode, points=points)

    def front_svg(
        self, resource: str = "size", *, modes: Sequence[str] = ("uniform", "spmix", "free")
    ) -> str:
        """A picture of fronts, cost as a share of float."""
        assert self.units is not None, "a table read from JSON has no costs"
        whole = self.units.floats[resource]
        lines = {
            mode: [(a.costs[resource] / whole, a.omega) for a in self.front(resource, mode=mode)]
            for mode in modes
        }
        axes = (f"{resource}, share of float", "omega")
        return curves(lines, title=f"sensitivity against {resource}", axes=axes)

    def to_svg(self) -> str:
        """The heat map of blocks and widths."""
        return heat_map(self.by_block(), title=f"sensitivity by block and width ({self.method})")

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path` if given."""
        data = {
            "method": self.method,
            "notes": list(self.structure_notes),
            "ignore": self.ignore(),
            "rows": [row.to_json() for row in self.rows],
        }
        text = json.dumps(data, indent=1)
        if path is not None:
            write_file(path, [text.encode()])
        return text

    @classmethod
    def from_json(cls, text: str) -> SensitivityTable:
        """Read what `to_json` gave."""
        data = json.loads(text)
        rows = tuple(map(Sensitivity.from_json, data["rows"]))
        return cls(rows, data["method"], tuple(data["notes"]))

    def __str__(self) -> str:
        columns = list(dict.fromkeys(c for cells in self.by_block().values() for c in cells))
        head = ("unit", "block", "parameters", *columns)
        rows = []
        for row in self.rows:
            values = [
                (row.weights if name[0] == "W" else row.activations).get(int(name[1:]))
                for name in columns
            ]
            shown = ["" if v is None else f"{v:.2g}" for v in values]
            rows.append((row.name, row.block, row.parameters, *shown))
        return table(head, rows, width=120)


def sensitivity(  # noqa: PLR0913 - all options are keyword-only
    model: nn.Module | torch.export.ExportedProgram,
    loader: Iterable[Any],
    *,
    weight_bits: Sequence[int] = WIDTHS,
    activation_bits: Sequence[int] = WIDTHS,
    method: str = "fisher",
    output: str = "plain",
    loss: Loss | None = None,
    targets: Callable[[Any, Any], torch.Tensor] | None = None,
    rows: int = 8,
    ignore: Pattern | Iterable[Pattern] = (),
    example_inputs: Any = None,
    transform: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    state_file: str | Path | None = None,
) -> SensitivityTable:
    """Measure how much each product of a model suffers at each width, first and last included.

    Args:
        model: as for `compile`.
        loader: as for `compile`; read twice: for ranges, and to measure.
        example_inputs: as for `compile`.
        transform: as for `compile`.
        dynamic_shapes: as for `compile`.
        seed: as for `compile`.
        progress: as for `compile`.
        weight_bits: widths of weights to measure.
        activation_bits: widths of activations to measure.
        method: ``"fisher"`` (one backward per batch for all widths), ``"sqnr"`` (error over signal
            inside targets), ``"output"`` (distance of outputs, each unit quantized alone) or
            ``"loss"`` (rise of `loss`, the same way).
        output: what outputs are without a loss: ``"plain"`` (relative squared error), ``"sigmoid"``
            or ``"softmax"`` (KL divergence).
        loss: (model's output, batch) -> scalar tensor; `batch` as the loader yields it.
        targets: (model's output, batch) -> bool [B, 1, H, W] for ``"sqnr"``; default: output > 0.
        rows: sampled output rows per product and sample.
        ignore: products to leave out.
        state_file: where sums are kept after each batch; a killed run goes on from there. In a
            torch.distributed job ranks share the batches.

    Raises:
        ConfigError: an unknown method, output or width. CaptureError, CalibrationError: as for
            `compile`.

    Example:
        >>> found = qgraph.sensitivity(model, loader)                  # doctest: +SKIP
        >>> print(found)                                               # doctest: +SKIP
        >>> qgraph.compile(model, loader, "int4", ignore=found.ignore())  # doctest: +SKIP
    """
    check_method(method)
    check_output(output)
    for width in (*weight_bits, *activation_bits):
        check_bits(width)
    bits = (max(weight_bits), max(activation_bits))
    with torch.random.fork_rng(devices=[]), progress_bar(progress) as report:
        torch.manual_seed(seed)
        module, context = observe(
            model, loader, bits=bits, ignore=ignore,
            example_inputs=example_inputs, transform=transform, dynamic_shapes=dynamic_shapes,
            progress=report,
        )  # fmt: skip
        structure = find_structure(module)
        units = unpinned(find_units(module, context.plan, structure, bits))
        found = measure_units(
            module, units.units, ranges_of(units, context),
            (tuple(weight_bits), tuple(activation_bits)),
            Probing(method=method, output=output, loss=loss, targets=targets, rows=rows, seed=seed),
            batches=context.batches, adapt=context.adapt or adapter(module),
            path=None if state_file is None else Path(state_file), progress=report,
        )  # fmt: skip
    unranked = SensitivityTable(tuple(found.values()), method, structure.notes, units)
    ranked = sorted(unranked.rows, key=lambda r: -unranked.omega(r))
    return replace(unranked, rows=tuple(ranked))


def observe(
    model: nn.Module | torch.export.ExportedProgram, loader: Iterable[Any], *, bits: Bits,
    ignore: Pattern | Iterable[Pattern] = (), example_inputs: Any = None,
    transform: Callable[[Any], Any] | None = None, dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> tuple[GraphModule, Context]:  # fmt: skip
    """The canonical float graph of a model, with a plan and exact ranges in the context."""
    batch, batches = first_batch(loader)
    args, kwargs = example_of(model, batch if example_inputs is None else example_inputs, transform)
    module = trace(model, *args, dynamic_shapes=dynamic_shapes, **kwargs)
    dynamic = trace_info(module).dynamic_batch
    context = Context(
        sample=small_sample(module, args, kwargs, dynamic=dynamic), batches=batches,
        adapt=adapter(module, transform), facts=frozenset({Fact.TRACED}),
        ignore=Ignore.of(ignore), verify=False, progress=progress,
    )  # fmt: skip
    plan = passes.PlanSites(
        weight_bits=bits[0], activation_bits=bits[1], ends_bits=2, scope="stored"
    )
    ranges = passes.ChooseRanges(method="minmax", add_sqnr=-1000.0)
    with torch.no_grad():
        run_pipeline(
            Pipeline("sensitivity", (*front(), plan, passes.Calibrate(), ranges)), module, context
        )
    return module, context


def unpinned(units: Units) -> Units:
    """The same units, first and last products free as well."""
    for unit in units.units:
        unit.pinned = None
    return units


def ranges_of(units: Units, context: Context) -> dict[Node, tuple[float, float]]:
    """Exact range of every activation of the units."""
    return {
        site.value: context.statistics[site.value].range().bounds()
        for unit in units.units
        for site in unit.activations
    }
