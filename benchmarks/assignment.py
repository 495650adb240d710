# SPDX-License-Identifier: Apache-2.0
"""Time the bit assignment solvers on 1,000 layers x 6 widths x 3 budgets, one JSON line each.

`python -m benchmarks.assignment` (about a minute on one thread)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time

import numpy as np

from qgraph.calibration.assignment import Candidate, Group, Problem
from qgraph.calibration.pareto import MODES, solve

WIDTHS = (2, 3, 4, 5, 6, 8)
LEVELS = 5


def random_problem(num_layers: int, *, seed: int, share: float) -> Problem:
    """Return layers with sensitivities about 4**-bits and budgets that bind together.

    `share` is the size budget as a part of the size at 8 bits; the others follow from it.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(num_layers):
        weights, activations = (float(rng.integers(100, high)) for high in (200_000, 100_000))
        macs, loss = weights * float(rng.integers(1, 500)), float(rng.lognormal(0.0, 2.0))
        candidates = tuple(
            Candidate(
                bits=(b, b),
                omega=loss * 4.0**-b * float(rng.uniform(0.5, 2.0)),
                costs={"size": weights * b, "bops": macs * b * b, "activations": activations * b},
            )
            for b in WIDTHS
        )
        level = index * LEVELS // num_layers
        groups.append(Group(name=f"layer{index}", index=index, level=level, candidates=candidates))
    most = {r: math.fsum(g.candidates[-1].costs[r] for g in groups) for r in ("size", "bops")}
    most["activations"] = math.fsum(g.candidates[-1].costs["activations"] for g in groups)
    shares = {"size": share, "bops": 1.1 * share**2, "activations": 1.07 * share}
    return Problem(tuple(groups), {r: part * most[r] for r, part in shares.items()})


def main() -> None:
    """Print one line per instance and mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1000)
    options = parser.parse_args()
    for seed, share in enumerate((0.4, 0.5, 0.6, 0.7)):
        problem = random_problem(options.layers, seed=seed, share=share)
        for mode in MODES:
            start, cpu_start = time.perf_counter(), time.process_time()
            answer = solve(problem, mode=mode)
            line = {
                "mode": mode,
                "layers": options.layers,
                "size_share": share,
                "seconds": round(time.perf_counter() - start, 3),
                "cpu_seconds": round(time.process_time() - cpu_start, 3),
                "omega": answer.omega,
                "gap": answer.gap,
                "used": {r: round(answer.costs[r] / b, 4) for r, b in problem.budgets.items()},
                "host": platform.processor() or platform.machine(),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
