# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.weight_clips`: what searching the clip of 8-bit weights wins.

Weights alone matter: activations have 16 bits. SQNR of the output over held-out batches in dB, with
the whole range of every channel and with a clip of least squared error.
"""

from __future__ import annotations

import argparse

import torch

import qgraph
from benchmarks.__main__ import MODELS, fidelity
from qgraph.passes import ChooseWeightScales
from qgraph.report.text import table

VARIANTS = {"whole range": 8, "searched": 9}  # a clip is searched below so many bits


def sqnr(model: str, clip_below: int) -> float:
    """One compilation."""
    case = MODELS[model](8)
    chosen = ChooseWeightScales(clip_below=clip_below)
    pipeline = qgraph.pipeline("w8a16").replace(chosen.name, chosen)
    made = qgraph.compile(case.model, case.calibration, pipeline, verify=False, progress=False)
    run = made.lower("reference")
    return fidelity(case, lambda batch: case.output(run(**batch)))["sqnr"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[
        "minilm", "vit", "unet", "zoo-ris", "zoo-vit", "zoo-sam", "zoo-sirst",
    ])  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [
            (model, *(f"{sqnr(model, below):.2f}" for below in VARIANTS.values()))
            for model in options.models
        ]
    print(table(("model", *VARIANTS), rows))


if __name__ == "__main__":
    main()
