# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.search_effort`: what finer searches at 8 bits would win.

SQNR of the output over held-out batches in dB. Weights: the whole range of every channel against a
clip of least squared error, activations at 16 bits. Ranges of activations: the brief search against
the thorough one, weights at 16 bits.
"""

from __future__ import annotations

import argparse

import torch

import qgraph
from benchmarks.__main__ import MODELS, fidelity
from qgraph.passes import ChooseRanges, ChooseWeightScales
from qgraph.pipeline import Pass
from qgraph.report.text import table

NEVER = 17  # more bits than any format has here
VARIANTS: dict[str, tuple[str, Pass]] = {
    "w8a16, whole range": ("w8a16", ChooseWeightScales()),
    "searched": ("w8a16", ChooseWeightScales(clip_below=NEVER)),
    "w16a8, brief": ("w16a8", ChooseRanges()),
    "thorough": ("w16a8", ChooseRanges(brief_from=NEVER)),
}


def sqnr(model: str, name: str, chosen: Pass) -> float:
    """One compilation."""
    case = MODELS[model](8)
    pipeline = qgraph.pipeline(name).replace(chosen.name, chosen)
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
            (model, *(f"{sqnr(model, *variant):.2f}" for variant in VARIANTS.values()))
            for model in options.models
        ]
    print(table(("model", *VARIANTS), rows))


if __name__ == "__main__":
    main()
