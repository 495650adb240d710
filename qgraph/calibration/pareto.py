# SPDX-License-Identifier: Apache-2.0
"""Choose a solver by its mode name, and trace the front of sensitivity against one resource."""

from __future__ import annotations

import math
from dataclasses import replace

from qgraph.calibration.assignment import Assignment, Problem
from qgraph.calibration.hull_greedy import solve_greedy
from qgraph.calibration.knapsack import solve_exact
from qgraph.calibration.ladders import solve_spmix, solve_uniform
from qgraph.errors import BudgetInfeasibleError, ConfigError, unknown_name

MODES = ("uniform", "spmix", "spmix_delta", "free", "greedy")


def solve(problem: Problem, *, mode: str = "free") -> Assignment:
    """Solve in one of `MODES`.

    Raises:
        ConfigError: unknown mode, or the mode cannot take the problem.
        BudgetInfeasibleError: nothing fits.
    """
    match mode:
        case "uniform":
            return solve_uniform(problem)
        case "spmix":
            return solve_spmix(problem)
        case "spmix_delta":
            return solve_spmix(problem, with_offset=True)
        case "free":
            return _not_beaten(problem, solve_exact(problem))
        case "greedy":
            return solve_greedy(problem)
        case _:
            kind = "assignment mode"
            raise unknown_name(kind, mode, MODES)


def _not_beaten(problem: Problem, answer: Assignment) -> Assignment:
    """Return the least omega of an answer with a gap and of the restricted solvers."""
    best = answer
    if answer.gap == 0.0:
        return best
    for other in (solve_greedy, solve_spmix):
        try:
            rival = other(problem)
        except (BudgetInfeasibleError, ConfigError):
            continue
        if rival.omega < best.omega:
            best = replace(rival, mode=answer.mode, gap=answer.gap)
    return best


def pareto_front(
    problem: Problem, resource: str, *, mode: str = "free", points: int = 16
) -> list[Assignment]:
    """Return non-dominated answers, cheapest first, over `points` even budgets of one resource.

    The other budgets stay in force. Both costs and omegas are strictly monotone along the front.

    Raises:
        BudgetInfeasibleError: not even the largest budget leaves an answer.
    """
    groups = problem.groups
    low = math.fsum(min(c.costs[resource] for c in g.candidates) for g in groups)
    high = math.fsum(max(c.costs[resource] for c in g.candidates) for g in groups)
    found: list[Assignment] = []
    for step in range(points):
        share = step / max(points - 1, 1)
        limit = high if step == points - 1 else low + share * (high - low)
        trial = replace(problem, budgets={**problem.budgets, resource: limit})
        try:
            found.append(solve(trial, mode=mode))
        except BudgetInfeasibleError:
            if step == points - 1:
                raise
    return _non_dominated(found, resource)


def _non_dominated(found: list[Assignment], resource: str) -> list[Assignment]:
    front: list[Assignment] = []
    for answer in sorted(found, key=lambda a: (a.costs[resource], a.omega)):
        if not front or answer.omega < front[-1].omega:
            front.append(answer)
    return front
