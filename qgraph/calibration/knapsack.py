# SPDX-License-Identifier: Apache-2.0
"""Exact multiple-choice knapsack with several budgets, by scipy's HiGHS.

Rows are scaled by their budget and the objective by its spread, so that the solver's absolute
tolerances mean the same for bytes, bit operations and milliseconds; the totals of every answer are
then summed again exactly, and an answer that used a tolerance to overrun a budget is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from qgraph.calibration.assignment import Assignment, Bits, Group, Problem, infeasible
from qgraph.errors import ConfigError

MODE = "free"
# Limits count nodes and not seconds: the same input gives the same answer on every machine.
NODE_LIMIT = 20_000
MAX_CUTS = 50
EXACT_GROUPS = 100
LARGE_GAP = 1e-4
_OBJECTIVE_SCALE = 1e4


@dataclass(slots=True)
class _Program:
    """The binary program of a merged problem: one column per candidate, groups in order."""

    groups: tuple[Group, ...]
    starts: NDArray[np.int64] = field(init=False)
    cuts: list[NDArray[np.int64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = [len(g.candidates) for g in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def columns(self) -> int:
        return int(self.starts[-1])

    def costs(self, resource: str) -> NDArray[np.float64]:
        return np.asarray([c.costs[resource] for g in self.groups for c in g.candidates])

    def omegas(self) -> NDArray[np.float64]:
        return np.asarray([c.omega for g in self.groups for c in g.candidates])

    def solve(
        self, objective: NDArray[np.float64], limits: dict[str, float], *, gap: float
    ) -> tuple[NDArray[np.int64] | None, float, int]:
        """Return the chosen columns (or None), the remaining relative gap and HiGHS' status."""
        row = np.repeat(np.arange(len(self.groups)), np.diff(self.starts))
        shape = (len(self.groups), self.columns)
        one_each = sparse.csr_array((np.ones(self.columns), (row, np.arange(shape[1]))), shape)
        constraints = [LinearConstraint(one_each, 1, 1)]
        for resource, limit in limits.items():
            amount = self.costs(resource)
            unit = limit if limit > 0 else float(amount.max()) or 1.0
            constraints.append(LinearConstraint(amount[None, :] / unit, -np.inf, limit / unit))
        for cut in self.cuts:
            indicator = np.zeros((1, self.columns))
            indicator[0, cut] = 1
            constraints.append(LinearConstraint(indicator, -np.inf, len(cut) - 1))
        least = np.minimum.reduceat(objective, self.starts[:-1])
        excess = objective - np.repeat(least, np.diff(self.starts))
        spread = float(np.maximum.reduceat(excess, self.starts[:-1]).sum()) or 1.0
        answer = milp(
            excess * (_OBJECTIVE_SCALE / spread),
            constraints=constraints,
            integrality=np.ones(self.columns),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "node_limit": NODE_LIMIT},
        )
        if answer.x is None:
            return None, float("inf"), int(answer.status)
        chosen = [
            int(a + np.argmax(answer.x[a:b]))
            for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
        ]
        remaining = getattr(answer, "mip_gap", None)
        return np.asarray(chosen), float(remaining or 0.0), int(answer.status)

    def bits(self, chosen: Iterable[int]) -> dict[str, Bits]:
        return {
            group.name: group.candidates[int(column - start)].bits
            for group, start, column in zip(self.groups, self.starts[:-1], chosen, strict=True)
        }


def solve_exact(problem: Problem, *, gap: float | None = None) -> Assignment:
    """Return the assignment with the least total omega within every budget.

    Exact (relative gap 0, within HiGHS' 1e-10 of the objective's spread) up to `EXACT_GROUPS`
    groups; beyond, the proven gap may be up to `LARGE_GAP`, and the answer states it.

    Raises:
        BudgetInfeasibleError: no assignment fits; names the resource and its best possible value.
        ConfigError: the search ended at its node limit without any answer.
    """
    if not problem.groups:
        return problem.evaluate({}, mode=MODE)
    problem.check_each_budget()
    merged = problem.merged()
    if gap is None:
        gap = 0.0 if len(merged.groups) <= EXACT_GROUPS else LARGE_GAP
    program, limits = _Program(merged.groups), dict(problem.budgets)
    for _ in range(MAX_CUTS):
        chosen, reached, status = program.solve(program.omegas(), limits, gap=gap)
        if chosen is None:
            break
        answer = problem.evaluate(problem.expand(program.bits(chosen)), mode=MODE, gap=reached)
        if problem.fits(answer.costs):
            return answer
        program.cuts.append(chosen)
    else:
        return _tightened(problem, program, limits, gap=gap)
    if status == 1:
        msg = f"no assignment found in {NODE_LIMIT} nodes for {len(merged.groups)} groups"
        raise ConfigError(msg)
    raise _joint_infeasibility(problem, merged)


def _tightened(
    problem: Problem, program: _Program, limits: dict[str, float], *, gap: float
) -> Assignment:
    """Solve with budgets smaller by HiGHS' feasibility tolerance, after cuts did not suffice."""
    shrunk = {resource: limit * (1 - 2e-6) for resource, limit in limits.items()}
    chosen, reached, _ = program.solve(program.omegas(), shrunk, gap=gap)
    if chosen is None:
        raise _joint_infeasibility(problem, problem.merged())
    return problem.evaluate(problem.expand(program.bits(chosen)), mode=MODE, gap=max(reached, 2e-6))


def _joint_infeasibility(problem: Problem, merged: Problem) -> Exception:
    """Name the first budget that fails beside those before it, and the least amount there."""
    program, accepted = _Program(merged.groups), dict[str, float]()
    for resource, limit in problem.budgets.items():
        chosen, _, _ = program.solve(program.costs(resource), accepted, gap=0.0)
        if chosen is None:
            break
        costs = problem.evaluate(problem.expand(program.bits(chosen)), mode=MODE).costs
        if costs[resource] > limit:
            beside = tuple(accepted)
            return infeasible(resource, limit=limit, best=costs[resource], beside=beside)
        accepted[resource] = limit
    msg = f"the budgets {dict(problem.budgets)} leave no room beyond the solver's tolerance"
    return ConfigError(msg)
