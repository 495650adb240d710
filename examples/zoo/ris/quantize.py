# SPDX-License-Identifier: Apache-2.0
"""Quantize the zoo's model and score every backend: `python -m examples.zoo.ris.quantize`."""

from __future__ import annotations

import argparse
from typing import Any

import qgraph
from examples.zoo.log import append
from examples.zoo.metrics import bootstrap
from examples.zoo.ris.data import batches
from examples.zoo.ris.evaluate import LOG, evaluate
from examples.zoo.ris.weights import load_model
from examples.zoo.splits import SPLITS

CALIBRATION_SAMPLES = 64


def compile_zoo(pipeline: str, *, seed: int = 0) -> qgraph.QuantizedModel:
    """The zoo model compiled on samples of its calibration split."""
    loader = list(batches("calibration", CALIBRATION_SAMPLES, 16, seed=seed))
    return qgraph.compile(load_model(), loader, pipeline=pipeline)


def main() -> None:
    """Print one JSON line per backend and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="int8")
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--backends", nargs="+", default=["reference", "integer", "onnx"])
    args = parser.parse_args()
    quantized = compile_zoo(args.pipeline)
    inputs, _ = next(iter(batches(args.split, 8, 8)))
    parity = quantized.verify(inputs)
    print(str(parity).splitlines()[-3:])
    base = evaluate(load_model(), args.split, args.samples)
    report("ris float", base, base, args)
    for backend in args.backends:
        result = evaluate(quantized.lower(backend), args.split, args.samples)
        report(f"ris {args.pipeline} {backend}", result, base, args)


def report(name: str, result: Any, base: Any, args: argparse.Namespace) -> None:
    """One line: scores, and the paired drop in points with its bootstrap interval."""
    pairs = zip(base["per_sample"], result["per_sample"], strict=True)
    drop = bootstrap([100 * (before - after) for before, after in pairs])
    row = {
        "model": name,
        "split": args.split,
        "samples": args.samples,
        "miou": round(result["miou"], 4),
        "oiou": round(result["oiou"], 4),
        "drop_points": round(100 * (base["miou"] - result["miou"]), 3),
        "drop_95": [round(drop.low, 3), round(drop.high, 3)],
    }
    append(LOG, row)


if __name__ == "__main__":
    main()
