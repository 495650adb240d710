# SPDX-License-Identifier: Apache-2.0
"""What each part of block reconstruction is worth: `python -m benchmarks.vit [--quick]`.

Round-to-nearest of the plain pipeline, the strong start points of `vit`, and from there with
equal steps: rounding learned per layer, per block (OBR), with supervision behind the float rest
of the network (EBGS), inside the block (IBLS), both (MGRQ), at W4A4 and W3A3 with three seeds.
Each finished row is saved; a killed run goes on where it stopped. Options were chosen on the
development split; the evaluation split is scored once, with `--split evaluation`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qgraph
from benchmarks import intervals
from benchmarks.intervals import Drawn, interval
from examples.zoo.splits import Split
from examples.zoo.vit import batches, evaluate, load_model
from examples.zoo.vit.model import KINDS, Kind
from qgraph.passes import ReconstructBlocks
from qgraph.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results" / "vit.json"
NAME = ReconstructBlocks.name
RESAMPLES = 1000
Row = dict[str, Any]
Options = dict[str, Any]

PLAIN = {"warm_start": False}
FAR = PLAIN | {"global_weight": 1.0}
INSIDE = PLAIN | {"local_weight": 0.25}
# Name -> (pipeline prefix, options of the reconstruction or None for round-to-nearest).
VARIANTS: dict[str, tuple[str, Options | None]] = {
    "RTN": ("", None),
    "start points": ("vit_", None),
    "warm start": ("vit_", {"steps": 0}),
    "AdaRound per layer": ("vit_", PLAIN | {"granularity": "layer"}),
    "OBR": ("vit_", PLAIN),
    "OBR or warm start": ("vit_", {"warm_start": True}),
    "OBR + EBGS": ("vit_", FAR),
    "OBR + IBLS": ("vit_", INSIDE),
    "MGRQ": ("vit_", FAR | INSIDE),
}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        calibration: images of the calibration split.
        samples: images scored.
        steps: optimiser steps per region.
        seeds: of the reconstruction.
        split: what is scored.
    """

    calibration: int = 256
    samples: int = 2000
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)
    split: Split = "development"


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    model: Kind
    bits: int
    variant: str
    seed: int

    def key(self, settings: Settings) -> str:
        """Name of the row in the results."""
        return f"{self.model}/{self.bits}/{self.variant}/{self.seed}/{settings}"


def cases(models: tuple[Kind, ...], widths: tuple[int, ...], settings: Settings) -> Iterator[Case]:
    """All rows; those without random choices once."""
    for model in models:
        for bits in widths:
            for variant, (_, options) in VARIANTS.items():
                for seed in settings.seeds if options is not None else settings.seeds[:1]:
                    yield Case(model, bits, variant, seed)


def pipeline_of(case: Case, settings: Settings) -> Pipeline:
    """The pipeline of a row."""
    prefix, options = VARIANTS[case.variant]
    built = qgraph.pipeline(f"{prefix}int{case.bits}")
    if NAME in [item.name for item in built]:
        built = built.without(NAME)
    if options is None:
        return built
    tuned = ReconstructBlocks(**{"steps": settings.steps, **options})
    return built.insert_after("insert-quantizers", tuned)


@torch.no_grad()
def output_sqnr(model: Callable[..., Tensor], reference: nn.Module, settings: Settings) -> float:
    """Signal-to-noise ratio of logits in dB on the scored split."""
    signal = noise = 0.0
    for inputs, _ in batches(settings.split, min(500, settings.samples), 50):
        expected, got = reference(**inputs), model(**inputs)
        signal += float(expected.double().square().sum())
        noise += float((got - expected).double().square().sum())
    return 10 * math.log10(signal / max(noise, 1e-300))


