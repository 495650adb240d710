# SPDX-License-Identifier: Apache-2.0
"""Evaluate a detector: `python -m examples.zoo.det.evaluate --kind retinanet`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from examples.zoo.det.boxes import detections
from examples.zoo.det.data import CLASSES, batches
from examples.zoo.det.metrics import BoxScores
from examples.zoo.det.weights import MODELS, load_model
from examples.zoo.log import append
from examples.zoo.splits import SPLITS, Split

LOG = Path(__file__).parent / "evaluation_log.jsonl"


class Result(TypedDict):
    """mAP@[.5:.95] in [0, 1], and what it was computed from, for resampling."""

    map: float
    scores: BoxScores


@torch.no_grad()
def evaluate(
    model: Callable[..., tuple[Tensor, ...]],
    split: Split,
    num_samples: int,
    *,
    batch_size: int = 32,
) -> Result:
    """Score `model(pixel_values=) -> raw outputs`, after decoding and suppression."""
    scores = BoxScores(len(CLASSES))
    total = -(-num_samples // batch_size)
    for inputs, targets in tqdm(batches(split, num_samples, batch_size), total=total, leave=False):
        for found, target in zip(detections(model(**inputs)), targets, strict=True):
            scores.add(found, target)
    return {"map": scores.mean_average_precision(), "scores": scores}


def main() -> None:
    """Print one JSON line and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(MODELS), default="retinanet")
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    result = evaluate(load_model(args.kind), args.split, args.samples)
    row = {
        "model": f"{args.kind} float",
        "split": args.split,
        "samples": args.samples,
        "map": round(result["map"], 4),
    }
    append(LOG, row)


if __name__ == "__main__":
    main()
