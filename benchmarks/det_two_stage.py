# SPDX-License-Identifier: Apache-2.0
"""The second stage of a two-stage detector, quantized: `python -m benchmarks.det_two_stage`.

Proposals are the float one-stage detector's for every model, so drops are the quantized network's
alone. Searched ranges against the whole `det` pipeline with the filtered global loss, by width;
mAP@[.5:.95] in points on the evaluation split. Each finished row is saved; a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qgraph
from examples.zoo.det.data import CLASSES, Target
from examples.zoo.det.metrics import BoxScores
from examples.zoo.det.objective import CHOSEN
from examples.zoo.det.two_stage import (
    load_two_stage,
    proposed_batches,
    relative_predictions,
    two_stage_detections,
)

RESULTS = Path(__file__).parent / "results" / "det_two_stage.json"
WIDTHS = ("w8a8", "w4a8", "w4a4")
LEARNED = ("reconstruct-blocks", "tune-ranges", "use-log-affine")
Sample = tuple[dict[str, Tensor], list[Target], Tensor]


@torch.no_grad()
def score(model: Callable[..., tuple[Tensor, Tensor]], samples: list[Sample]) -> float:
    """mAP in points."""
    scores = BoxScores(len(CLASSES))
    for inputs, targets, proposals in samples:
        found = two_stage_detections(model(**inputs), proposals)
        for mine, theirs in zip(found, targets, strict=True):
            scores.add(mine, theirs)
    return round(100 * scores.mean_average_precision(), 3)


def quantized(width: str, calibration: list[dict[str, Tensor]], *, learned: bool) -> Any:
    """The detector at a width, all of the pipeline or searched ranges only."""
    chosen = qgraph.pipeline(f"det_{width}")
    for name in LEARNED if not learned else ():
        if name in [item.name for item in chosen]:
            chosen = chosen.without(name)
    loss = qgraph.FilteredGlobalLoss(relative_predictions, **CHOSEN)  # type: ignore[arg-type]
    return qgraph.compile(
        load_two_stage(), calibration, chosen, loss=loss, progress=False, verify=False
    ).lower("reference")


def main() -> None:
    """Measure what is missing, save, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation images")
    parser.add_argument("--split", choices=("development", "evaluation"), default="evaluation")
    args = parser.parse_args()
    samples = list(proposed_batches(args.split, args.samples, 32))
    calibration = [inputs for inputs, _, _ in proposed_batches("calibration", args.images, 32)]
    rows: dict[str, float] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where = f"{args.split} {args.samples}"
    cases = [("float", "float", False)]
    cases += [(w, name, name == "all") for w in WIDTHS for name in ("searched", "all")]
    for width, name, learned in cases:
        key = f"{where} | {width} | {name}"
        if key not in rows:
            model = load_two_stage() if width == "float" else None
            made = model or quantized(width, calibration, learned=learned)
            rows[key] = score(made, samples)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        drop = rows[f"{where} | float | float"] - rows[key]
        print(f"{key:40} {rows[key]:7.3f}  {drop:6.3f} below float", flush=True)


if __name__ == "__main__":
    main()
