# SPDX-License-Identifier: Apache-2.0
"""Give every unit of the network its bits, so that budgets hold and outputs suffer least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.calibration.assignment import Assignment, Problem, infeasible
from qgraph.calibration.filtered_loss import objective_of
from qgraph.calibration.loader import adapter
from qgraph.calibration.measure_units import METHODS, check_method, measure_units
from qgraph.calibration.objectives import check_output
from qgraph.calibration.pareto import MODES, solve
from qgraph.calibration.row_errors import data_encoding
from qgraph.calibration.sensitivities import Sensitivity, problem_of
from qgraph.calibration.unit_sweep import Probing
from qgraph.context import Context
from qgraph.errors import ConfigError, unknown_name
from qgraph.formats import AffineEncoding, check_bits
from qgraph.graph.bit_units import Bits, Units, carriers, find_units, stored_bytes
from qgraph.graph.encoder_decoder import find_structure
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.pipeline import Fact, Pass, Promise

RESOURCES = ("size", "bops", "activations", "ms")
REPAIRS = 12


@dataclass(frozen=True)
class AssignBits(Pass):
    """Measure sensitivities on the calibration data, solve for bits, and set the plan's widths.

    First and last products, gates, and what other passes raised keep at least 8 bits; residual adds
    keep what plan-sites gave them. Concatenations and pools follow those who read behind them.

    Attributes:
        budget: limits by resource: ``size`` (bytes of weights), ``bops`` (bit operations),
            ``activations`` (bytes of all stored activations), ``ms`` (onnxruntime milliseconds,
            predicted). Up to 1, a share of the float network; above, an absolute amount; ``ms`` is
            always absolute.
        effort: place between the cheapest (0) and the dearest (1) assignment, on a geometric scale
            of size and of bit operations; a further limit beside the budget.
        mode: ``spmix`` (Li et al., TGRS 2024: ladders over resolution levels that do not rise with
            depth, decoder tied to encoder), ``spmix_delta`` (decoder up to a step lower), ``free``
            (every unit by itself, exact), ``greedy`` (fast, nested in the budget), ``uniform``.
        weight_choices, activation_choices: widths to choose from.
        sensitivity: ``fisher``, ``output``, ``loss`` or ``sqnr``; see `qgraph.sensitivity`.
        output: what outputs mean without a loss: ``plain``, ``sigmoid``, ``softmax``.
        rows: sampled rows per product and sample.
        choose_clips: whether activation ranges are taken from the same measurement.

    Raises:
        ConfigError: an unknown resource, mode, method or width; a budget that is not positive.
        BudgetInfeasibleError: names the resource and its best possible value.
    """

    name: ClassVar[str] = "assign-bits"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    budget: Mapping[str, float] = field(default_factory=dict)
    effort: float | None = None
    mode: str = "free"
    weight_choices: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    activation_choices: tuple[int, ...] = (3, 4, 5, 6, 8)
    sensitivity: str = "fisher"
    output: str = "plain"
    rows: int = 8
    choose_clips: bool = True

    def __post_init__(self) -> None:
        for bits in (*self.weight_choices, *self.activation_choices):
            check_bits(bits)
        if not self.weight_choices or not self.activation_choices:
            msg = "assign-bits needs at least one weight width and one activation width"
            raise ConfigError(msg)
        for what, got, allowed in (
            ("assignment mode", self.mode, MODES),
            ("sensitivity method", self.sensitivity, METHODS),
        ):
            if got not in allowed:
                raise unknown_name(what, got, allowed)
        check_method(self.sensitivity)
        check_output(self.output)
        for resource, limit in self.budget.items():
            if resource not in RESOURCES:
                what = "budget"
                raise unknown_name(what, resource, RESOURCES)
            if not (math.isfinite(limit) and limit > 0):
                msg = f"budget {resource}={limit}; allowed: above 0"
                raise ConfigError(msg)

        if self.effort is not None and not 0 <= self.effort <= 1:
            msg = f"effort is {self.effort}; allowed: 0 to 1"
            raise ConfigError(msg)

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        del module
        for value, _ in context.plan.by_value(undecided_only=True):
            yield Request(value, "Range")

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        structure = find_structure(module)
        units = find_units(module, context.plan, structure, _base(context))
        for note in structure.notes:
            context.record(self.name, "structure", "kept", note)
        found = self._measure(module, context, units)
        limits = self._limits(units)
        answer = self._solve(module, context, units, found, limits)
        self._apply(module, context, units, found, answer)
        return False

    def _measure(
        self, module: GraphModule, context: Context, units: Units
    ) -> dict[str, Sensitivity]:
        ranges = {
            site.value: context.statistics[site.value].range().bounds()
            for unit in units.units if unit.pinned is None for site in unit.activations
        }  # fmt: skip
        how = Probing(
            method=self.sensitivity, output=self.output, rows=self.rows,
            loss=None if objective_of(context.loss) else context.loss,
            seed=context.seed,
        )  # fmt: skip
        return measure_units(
            module, units.units, ranges, (self.weight_choices, self.activation_choices), how,
            batches=context.batches, adapt=context.adapt or adapter(module), path=context.cache_dir,
            progress=context.progress,
        )  # fmt: skip

    def _limits(self, units: Units) -> dict[str, float]:
        """Absolute limits of the budget, and of the effort if there is one."""
        limits = {
            resource: limit * units.floats[resource]
            if resource in units.floats and limit <= 1 else float(limit)
            for resource, limit in self.budget.items()
        }  # fmt: skip
        if self.effort is None:
            return limits
        ends = (min(self.weight_choices), min(self.activation_choices)), (
            max(self.weight_choices), max(self.activation_choices),
        )  # fmt: skip
        for resource in ("size", "bops"):
            low, high = (
                units.rest[resource]
                + sum(unit.costs(unit.pinned or bits)[resource] for unit in units.units)
                for bits in ends
            )
            if low:
                limit = low * (high / low) ** self.effort * (1 + 1e-9)
                limits[resource] = min(limit, limits.get(resource, math.inf))
        return limits

    def _solve(
        self, module: GraphModule, context: Context, units: Units,
        found: Mapping[str, Sensitivity], limits: Mapping[str, float],
    ) -> Assignment:  # fmt: skip
        """Solve, count on the plan itself, and tighten what overran until nothing does.

        A stored value is charged to one reader, though the widest of several decides.
        """
        pairs = list(itertools.product(self.weight_choices, self.activation_choices))
        extra = self._milliseconds(context, units, pairs) if "ms" in limits else None
        problem = problem_of(units, found, pairs, limits, extra=extra)
        tight = dict(limits)
        for _ in range(REPAIRS):
            answer = solve(Problem(problem.groups, tight), mode=self.mode)
            real = self._count(module, context, units, answer)
            over = {r: real[r] - limit for r, limit in limits.items() if real.get(r, 0.0) > limit}
            if not over:
                return answer
            for resource, excess in over.items():
                tight[resource] = min(tight[resource], answer.costs[resource]) - excess / 2
        resource = next(iter(over))
        raise infeasible(resource, limit=limits[resource], best=real[resource])

    def _count(
        self, module: GraphModule, context: Context, units: Units, answer: Assignment
    ) -> dict[str, float]:
        """Costs of an assignment, its activations counted afresh on the plan."""
        self._set_bits(context, units, answer)
        return answer.costs | {"activations": stored_bytes(module, context.plan)}

    def _set_bits(self, context: Context, units: Units, answer: Assignment) -> None:
        for unit in units.units:
            unit.assign(answer.bits[unit.name])
        for sites, readers in carriers(context.plan, units.units).values():
            if readers:
                bits = max(answer.bits[unit.name][1] for unit in readers)
                for site in sites:
                    site.bits = bits

    @staticmethod
    def _milliseconds(
        context: Context, units: Units, pairs: Iterable[Bits]
    ) -> dict[str, dict[Bits, dict[str, float]]]:
        if context.latency is None:
            msg = "budget ms needs a latency model: pass latency= to qgraph.compile"
            raise ConfigError(msg)
        price = context.latency
        choices = list(pairs)
        return {
            unit.name: {
                bits: {"ms": sum(price(node, max(bits)) for node in unit.products)}
                for bits in ([unit.pinned] if unit.pinned else choices)
            }
            for unit in units.units
        }

    def _apply(
        self,
        module: GraphModule,
        context: Context,
        units: Units,
        found: Mapping[str, Sensitivity],
        answer: Assignment,
    ) -> None:
        self._set_bits(context, units, answer)
        if self.choose_clips:
            decided = self._decide_clips(context, units, found, answer)
            self._share(context, units, decided)
        for unit in units.units:
            weight, activation = answer.bits[unit.name]
            kept = " (kept: stem, head, gate or raised by a pass)" if unit.pinned else ""
            context.record(
                self.name, unit.name, "applied",
                f"{unit.block}: weights {weight} bits, activations {activation}{kept}",
                omega=found[unit.name].omega((weight, activation)), parameters=unit.parameters,
                macs=unit.macs, elements=unit.elements,
            )  # fmt: skip
            for what, omegas, bits in (
                ("weights", found[unit.name].weights, weight),
                ("inputs", found[unit.name].activations, activation),
            ):
                context.sensitivity += [
                    (f"{unit.name} {what}", width, omega, width == bits)
                    for width, omega in omegas.items()
                ]
        real = answer.costs | {"activations": stored_bytes(module, context.plan)}
        used = {r: round(real[r] / whole, 5) for r, whole in units.floats.items() if whole}
        context.record(
            self.name, "network", "applied", f"mode {answer.mode}, shares of the float network",
            omega=answer.omega, gap=answer.gap, **used,
        )  # fmt: skip

    def _decide_clips(
        self, context: Context, units: Units, found: Mapping[str, Sensitivity], answer: Assignment
    ) -> dict[Node, AffineEncoding]:
        """Encode every value of a unit with the clip that was best; pinned ones unclipped."""
        made: dict[tuple[Node, int], AffineEncoding] = {}
        for unit in units.units:
            bits = answer.bits[unit.name][1]
            clip = found[unit.name].clips.get(bits, 1.0)
            for site in unit.activations:
                low, high = context.statistics[site.value].range().bounds()
                key = (site.value, bits)
                if key not in made:
                    made[key] = data_encoding(low, high, bits, clip)
                site.decide(made[key], self.name, f"{clip:g} of range [{low:.4g}, {high:.4g}]")
        return {value: encoding for (value, _), encoding in made.items()}

    def _share(
        self, context: Context, units: Units, decided: Mapping[Node, AffineEncoding]
    ) -> None:
        """Let what is stored for a concatenation or pool use the encoding behind it."""
        for value, (sites, readers) in carriers(context.plan, units.units).items():
            behind = [
                decided[site.value]
                for unit in readers for site in unit.activations
                if site.value in decided and decided[site.value].bits == sites[0].bits
            ]  # fmt: skip
            own = decided.get(value)
            if own is not None and own.bits == sites[0].bits:
                behind = [own]
            if behind:
                widest = max(behind, key=lambda e: float(e.scale))
                _decide_all(sites, widest, self.name)


def _decide_all(sites: Iterable[Site], encoding: AffineEncoding, by: str) -> None:
    for site in sites:
        site.decide(encoding, by, "as behind the concatenation or pool")


def _base(context: Context) -> Bits:
    """The widths that plan-sites asked for in general."""
    for item in context.pipeline or ():
        if item.name == "plan-sites":
            return int(getattr(item, "weight_bits", 8)), int(getattr(item, "activation_bits", 8))
    return 8, 8
