# SPDX-License-Identifier: Apache-2.0
"""Reconstruction on the other zoos: `python -m benchmarks.recon_zoo [--split evaluation]`.

The family's own pipeline, then per block (OBR) and with supervision behind and inside the block
(MGRQ), from the same start with equal steps. Chosen on the development split; each finished row is
saved, a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import qgraph
from benchmarks.vit import FAR, INSIDE, NAME, PLAIN
from benchmarks.zoo_models import METRICS, ZOO
from qgraph.passes import ReconstructBlocks
from qgraph.pipeline import Pipeline
from qgraph.report.text import table

RESULT = Path("benchmarks/results/recon_zoo.json")
CASES = (
    ("zoo-ris", "ris_int4"), ("zoo-ris", "ris_int3"), ("zoo-sam", "sam_int4"),
    ("zoo-sam", "sam_int3"), ("zoo-sirst", "sirst_mixed"),
)  # fmt: skip
VARIANTS = {
    "without": None, "OBR": PLAIN, "OBR + EBGS": FAR, "OBR + IBLS": INSIDE, "MGRQ": FAR | INSIDE,
}  # fmt: skip
BATCHES = {"zoo-ris": 8, "zoo-sam": 8, "zoo-sirst": 8}


def chosen(name: str, options: dict[str, Any] | None, steps: int) -> Pipeline:
    """The pipeline of a row."""
    if options is None:
        return qgraph.pipeline(name)
    built = qgraph.pipeline(f"{name}_recon")
    return built.replace(NAME, ReconstructBlocks(**{"steps": steps, **options}))


def row(model: str, name: str, variant: str, seed: int, options: argparse.Namespace) -> Any:
    """Compile and score."""
    case = ZOO[model](BATCHES[model])
    pipeline = chosen(name, VARIANTS[variant], options.steps)
    start = time.process_time()
    made = qgraph.compile(
        case.model, case.calibration, pipeline, seed=seed, progress=False, verify=False
    )
    spent = time.process_time() - start
    tuned = [d for d in made.report.decisions if d.by == NAME and d.numbers]
    score = METRICS[model]
    return {
        "score": score(made.lower("reference"), options.split, options.samples),
        "float": score(case.model, options.split, options.samples),
        "regions": len(tuned), "applied": sum(d.outcome == "applied" for d in tuned),
        "cpu_seconds": round(spent, 1),
    }  # fmt: skip


def shown(saved: dict[str, Any]) -> str:
    """Means over seeds."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for key, found in saved.items():
        model, name, variant, _, *rest = key.split("/")
        groups.setdefault((model, name, variant, *rest), []).append(found)
    lines = [
        (*key, f"{statistics.mean(r['score'] for r in rows):.2f}", f"{rows[0]['float']:.2f}",
         f"{rows[0]['applied']} of {rows[0]['regions']}",
         f"{statistics.mean(r['cpu_seconds'] for r in rows):.0f}", len(rows))
        for key, rows in groups.items()
    ]  # fmt: skip
    heads = ("model", "pipeline", "variant", "split", "samples", "steps", "%", "float %",
             "regions", "CPU s", "seeds")  # fmt: skip
    return table(heads, [tuple(map(str, line)) for line in lines], width=120)


def main() -> None:
    """Measure what is missing, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="such as zoo-sam/sam_int4")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS,
                        default=["without", "OBR", "MGRQ"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="per region")
    parser.add_argument("--samples", type=int, default=500, help="scored")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=("development", "evaluation"), default="development")
    options = parser.parse_args()
    torch.set_num_threads(1)
    saved = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for model, name in CASES:
        for variant, tuning in VARIANTS.items():
            for seed in range(options.seeds if tuning is not None else 1):
                key = f"{model}/{name}/{variant}/{seed}/{options.split}/{options.samples}"
                key += f"/{options.steps}"
                if options.only in key and variant in options.variants and key not in saved:
                    saved[key] = row(model, name, variant, seed, options)
                    RESULT.write_text(json.dumps(saved, indent=1) + "\n")
                    print(key, saved[key], flush=True)
    print(shown(saved))


if __name__ == "__main__":
    main()
