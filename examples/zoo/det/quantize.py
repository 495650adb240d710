# SPDX-License-Identifier: Apache-2.0
"""Quantize a detector and score every backend: `python -m examples.zoo.det.quantize`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qgraph
from examples.zoo.det.boxes import detections
from examples.zoo.det.data import batches
from examples.zoo.det.evaluate import LOG, evaluate
from examples.zoo.det.objective import objective
from examples.zoo.det.weights import MODELS, Kind, load_model
from examples.zoo.log import append
from examples.zoo.splits import SPLITS, Split
from qgraph.calibration.boxes import Detections

CALIBRATION_SAMPLES = 256
Model = Callable[..., tuple[Tensor, ...]]


def compile_zoo(kind: Kind, pipeline: str, *, seed: int = 0) -> qgraph.QuantizedModel:
    """The detector compiled on samples of its calibration split, with the filtered global loss."""
    loader = [inputs for inputs, _ in batches("calibration", CALIBRATION_SAMPLES, 32, seed=seed)]
    return qgraph.compile(load_model(kind), loader, pipeline=pipeline, loss=objective())


def same(first: Detections, second: Detections) -> bool:
    """Whether two images have the same detections: classes in order, boxes to 0.01 pixels."""
    return torch.equal(first.labels, second.labels) and torch.allclose(
        first.boxes, second.boxes, rtol=0, atol=0.01
    )


@torch.no_grad()
def differing(first: Model, second: Model, split: Split, num_samples: int) -> int:
    """Images whose detections differ between two backends."""
    return sum(
        not same(a, b)
        for inputs, _ in batches(split, num_samples, 32)
        for a, b in zip(detections(first(**inputs)), detections(second(**inputs)), strict=True)
    )


def main() -> None:
    """Print one JSON line per backend and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(MODELS), default="retinanet")
    parser.add_argument("--pipeline", default="det_int8")
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--backends", nargs="+", default=["reference", "integer", "onnx"])
    args = parser.parse_args()
    quantized = compile_zoo(args.kind, args.pipeline)
    reference: Any = quantized.lower("reference")
    base = evaluate(load_model(args.kind), args.split, args.samples)["map"]
    for backend in args.backends:
        lowered: Any = quantized.lower(backend)
        score = evaluate(lowered, args.split, args.samples)["map"]
        row = {
            "model": f"{args.kind} {args.pipeline} {backend}",
            "split": args.split,
            "samples": args.samples,
            "map": round(score, 4),
            "drop_points": round(100 * (base - score), 3),
            "images_unlike_reference": differing(lowered, reference, args.split, args.samples),
        }
        append(LOG, row)


if __name__ == "__main__":
    main()
