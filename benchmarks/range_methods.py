# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.range_methods [--pipelines int8 int6 int4]`: ways to choose ranges.

SQNR of the output over held-out batches in dB, for each way of `ChooseRanges`; ``auto`` is the
default. ``output`` judges each range by what a layer's outputs see over sampled rows, ``mse`` by a
histogram. With `--metric N`, models of the zoo are scored on N development samples instead, in
percent.
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
from benchmarks.zoo_models import METRICS
from qgraph.report.text import table

WAYS = ("minmax", "mse", "output", "auto")


Score = Callable[[Callable[..., Any]], float]


def score_of(model: str, case: Case, images: int) -> Score:
    """SQNR of the output, or the model's own metric on so many development samples."""
    if images:
        return lambda run: METRICS[model](run, "development", images)
    return lambda run: fidelity(case, lambda batch: case.output(run(**batch)))["sqnr"]


def measured(model: str, pipelines: list[str], scope: str, images: int) -> list[tuple[str, ...]]:
    """One row per pipeline; the model is traced once."""
    case = MODELS[model](8)
    score = score_of(model, case, images)
    traced = qgraph.trace(case.model, **case.calibration[0])
    found = {}
    for name, way in itertools.product(pipelines, WAYS):
        chosen = qgraph.pipeline(name, method=way, scope=scope)
        made = qgraph.compile(traced, case.calibration, chosen, verify=False, progress=False)
        found[name, way] = score(made)
    plain = f"{score(case.model):.2f}" if images else ""
    return [
        (model, name, plain, *(f"{found[name, way]:.2f}" for way in WAYS)) for name in pipelines
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[
        "minilm", "vit", "unet", "swin", "zoo-ris", "zoo-vit", "zoo-sam", "zoo-sirst",
    ])  # fmt: skip
    parser.add_argument("--pipelines", nargs="+", default=["int8", "int6", "int4"])
    parser.add_argument("--scope", choices=("full", "linear"), default="full")
    parser.add_argument("--metric", type=int, default=0, help="development samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [
            row
            for model in options.models
            for row in measured(model, options.pipelines, options.scope, options.metric)
        ]
    print(table(("model", "pipeline", "float", *WAYS), rows))


if __name__ == "__main__":
    main()
