# SPDX-License-Identifier: Apache-2.0
"""Evaluate promptable segmentation: `python -m examples.zoo.sam.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from examples.zoo.log import append
from examples.zoo.metrics import MaskResult, MaskScores, bootstrap
from examples.zoo.sam.data import Prompt, batches
from examples.zoo.sam.model import best_mask
from examples.zoo.sam.weights import WEIGHTS, load_model
from examples.zoo.splits import SPLITS, Split

LOG = WEIGHTS.with_name("evaluation_log.jsonl")


@torch.no_grad()
def evaluate(
    model: Callable[..., tuple[Tensor, Tensor]],
    split: Split,
    num_samples: int,
    *,
    batch_size: int = 32,
    prompt: Prompt = "mixed",
) -> MaskResult:
    """Score `model(pixel_values=, points=, labels=) -> (masks, quality)` by its best candidate."""
    scores = MaskScores.empty()
    for inputs, masks in batches(split, num_samples, batch_size, prompt=prompt):
        scores.add(best_mask(*model(**inputs)), masks)
    return scores.result()


def main() -> None:
    """Print one JSON line per kind of prompt and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    model = load_model()
    prompts: tuple[Prompt, ...] = ("box", "point")
    for prompt in prompts:
        result = evaluate(model, args.split, args.samples, prompt=prompt)
        interval = bootstrap(result["per_sample"])
        row = {
            "model": "sam float",
            "prompt": prompt,
            "split": args.split,
            "samples": args.samples,
            "miou": round(result["miou"], 4),
            "miou_95": [round(interval.low, 4), round(interval.high, 4)],
            "oiou": round(result["oiou"], 4),
        }
        append(LOG, row)


if __name__ == "__main__":
    main()
