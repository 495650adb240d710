# SPDX-License-Identifier: Apache-2.0
"""Hull-greedy bit assignment: O(n log n) and nested in the budget.

Each group walks its lower convex hull of (cost, omega) from its cheapest candidate to more bits;
the steps of all groups are taken in order of omega saved per unit of cost, and the walk stops at
the first step that does not fit. The order never looks at the budgets, so larger budgets only
lengthen the walk and no group ever loses bits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qgraph.calibration.assignment import Assignment, Bits, Candidate, Group, Problem
from qgraph.errors import ConfigError

MODE = "greedy"


@dataclass(frozen=True, slots=True)
class Step:
    """One move of one group along its hull.

    Attributes:
        group: name of the group (of the merged problem).
        before, after: candidates.
        slope: omega saved per unit of scalar cost.
    """

    group: str
    before: Candidate
    after: Candidate
    slope: float


def _weights(problem: Problem) -> dict[str, float]:
    """Weigh each budgeted resource by one over the total of its dearest candidates."""
    weights = {}
    for resource in problem.budgets or dict.fromkeys(problem.resources, 0.0):
        total = math.fsum(max(c.costs[resource] for c in g.candidates) for g in problem.groups)
        weights[resource] = 1.0 / total if total else 0.0
    return weights


def _price(candidate: Candidate, weights: Mapping[str, float]) -> float:
    return math.fsum(weight * candidate.costs[r] for r, weight in weights.items())


def _cheapest(group: Group, weights: Mapping[str, float]) -> Candidate:
    """The candidate that is cheapest in every resource; of several, the least omega."""
    first = min(group.candidates, key=lambda c: (_price(c, weights), c.omega, c.bits))
    for resource in weights:
        if any(c.costs[resource] < first.costs[resource] for c in group.candidates):
            msg = f"group {group.name!r}: no candidate is cheapest in every resource"
            raise ConfigError(msg)
    return first


def _next_step(group: Group, current: Candidate, weights: Mapping[str, float]) -> Step | None:
    """The steepest move to more bits; gift wrapping, so a chain of bits walks its convex hull."""
    best: tuple[float, float, Bits] | None = None
    found: Step | None = None
    here = _price(current, weights)
    for other in group.candidates:
        is_wider = other.bits[0] >= current.bits[0] and other.bits[1] >= current.bits[1]
        saved = current.omega - other.omega
        if not is_wider or saved <= 0:
            continue
        extra = _price(other, weights) - here
        slope = saved / extra if extra > 0 else math.inf
        rank = (slope, saved, other.bits)
        if best is None or rank > best:
            best, found = rank, Step(group.name, current, other, slope)
    return found


def walk(problem: Problem) -> Iterator[Step]:
    """Yield all hull steps of a merged problem, steepest first, ties by group order."""
    weights = _weights(problem)
    heap: list[tuple[float, int, Step]] = []
    for order, group in enumerate(problem.groups):
        step = _next_step(group, _cheapest(group, weights), weights)
        if step is not None:
            heapq.heappush(heap, (-step.slope, order, step))
    while heap:
        _, order, step = heapq.heappop(heap)
        yield step
        following = _next_step(problem.groups[order], step.after, weights)
        if following is not None:
            heapq.heappush(heap, (-following.slope, order, following))


def _fits(problem: Problem, used: Mapping[str, float], chosen: Mapping[str, Candidate]) -> bool:
    """Compare running totals; sum again exactly only where rounding could decide."""
    for resource, limit in problem.budgets.items():
        total = used[resource]
        if abs(total - limit) <= 1e-9 * max(total, limit):
            total = math.fsum(c.costs[resource] for c in chosen.values())
        if total > limit:
            return False
    return True


def solve_greedy(problem: Problem) -> Assignment:
    """Return the last assignment of the walk that fits every budget.

    With one resource and a chain of bits, omega exceeds the optimum by at most one hull step.

    Raises:
        BudgetInfeasibleError: the cheapest candidates exceed a budget.
        ConfigError: a group has no candidate that is cheapest in every resource.
    """
    problem.check_each_budget()
    merged = problem.merged()
    weights = _weights(merged)
    chosen = {group.name: _cheapest(group, weights) for group in merged.groups}
    used = {r: math.fsum(c.costs[r] for c in chosen.values()) for r in problem.budgets}
    for step in walk(merged):
        previous = chosen[step.group]
        chosen[step.group] = step.after
        for resource in used:
            used[resource] += step.after.costs[resource] - step.before.costs[resource]
        if not _fits(problem, used, chosen):
            chosen[step.group] = previous
            break
    bits = {name: candidate.bits for name, candidate in chosen.items()}
    return problem.evaluate(problem.expand(bits), mode=MODE)
