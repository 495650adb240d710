# SPDX-License-Identifier: Apache-2.0
"""Evaluate the classifiers: `python -m examples.zoo.vit.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from examples.zoo.log import append
from examples.zoo.metrics import bootstrap, correct
from examples.zoo.splits import SPLITS, Split
from examples.zoo.vit.data import batches
from examples.zoo.vit.model import KINDS
from examples.zoo.vit.weights import FOLDER, load_model

LOG = FOLDER / "evaluation_log.jsonl"


class Result(TypedDict):
    """Share of right answers, and 1.0 or 0.0 for every sample in order."""

    accuracy: float
    per_sample: list[float]


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor], split: Split, num_samples: int, *, batch_size: int = 64
) -> Result:
    """Score `model(pixel_values=) -> logits [B, 10]`."""
    hits: list[float] = []
    for inputs, labels in batches(split, num_samples, batch_size):
        hits += correct(model(**inputs), labels)
    return {"accuracy": sum(hits) / len(hits), "per_sample": hits}


def main() -> None:
    """Print one JSON line per model and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    for kind in args.kinds:
        result = evaluate(load_model(kind), args.split, args.samples)
        interval = bootstrap(result["per_sample"])
        row = {
            "model": f"{kind} float",
            "split": args.split,
            "samples": args.samples,
            "accuracy": round(result["accuracy"], 4),
            "accuracy_95": [round(interval.low, 4), round(interval.high, 4)],
        }
        append(LOG, row)


if __name__ == "__main__":
    main()
