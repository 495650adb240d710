# SPDX-License-Identifier: Apache-2.0
"""The bit assignment problem as plain data: groups, candidates, budgets and answers.

minimise sum_i omega_i(b_i)   subject to   sum_i cost_i^r(b_i) <= budget^r for each resource r,
one candidate per group, tied groups equal. Nothing here knows graphs; solvers live beside this file
(`knapsack`, `hull_greedy`, `ladders`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qgraph.errors import BudgetInfeasibleError, ConfigError
from qgraph.graph.encoder_decoder import Side

logger = logging.getLogger(__name__)

Bits = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice for a group.

    Attributes:
        bits: (weight bits, activation bits).
        omega: sensitivity, the additive loss of choosing this; finite and not negative.
        costs: amount of each resource; finite and not negative.
    """

    bits: Bits
    omega: float
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ops that share their bit widths.

    Attributes:
        name: unique name.
        index: topological position; ties between equal answers go by it, never by the name.
        candidates: choices with distinct bits.
        level: resolution level (0 is the input), or None for a group outside the ladders.
        side: side of the network.
        tie: groups with the same non-empty tie get equal bits.
    """

    name: str
    index: int
    candidates: tuple[Candidate, ...]
    level: int | None = None
    side: Side = Side.FLAT
    tie: str = ""

    def at(self, bits: Bits) -> Candidate | None:
        """The candidate with these bits."""
        return next((c for c in self.candidates if c.bits == bits), None)


@dataclass(frozen=True, slots=True)
class Problem:
    """Groups and budgets; a resource without a budget is only reported.

    Raises:
        ConfigError: duplicate names or bits, no candidate, unequal resources, values that are
            negative or not finite, or tied groups without a common candidate.
    """

    groups: tuple[Group, ...]
    budgets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            repeated = sorted({n for n in names if names.count(n) > 1})
            msg = f"group names must be unique; repeated: {', '.join(repeated)}"
            raise ConfigError(msg)
        for group in self.groups:
            self._check(group)

    def _check(self, group: Group) -> None:
        widths = [c.bits for c in group.candidates]
        if not widths or len(set(widths)) != len(widths):
            msg = f"group {group.name!r} needs candidates with distinct bits, got {widths}"
            raise ConfigError(msg)
        for candidate in group.candidates:
            if set(candidate.costs) != set(self.resources) or not set(self.budgets) <= set(
                candidate.costs
            ):
                got, need = sorted(candidate.costs), sorted({*self.resources, *self.budgets})
                msg = f"group {group.name!r} at {candidate.bits} has costs for {got}, need {need}"
                raise ConfigError(msg)
            values = (candidate.omega, *candidate.costs.values())
            if not all(math.isfinite(v) and v >= 0 for v in values):
                msg = f"group {group.name!r} at {candidate.bits}: values {values} must be >= 0"
                raise ConfigError(msg)

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of all resources, sorted."""
        return tuple(sorted(self.groups[0].candidates[0].costs)) if self.groups else ()

    def merged(self) -> Problem:
        """Return the problem with each tie as one group, ordered by index."""
        ordered = sorted(self.groups, key=lambda g: (g.index, g.name))
        classes: dict[str, list[Group]] = {}
        for group in ordered:
            classes.setdefault(f"tie:{group.tie}" if group.tie else f"one:{group.name}", []).append(
                group
            )
        return Problem(tuple(_merge(members) for members in classes.values()), self.budgets)

    def evaluate(self, bits: Mapping[str, Bits], *, mode: str, gap: float = 0.0) -> Assignment:
        """Return the totals of a choice of bits per group name, summed exactly."""
        chosen = []
        for group in self.groups:
            candidate = group.at(bits[group.name])
            if candidate is None:
                msg = f"group {group.name!r} has no candidate with bits {bits[group.name]}"
                raise ConfigError(msg)
            chosen.append(candidate)
        return Assignment(
            bits={group.name: bits[group.name] for group in self.groups},
            omega=math.fsum(c.omega for c in chosen),
            costs={r: math.fsum(c.costs[r] for c in chosen) for r in self.resources},
            mode=mode,
            gap=gap,
        )

    def expand(self, chosen: Mapping[str, Bits]) -> dict[str, Bits]:
        """Carry bits chosen for the groups of `merged()` over to this problem's groups."""
        leader: dict[str, str] = {}
        for group in sorted(self.groups, key=lambda g: (g.index, g.name)):
            leader.setdefault(group.tie, group.name)
        return {g.name: chosen[leader[g.tie] if g.tie else g.name] for g in self.groups}

    def fits(self, costs: Mapping[str, float]) -> bool:
        """Whether costs stay within every budget."""
        return all(costs[r] <= limit for r, limit in self.budgets.items())

    def check_each_budget(self) -> None:
        """Refuse a budget that not even the cheapest candidates meet.

        Raises:
            BudgetInfeasibleError: names the resource and the least possible amount.
        """
        for resource, limit in self.budgets.items():
            least = math.fsum(
                min(c.costs[resource] for c in g.candidates) for g in self.merged().groups
            )
            if least > limit:
                raise infeasible(resource, limit=limit, best=least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """An answer.

    Attributes:
        bits: (weight, activation) bits of each group.
        omega: total sensitivity.
        costs: total of each resource.
        mode: solver that produced it.
        gap: relative distance to the best bound that is known; 0 where the answer is exact.
    """

    bits: dict[str, Bits]
    omega: float
    costs: dict[str, float]
    mode: str
    gap: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Return plain JSON values in a stable order."""
        return {
            "mode": self.mode,
            "omega": self.omega,
            "costs": dict(sorted(self.costs.items())),
            "gap": self.gap,
            "bits": {name: list(pair) for name, pair in self.bits.items()},
        }


def infeasible(
    resource: str, *, limit: float, best: float, beside: tuple[str, ...] = ()
) -> BudgetInfeasibleError:
    """Build the error for a budget that cannot be met (within the budgets `beside` it)."""
    other = f" within the budgets of {', '.join(beside)}" if beside else ""
    msg = f"budget {resource}={limit:g} cannot be met; best possible{other} is {best:g}"
    return BudgetInfeasibleError(msg, resource=resource, best_possible=best)


def repair_monotone(group: Group) -> Group:
    """Return the group with omega non-increasing in each bit width (running min from few bits).

    Measured sensitivities are noisy; a candidate with more bits of both kinds is never worse.
    """
    changed = 0
    repaired = []
    for one in group.candidates:
        smaller = (
            other.omega
            for other in group.candidates
            if other.bits[0] <= one.bits[0] and other.bits[1] <= one.bits[1]
        )
        least = min(smaller)
        changed += least < one.omega
        repaired.append(replace(one, omega=least))
    if changed:
        logger.info("group %s: %d sensitivities were not monotone", group.name, changed)
    return replace(group, candidates=tuple(repaired))


def _merge(members: list[Group]) -> Group:
    """Sum tied groups over the bits they have in common; the shallowest member leads the ladder."""
    first = members[0]
    if len(members) == 1:
        return first
    common = [c.bits for c in first.candidates if all(m.at(c.bits) for m in members)]
    if not common:
        msg = f"tied groups {[m.name for m in members]} have no bits in common"
        raise ConfigError(msg)
    candidates = []
    for bits in common:
        parts = [c for c in (m.at(bits) for m in members) if c is not None]
        costs = {r: math.fsum(p.costs[r] for p in parts) for r in parts[0].costs}
        omega = math.fsum(p.omega for p in parts)
        candidates.append(Candidate(bits=bits, omega=omega, costs=costs))
    placed = [m for m in members if m.level is not None]
    lead = min(placed, key=lambda m: (m.level, m.side is Side.DECODER)) if placed else first
    return replace(first, candidates=tuple(candidates), level=lead.level, side=lead.side)


def grid(weight_bits: tuple[int, ...], activation_bits: tuple[int, ...]) -> list[Bits]:
    """Return all (weight, activation) pairs, fewest bits first."""
    return list(itertools.product(sorted(weight_bits), sorted(activation_bits)))
