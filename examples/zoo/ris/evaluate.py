# SPDX-License-Identifier: Apache-2.0
"""Evaluate referring segmentation: `python -m examples.zoo.ris.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from examples.zoo.log import append
from examples.zoo.metrics import MaskResult, MaskScores, bootstrap
from examples.zoo.ris.data import batches
from examples.zoo.ris.weights import load_model
from examples.zoo.splits import SPLITS, Split

LOG = Path(__file__).parent / "evaluation_log.jsonl"


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor], split: Split, num_samples: int, *, batch_size: int = 32
) -> MaskResult:
    """Score `model(pixel_values=, input_ids=, attention_mask=) -> logits [B, 1, H, W]`."""
    scores = MaskScores.empty()
    total = -(-num_samples // batch_size)
    for inputs, masks in tqdm(batches(split, num_samples, batch_size), total=total, leave=False):
        scores.add(model(**inputs) > 0, masks)
    return scores.result()


def main() -> None:
    """Print one JSON line and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    result = evaluate(load_model(), args.split, args.samples)
    interval = bootstrap(result["per_sample"])
    hits = sum(iou > 0.5 for iou in result["per_sample"]) / args.samples
    row = {
        "model": "ris float",
        "split": args.split,
        "samples": args.samples,
        "miou": round(result["miou"], 4),
        "miou_95": [round(interval.low, 4), round(interval.high, 4)],
        "oiou": round(result["oiou"], 4),
        "precision_at_0.5": round(hits, 4),
    }
    append(LOG, row)


if __name__ == "__main__":
    main()
