# SPDX-License-Identifier: Apache-2.0
"""Whole models in integers against eager float: CPU time of one batch, medians of interleaved runs.

`python -m benchmarks.integer [--models minilm vit unet zoo-ris ...] [--pipeline int8] [--compile]`

Prints one JSON line per model: milliseconds and ratios to eager float, how many codes were
compared with the reference and how many differ (0 is the contract), accumulator widths, islands.
With `--metric N`, zoo models are also scored on N development samples by every backend.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.onnx_models import Case, minilm, unet, vit
from benchmarks.zoo_models import METRICS, ZOO
from qgraph.backends import integer, parity, reference
from qgraph.backends import onnx as onnx_backend
from qgraph.compiler import compile as compile_model

CASES: dict[str, Callable[[int], Case]] = {"minilm": minilm, "vit": vit, "unet": unet, **ZOO}


def cpu_times(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median CPU milliseconds of each function, run in turns so that noise hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for call in functions.values():
        call()
    for _ in range(runs):
        for name, call in functions.items():
            start = time.process_time()
            call()
            found[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(
    name: str, pipeline: str, *, runs: int, compiled: bool, fixed: bool = False, scored: int = 0
) -> dict[str, Any]:
    """Quantize one model, check the codes, time all backends."""
    case = CASES[name](4)
    quantized = compile_model(case.model, case.calibration, pipeline, verify=False, progress=False)
    graph, batch = quantized.graph_module, case.evaluation[0]
    lowered, model = integer.lower(graph), reference.lower(graph)
    functions: dict[str, Callable[[], Any]] = {
        "float": lambda: case.model(**batch),
        "integer": lambda: lowered(**batch),
        "reference": lambda: model(**batch),
    }
    if fixed:
        pure = integer.lower(graph, mode="fixed_point")
        functions["fixed_point"] = lambda: pure(**batch)
    equal = None
    if compiled:
        fused = integer.lower(graph, compile=True)
        functions["compiled"] = lambda: fused(**batch)
        pairs = zip(tree_leaves(fused(**batch)), tree_leaves(lowered(**batch)), strict=True)
        equal = all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        times = cpu_times(functions, runs)
    report = parity.compare(graph, ((), batch))
    metrics = {}
    if scored and name in METRICS:
        runners: dict[str, Callable[..., Any]] = {
            "float": case.model, "reference": model, "integer": lowered,
            "onnx": onnx_backend.lower(graph),
        }  # fmt: skip
        metrics = {
            who: round(METRICS[name](run, "development", scored), 3) for who, run in runners.items()
        }
    rows = lowered.explain()
    return {
        "model": name, "pipeline": pipeline, "ms": {k: round(v, 2) for k, v in times.items()},
        "ratio": {k: round(v / times["float"], 3) for k, v in times.items()},
        "compiled_equals_eager": equal, "codes": report.codes, "mismatches": report.mismatches,
        "free_mismatches": sum(row.free.mismatches for row in report.rows),
        "saturated_rows": sum(row.saturated > 0 for row in report.rows), "rows": len(report.rows),
        "accumulator_bits": max(row.accumulator_bits or 0 for row in rows),
        "metric": metrics, "islands": len(rows.islands),
        "kernels": _count(row.kernel for row in rows),
    }  # fmt: skip


def _count(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pipeline", default="int8")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--fixed", action="store_true", help="also the fixed-point mode")
    parser.add_argument("--metric", type=int, default=0, help="development samples to score")
    options = parser.parse_args()
    host = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    host |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"host": host}))
    for name in options.models:
        result = measure(
            name, options.pipeline, runs=options.runs, compiled=options.compile,
            fixed=options.fixed, scored=options.metric,
        )  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
