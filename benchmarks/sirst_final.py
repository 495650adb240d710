# SPDX-License-Identifier: Apache-2.0
"""What `sirst_mixed` keeps of float, on 1,000 new images: `python -m benchmarks.sirst_final`.

Both networks at the budget set beforehand, with the ladders (`spmix`) and without (`free`), beside
float and the uniform widths of that size, over three calibration seeds; 2/8 needs more activation
memory than the budget has, 2/6 is the widest that fits it. Then the same after block
reconstruction, for which `--tuned-seeds` says how often. The scenes are evaluation scenes of
another seed than the study's, so that no choice has seen them. Every cell appends a line to a log;
cells that the log holds for this version of the weights are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

import qgraph
from benchmarks.sirst import PAPER, RESULTS, paired, scored
from examples.zoo import sirst
from examples.zoo.sirst.scoring import WEIGHTS

LOG = RESULTS.with_name("sirst_final.jsonl")
BATCH = 16
SCENES = 1  # the study's are 0
CHOICES = (2, 3, 4, 5, 6, 8)
STEPS = 150
TUNED = " + reconstruction"
Line = dict[str, Any]


def pipelines() -> dict[str, qgraph.Pipeline]:
    """By name of the cell."""
    plain = {"uniform 2/8": "sirst_w2a8", "uniform 2/6": "sirst_w2a6"}
    found = {name: qgraph.pipeline(uniform) for name, uniform in plain.items()}
    tuned = {"uniform 2/6" + TUNED: qgraph.pipeline("sirst_w2a6_recon", steps=STEPS)}
    for mode in ("spmix", "free"):
        options: dict[str, Any] = {"mode": mode, "activation_choices": CHOICES}
        found[mode] = qgraph.pipeline("sirst_mixed", PAPER, **options)
        tuned[mode + TUNED] = qgraph.pipeline("sirst_mixed_recon", PAPER, steps=STEPS, **options)
    return found | tuned


def quantized(name: str, chosen: qgraph.Pipeline, seed: int, images: int) -> qgraph.QuantizedModel:
    """One network compiled on the calibration scenes of a seed."""
    data = [x for x, _ in sirst.batches("calibration", images, BATCH, seed=seed)]
    return qgraph.compile(sirst.load_model(name), data, chosen, seed=seed, verify=False)


def missing(
    model: str, seeds: tuple[int, int], count: int, images: int
) -> list[tuple[str, int]]:  # fmt: skip
    """Cells that the log lacks, float first; `seeds` without and with reconstruction."""
    wanted = [("float", 0)]
    for name in pipelines():
        wanted += [(name, seed) for seed in range(seeds[name.endswith(TUNED)])]
    held = {(x["cell"], x["seed"]) for x in read(model, count, images)}
    return [cell for cell in wanted if cell not in held]


def read(model: str, count: int, images: int) -> list[Line]:
    """Lines of the log for these weights and sizes."""
    if not LOG.exists():
        return []
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    same = {"model": model, "images": count, "calibration": images, "weights": digest(model)}
    return [x for x in lines if same.items() <= x.items()]


def digest(model: str) -> str:
    """Of the weights' file."""
    return hashlib.sha256((WEIGHTS / f"{model}.safetensors").read_bytes()).hexdigest()[:16]


def measure(model: str, cell: str, seed: int, count: int, images: int) -> Line:
    """One line of the log."""
    cost: Any = None
    if cell == "float":
        scores = scored(sirst.load_model(model), count, BATCH, scenes=SCENES)
    else:
        result = quantized(model, pipelines()[cell], seed, images)
        scores = scored(result, count, BATCH, scenes=SCENES)
        cost = None if result.report.cost is None else result.report.cost.to_json()
    return {
        "model": model, "cell": cell, "seed": seed, "images": count, "calibration": images,
        "weights": digest(model), "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "cost": cost, **scores,
    }  # fmt: skip


def pooled(lines: list[Line], cell: str) -> Line | None:
    """All seeds of a cell as one: its IoU, and the counts of all images; None: not measured."""
    own = [x for x in lines if x["cell"] == cell]
    if not own:
        return None
    counts = {k: np.concatenate([x[k] for x in own]) for k in ("intersection", "union")}
    iou = float(counts["intersection"].sum() / counts["union"].sum())
    return {"iou": iou, "seeds": len(own), **counts}


def above(line: Line, other: Line) -> str:
    """Points of IoU that one lies above another, with a bootstrap interval over the same images."""
    times = line["seeds"] // other["seeds"]
    several = {k: np.tile(other[k], times) for k in ("intersection", "union")}
    gap = paired(line, {"iou": other["iou"], **several})
    return f"{gap[0]:.2f} [{gap[1]:.2f}, {gap[2]:.2f}]"


def table(lines: list[Line]) -> str:
    """Markdown: mean over seeds, points above float, and above the uniform width that fits."""
    reference = pooled(lines, "float")
    assert reference is not None
    rows = [f"| {lines[0]['model']} | IoU | above float | above uniform 2/6 | seeds |"]
    rows += ["|---" * 5 + "|", f"| float | {100 * reference['iou']:.1f} | | | |"]
    for name in pipelines():
        line = pooled(lines, name)
        if line is None:
            continue
        rival = pooled(lines, "uniform 2/6" + (TUNED if name.endswith(TUNED) else ""))
        beside = "" if rival is None or "uniform" in name else above(line, rival)
        rows.append(
            f"| {name} | {100 * line['iou']:.1f} | {above(line, reference)} | {beside} |"
            f" {line['seeds']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure what the log lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="of the evaluation split")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuned-seeds", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying pytree specs
    for model in sorted(sirst.MODELS):
        seeds = (args.seeds, args.tuned_seeds)
        for cell, seed in missing(model, seeds, args.images, args.calibration):
            line = measure(model, cell, seed, args.images, args.calibration)
            with LOG.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(model, cell, seed, f"{100 * line['iou']:.2f}", flush=True)
        print(table(read(model, args.images, args.calibration)), end="\n\n")


if __name__ == "__main__":
    main()
