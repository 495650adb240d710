# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.minilm`: pipelines on the real MiniLM, by what is quantized, and the cost.

Fidelity: SQNR of the last hidden state over unmasked tokens of sentences that no calibration saw.
Cost: CPU time of calibration and of the deciding and writing passes over that of the plain float
forward of the same batches, in the same process; tracing and verification are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

import qgraph
from examples.demo_minilm import quality
from examples.minilm import calibration_batches, evaluation_batches, load_model
from qgraph.report.text import table

RESULT = Path("benchmarks/results/minilm.json")
LINEAR = ("linear",)
VARIANTS: dict[str, dict[str, object]] = {
    "linears": {"scope": LINEAR},
    "linears, min-max ranges": {"scope": LINEAR, "method": "minmax"},
    "linears, MSE ranges": {"scope": LINEAR, "method": "mse"},
    "linears + attention": {"scope": (*LINEAR, "matmul")},
    "linears + embeddings": {"scope": (*LINEAR, "embedding")},
    "linears + every add": {"scope": (*LINEAR, "add"), "add_sqnr": float("-inf")},
    "int8 (adds by benefit)": {},
    "int8, every add": {"add_sqnr": float("-inf")},
    "ris_int8, linears": {"pipeline": "ris_int8", "scope": LINEAR},
    "ris_int8, linears + attention": {"pipeline": "ris_int8", "scope": (*LINEAR, "matmul")},
    "ris_int6, linears": {"pipeline": "ris_int6", "scope": LINEAR},
    "int4, linears": {"pipeline": "int4", "scope": LINEAR},
    "ris_int4, linears": {"pipeline": "ris_int4", "scope": LINEAR},
    "ris_int4": {"pipeline": "ris_int4"},
}


def main() -> None:
    """Measure all variants and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=32, help="calibration batches of 8 x 64")
    parser.add_argument("--only", default="", help="substring of the variants to run")
    options = parser.parse_args()
    model, calibration = load_model(), calibration_batches(options.batches)
    evaluation = evaluation_batches(8)
    with torch.no_grad():
        reference = [model(**batch).last_hidden_state for batch in evaluation]
    rows = []
    for name, choice in VARIANTS.items():
        if options.only in name:
            cost, quantized = _compile(model, calibration, choice)
            with torch.no_grad():
                run = quantized.graph_module
                outputs = [run(**batch).last_hidden_state for batch in evaluation]
            rows.append((name, *quality(reference, outputs, evaluation), *cost))
            print(rows[-1], flush=True)
    head = ("quantized", "SQNR dB", "cosine", "rank corr", "sweep / float", "compile / float")
    print(table(head, rows))
    host = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch": torch.__version__, "threads": torch.get_num_threads()}  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"host": host, "head": head, "rows": rows}, indent=1))


def _compile(
    model: torch.nn.Module, calibration: list[dict[str, torch.Tensor]], choice: dict[str, object]
) -> tuple[tuple[str, str], qgraph.QuantizedModel]:
    """CPU-time ratios of the sweep and of all counted passes, and the quantized model."""
    with torch.no_grad():
        model(**calibration[0])  # the first forward also pays for caches
    start = time.process_time()
    with torch.no_grad():
        for batch in calibration:
            model(**batch)
    forward = time.process_time() - start
    options = {"pipeline": "int8"} | choice
    chosen = qgraph.pipeline(str(options.pop("pipeline")), None, **options)
    quantized = qgraph.compile(model, calibration, pipeline=chosen, verify=False, progress=False)
    steps = {step.name: step.cpu_seconds for step in quantized.report.steps}
    canonical = ("drop-noops", "normalize-ops", "open-attention", "fold-batch-norm")
    counted = sum(seconds for name, seconds in steps.items() if name not in canonical)
    ratios = steps["calibrate"] / forward, counted / forward
    return (f"{ratios[0]:.2f}", f"{ratios[1]:.2f}"), quantized


if __name__ == "__main__":
    main()
