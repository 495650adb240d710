# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.minilm_recon`: MiniLM's linears at 4-bit weights, rounded in better ways.

All rows have the same formats and ranges; only the codes of the weights (and, where learned, the
steps of activations) differ. 256 calibration sentences hold some 5,400 tokens; padding does not
count. Fidelity is that of sentences from another package, as in `benchmarks/minilm.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qgraph
from examples.demo_minilm import quality
from examples.minilm import calibration_batches, evaluation_batches, load_model
from qgraph.passes import CompensateRounding, CorrectBiases, InsertQuantizers, ReconstructBlocks
from qgraph.pipeline import Pass, Pipeline
from qgraph.report.text import table

RESULT = Path("benchmarks/results/minilm_recon.json")
HEAD = ("pipeline", "rounding", "SQNR dB", "cosine", "rank corr", "CPU s", "blocks accepted")


def variants(steps: int) -> dict[str, Pass | None]:
    """Name -> the pass behind insert-quantizers."""
    return {
        "to nearest": None,
        "to nearest, biases corrected": CorrectBiases(),
        "with feedback, each layer alone": CompensateRounding(),
        "with feedback, layer after layer": ReconstructBlocks(steps=0),
        f"the same, {steps} steps learned": ReconstructBlocks(steps=steps),
    }


def counted_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens that are not padding, bool [B, T]."""
    mask: Tensor = kwargs["attention_mask"] if "attention_mask" in kwargs else args[1]
    return mask.bool()


def pipeline_of(name: str, item: Pass | None) -> Pipeline:
    """The plain pipeline over linears, with a way of rounding."""
    built = qgraph.pipeline(name, scope="linear")
    return built if item is None else built.insert_after(InsertQuantizers.name, item)


def main() -> None:
    """Measure what is missing, save each row, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", nargs="+", default=["w4a8", "w4a4"])
    parser.add_argument("--batches", type=int, default=32, help="calibration batches of 8 x 64")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="substring of the ways of rounding to run")
    args = parser.parse_args()
    model, calibration = load_model(), calibration_batches(args.batches)
    evaluation = evaluation_batches(8)
    with torch.no_grad():
        reference = [model(**batch).last_hidden_state for batch in evaluation]
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for width in args.widths:
        for name, item in variants(args.steps).items():
            key = f"{width}/{name}/{args.batches}"
            if key in rows or args.only not in name:
                continue
            start = time.process_time()
            quantized = qgraph.compile(
                model, calibration, pipeline_of(width, item), row_masks=counted_tokens,
                verify=False, progress=False,
            )  # fmt: skip
            seconds = time.process_time() - start
            with torch.no_grad():
                outputs = [quantized.graph_module(**b).last_hidden_state for b in evaluation]
            applied = [d for d in quantized.report.decisions if d.by == ReconstructBlocks.name]
            accepted = sum(d.outcome == "applied" for d in applied)
            rows[key] = [
                width, name, *quality(reference, outputs, evaluation), f"{seconds:.0f}",
                str(accepted) if applied else "",
            ]  # fmt: skip
            print(rows[key], flush=True)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(HEAD, [tuple(row) for row in rows.values()]))


if __name__ == "__main__":
    main()