def measure(case: Case, settings: Settings) -> Row:
    """Compile and score one row."""
    model = load_model(case.model)
    data = [inputs for inputs, _ in batches("calibration", settings.calibration, 32)]
    start = time.process_time()
    quantized = qgraph.compile(
        model, data, pipeline_of(case, settings), seed=case.seed, progress=False, verify=False
    )
    seconds = time.process_time() - start
    runner = quantized.lower("reference")
    decisions = [d for d in quantized.report.decisions if d.by == NAME and d.numbers]
    result = evaluate(runner, settings.split, settings.samples)
    return {
        "model": case.model, "bits": case.bits, "variant": case.variant, "seed": case.seed,
        "accuracy": 100 * result["accuracy"], "hits": packed(result["per_sample"]),
        "sqnr": output_sqnr(runner, model, settings),
        "cpu_seconds": seconds,
        "regions": len(decisions),
        "accepted": sum(d.outcome == "applied" for d in decisions),
        "split": settings.split, "samples": settings.samples, "steps": settings.steps,
    }  # fmt: skip


def packed(hits: list[float]) -> str:
    """Right or wrong per image, four to a digit."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def draws(hits: str, samples: int) -> Drawn:
    """Accuracy in percent, then over `RESAMPLES` resamples of the images."""
    right = np.unpackbits(np.frombuffer(bytes.fromhex(hits), dtype=np.uint8))[:samples]
    picks = np.random.default_rng(0).integers(0, samples, size=(RESAMPLES, samples))
    return 100 * np.asarray([right.mean(), *right[picks].mean(1)])


def recovered(rows: list[Row]) -> str:
    """Points below float, and the share of round-to-nearest's drop that is recovered, per variant.

    Means over seeds; 95 % bootstrap over images, the same resamples for all.
    """
    groups: dict[tuple[str, int, str, str, int], list[Row]] = {}
    for row in rows:
        if "hits" in row:
            key = (row["model"], row["bits"], row["split"], row["variant"], row["samples"])
            groups.setdefault(key, []).append(row)
    lines = []
    for (model, bits, split, variant, samples), group in groups.items():
        base = groups.get((model, bits, split, "RTN", samples))
        if base is None:
            continue
        plain = draws(float_hits(model, split, samples), samples)
        own = np.mean([draws(row["hits"], samples) for row in group], axis=0)
        share = intervals.recovered(plain, draws(base[0]["hits"], samples), own)
        text = f"{model} W{bits}A{bits} {split} {variant:20} below float {interval(plain - own)}"
        lines.append(text + ("" if variant == "RTN" else f"  recovered {interval(share)} %"))
    return "\n".join(lines)


@functools.cache
def float_hits(model: Kind, split: Split, samples: int) -> str:
    """What the float model gets right."""
    return packed(evaluate(load_model(model), split, samples)["per_sample"])


def saved(path: Path) -> dict[str, Row]:
    """Rows measured so far."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def table(rows: list[Row]) -> str:
    """Mean and spread over seeds per model, width and variant."""
    lines = []
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["bits"], row["variant"]), []).append(row)
    for (model, bits, variant), group in groups.items():
        scores = [row["accuracy"] for row in group]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        sqnr = statistics.mean(row["sqnr"] for row in group)
        seconds = statistics.mean(row["cpu_seconds"] for row in group)
        mean = statistics.mean(scores)
        lines.append(
            f"{model:5} W{bits}A{bits} {variant:20} {mean:6.2f} +- {spread:4.2f} %"
            f"  {sqnr:6.2f} dB  {seconds:6.1f} CPU s"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, save, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer images and steps")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=["vit"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--split", choices=("development", "evaluation"), default="development")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--calibration", type=int, default=256, help="images")
    parser.add_argument("--samples", type=int, default=2000, help="images scored")
    parser.add_argument("--steps", type=int, default=400, help="per region")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = Settings(
        args.calibration, args.samples, args.steps, tuple(range(args.seeds)), args.split
    )
    if args.quick:
        settings = Settings(64, 200, 40, (0,), args.split)
    rows = saved(args.results)
    for case in cases(tuple(args.models), tuple(args.bits), settings):
        if case.variant not in args.variants:
            continue
        key = case.key(settings)
        if key not in rows:
            rows[key] = measure(case, settings)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            part = args.results.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1))
            part.replace(args.results)
            print(table([rows[key]]), flush=True)
    print(table(list(rows.values())))
    print(recovered(list(rows.values())))


if __name__ == "__main__":
    main()
