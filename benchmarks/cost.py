# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.cost`: CPU time of compile() over the float forward of its batches.

Tracing comes first and does not count, neither do verification and sensitivities. The float passes
right before and behind each compilation are what it is compared with; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import qgraph
from benchmarks.__main__ import MODELS, forward_seconds
from benchmarks.onnx_models import Case
from qgraph.report.text import table

RESULT = Path("benchmarks/results/cost.json")
CASES = (
    ("minilm", "int8"), ("vit", "int8"), ("unet", "int8"),
    ("minilm", "ris_int4"), ("minilm", "sam_int4"), ("unet", "sirst_mixed"),
)  # fmt: skip
BATCHES = {"minilm": 32, "vit": 16, "unet": 8}
UNCOUNTED = {"assign-bits"}  # the sensitivity sweep


def limit(pipeline: str) -> float:
    """What the ratio may be at most."""
    return 1.5 if pipeline == "int8" else 1.8


def one_round(case: Case, pipeline: str) -> tuple[float, dict[str, float]]:
    """The ratio, and each pass's part of it."""
    traced = qgraph.trace(case.model, **case.calibration[0])
    before, start = forward_seconds(case), time.process_time()
    made = qgraph.compile(traced, case.calibration, pipeline, verify=False, progress=False)
    spent = time.process_time() - start
    plain = (before + forward_seconds(case)) / 2
    parts = {step.name: step.cpu_seconds / plain for step in made.report.steps}
    return spent / plain - sum(parts.get(name, 0.0) for name in UNCOUNTED), parts


def measured(model: str, pipeline: str, rounds: int) -> dict[str, object]:
    """Medians over rounds."""
    case = MODELS[model](BATCHES.get(model, 8))
    with torch.no_grad():
        found = [one_round(case, pipeline) for _ in range(rounds)]
    ratios = sorted(ratio for ratio, _ in found)
    parts = {name: statistics.median(p[name] for _, p in found) for name in found[0][1]}
    return {
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
        "rounds": rounds, "batches": len(case.calibration),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "torch": torch.__version__,
        "parts": {name: round(share, 3) for name, share in parts.items() if share >= 0.005},
    }  # fmt: skip


def main() -> None:
    """Measure all pairs, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="such as minilm/int8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    saved = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for model, pipeline in CASES:
        if options.only in f"{model}/{pipeline}":
            saved[f"{model}/{pipeline}"] = measured(model, pipeline, options.rounds)
            RESULT.write_text(json.dumps(saved, indent=1) + "\n")
    rows = [
        (name, f"{row['ratio']:.2f}", f"{row['lowest']:.2f} .. {row['highest']:.2f}",
         f"{limit(name.partition('/')[2])}", f"{row['parts']['calibrate']:.2f}")
        for name, row in saved.items()
    ]  # fmt: skip
    print(table(("model/pipeline", "compile / float", "range", "limit", "sweep alone"), rows))


if __name__ == "__main__":
    main()
