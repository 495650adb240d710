# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured milliseconds of whole models: `python -m benchmarks.latency`.

The latency model times about a dozen onnxruntime kernels on this machine (cached; `--refresh`
measures again) and adds up nodes. Here its sums meet the files that onnxruntime really runs: fp32
and int8 (full scope) of MiniLM, a ViT-S and a U-Net, one thread, median CPU time of one batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.fx import GraphModule

from benchmarks.onnx_models import CASES, Case
from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.latency import LatencyModel, latency_model
from qgraph.backends.onnx.session import session_options
from qgraph.compiler import compile as compile_model
from qgraph.graph.trace import trace
from qgraph.pipelines import pipeline


@dataclass(frozen=True, slots=True)
class Row:
    """One file: what was predicted for its graph, and what a run takes."""

    model: str
    file: str
    predicted_ms: float
    measured_ms: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_ms / self.measured_ms

    def __str__(self) -> str:
        return (
            f"{self.model:8s}{self.file:6s}{self.predicted_ms:10.1f}{self.measured_ms:10.1f}"
            f"{self.ratio:8.2f}"
        )


def graphs(case: Case) -> dict[str, GraphModule]:
    """The model as it is, and quantized."""
    batch = case.calibration[0]
    quantized = compile_model(case.model, case.calibration, pipeline("int8"), example_inputs=batch)
    return {"fp32": trace(case.model, **batch), "int8": quantized.graph_module}


def median_ms(path: Path, case: Case, runs: int) -> float:
    """Median CPU time of one batch of the calibration data's shape."""
    session = onnxruntime.InferenceSession(
        str(path), session_options(threads=1), providers=["CPUExecutionProvider"]
    )
    feed = {name: value.numpy() for name, value in case.calibration[0].items()}
    spent = []
    for _ in range(runs + 1):
        start = time.process_time()
        session.run(None, feed)
        spent.append(time.process_time() - start)
    return float(np.median(spent[1:]) * 1e3)


def rows(case: Case, model: LatencyModel, runs: int) -> list[Row]:
    """Both files of one model."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, module in graphs(case).items():
            path = Path(folder) / f"{name}.onnx"
            export(module, path)
            measured = median_ms(path, case, runs)
            found.append(Row(case.name, name, model.total(module), measured))
    return found


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--refresh", action="store_true", help="time the kernels again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = latency_model(refresh=options.refresh)
    if not options.json:
        print(f"{'model':8s}{'file':6s}{'predicted':>10s}{'measured':>10s}{'ratio':>8s}")
    for name in options.models:
        for row in rows(CASES[name](), model, options.runs):
            print(json.dumps(asdict(row)) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
