# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.range_methods [--pipelines int8 int6 int4]`: ways to choose ranges.

SQNR of the output over held-out batches in dB, for each way of `ChooseRanges`; ``auto`` is the
default. ``output`` judges each range by what a layer's outputs see over sampled rows, ``mse`` by a
histogram.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch

import qgraph
from benchmarks.__main__ import MODELS, fidelity
from benchmarks.onnx_models import Case
from qgraph.report.text import table

WAYS = ("minmax", "mse", "output", "auto")


def sqnr(case: Case, run: Callable[..., Any]) -> float:
    """Of the output."""
    return fidelity(case, lambda batch: case.output(run(**batch)))["sqnr"]


def measured(model: str, pipelines: list[str]) -> list[tuple[str, ...]]:
    """One row per pipeline; the model is traced once."""
    case = MODELS[model](8)
    traced = qgraph.trace(case.model, **case.calibration[0])
    found = {}
    for name, way in itertools.product(pipelines, WAYS):
        chosen = qgraph.pipeline(name, method=way)
        made = qgraph.compile(traced, case.calibration, chosen, verify=False, progress=False)
        found[name, way] = sqnr(case, made.lower("reference"))
    return [(model, name, *(f"{found[name, way]:.2f}" for way in WAYS)) for name in pipelines]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[
        "minilm", "vit", "unet", "swin", "zoo-ris", "zoo-vit", "zoo-sam", "zoo-sirst",
    ])  # fmt: skip
    parser.add_argument("--pipelines", nargs="+", default=["int8", "int6", "int4"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [row for model in options.models for row in measured(model, options.pipelines)]
    print(table(("model", "pipeline", *WAYS), rows))


if __name__ == "__main__":
    main()
