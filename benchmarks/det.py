# SPDX-License-Identifier: Apache-2.0
"""What each idea of the `det` pipelines is worth: `python -m benchmarks.det [--quick]`.

The zoo's RetinaNet-like detector: searched ranges, + rounding with feedback by local losses, + the
global loss, + its filter, log-affine weights, all of it; at W8A8, W4A8 and W2A4 both ends, at W4A4
the full grid, at W3A3 the steps between; and backbone and neck only. mAP@[.5:.95] in points on the
evaluation split, over three calibration seeds, with compute and storage ratios, and the share of
the searched ranges' drop that each variant recovers, with a bootstrap interval over images. The
first seed is measured in full before the others. Each finished cell is saved; a killed run goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks import intervals
from benchmarks.intervals import Drawn, interval
from examples.zoo.det.boxes import detections
from examples.zoo.det.data import CLASSES, Target, batches
from examples.zoo.det.metrics import BoxScores
from examples.zoo.det.objective import objective
from examples.zoo.det.weights import load_model
from qgraph.calibration.loader import adapter
from qgraph.calibration.sample import small_sample
from qgraph.context import Context
from qgraph.graph.build import shallow_copy
from qgraph.graph.plan import Role
from qgraph.graph.product_sizes import product_sizes
from qgraph.graph.trace import trace
from qgraph.pipeline import Fact, Pipeline, run_pipeline
from qgraph.pipelines import pipeline
from qgraph.report.accounting import Convention, OpUse, compute_ratio

RESULTS = Path(__file__).parent / "results" / "det.json"
Cell = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Which parts of the pipeline are on.

    Attributes:
        learned: rounding goes by regions. log_affine: the format may be used in the head.
        loss: options of the filtered global loss; None: local losses only.
        forced: log-affine whatever the fit says. parts: what is quantized.
    """

    learned: bool = True
    log_affine: bool = False
    loss: Mapping[str, Any] | None = None
    forced: bool = False
    parts: str = "all"


OURS: dict[str, Any] = {}  # what the zoo's objective has by itself
PAPER = {"theta_c": 2e-4, "theta_i": 0.1, "lam": 1.0, "distance": "power", "confidence": 0.0}
UNFILTERED = {"theta_c": 0.0, "theta_i": 0.0, "confidence": 0.0}
VARIANTS = {
    "searched": Variant(learned=False),
    "local": Variant(),
    "+ global": Variant(loss=UNFILTERED),
    "+ filtered": Variant(loss=OURS),
    "+ filtered, the paper's": Variant(loss=PAPER),
    "log-affine, local": Variant(log_affine=True),
    "all": Variant(loss=OURS, log_affine=True),
    "all, log-affine forced": Variant(loss=OURS, log_affine=True, forced=True),
    "all, backbone and neck": Variant(loss=OURS, log_affine=True, parts="backbone and neck"),
}
ENDS = ("searched", "all")
STEPS = ("searched", "local", "+ global", "+ filtered", "all")
# (width, variants of the first seed, variants of the others)
GRID: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("w8a8", ENDS, ENDS),
    ("w4a8", ENDS, ENDS),
    ("w4a4", tuple(VARIANTS), STEPS),
    ("w3a3", STEPS, STEPS),
    ("w2a4", ENDS, ()),
)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds: calibration seeds; images: calibration images; samples: evaluation images.
        steps: of rounding per region; range_steps: of all ranges together; batch: images per step.
        draws: resamples of the images behind intervals.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 256
    samples: int = 1000
    steps: int = 0
    range_steps: int = 150
    batch: int = 16
    draws: int = 200


QUICK = Settings(seeds=(0,), images=16, samples=48, steps=10, range_steps=6, draws=20)


def build(width: str, variant: Variant, settings: Settings) -> Pipeline:
    """The `det` pipeline with the variant's parts."""
    chosen = pipeline(f"det_{width}", parts=variant.parts)
    for name, used in (
        ("tune-ranges", variant.loss is not None and variant.learned),
        ("reconstruct-blocks", variant.learned),
        ("use-log-affine", variant.log_affine),
    ):
        if not used and name in [item.name for item in chosen]:
            chosen = chosen.without(name)
    changes: dict[str, dict[str, Any]] = {
        "tune-ranges": {"steps": settings.range_steps, "batch": settings.batch},
        "reconstruct-blocks": {"steps": settings.steps, "batch": settings.batch},
        "use-log-affine": {"min_gain_db": -np.inf if variant.forced else 0.0},
    }
    for item in list(chosen):
        if item.name in changes:
            options = {**vars(item), **changes[item.name]}
            chosen = chosen.replace(item.name, type(item)(**options))
    return chosen


class Bench:
    """The traced model and the evaluation images."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.samples: list[tuple[dict[str, Tensor], list[Target]]] = list(
            batches("evaluation", settings.samples, 32)
        )
        model = load_model("retinanet")
        self.traced = trace(model, **self.samples[0][0])

    def cells(self) -> Iterator[tuple[str, tuple[str, str, int] | None]]:
        """(key, what) of every cell; None is the float model."""
        yield "float", None
        for number, seed in enumerate(self.settings.seeds):
            for width, first, others in GRID:
                for name in others if number else first:
                    yield f"{width} | {name} | seed {seed}", (width, name, seed)

    def measure(self, width: str, name: str, seed: int) -> Cell:
        """Quantize and score."""
        variant, settings = VARIANTS[name], self.settings
        data = [i for i, _ in batches("calibration", settings.images, 32, seed=seed)]
        module = shallow_copy(self.traced)
        context = Context(
            sample=small_sample(module, (), data[0], dynamic=True), batches=data,
            adapt=adapter(module), facts=frozenset({Fact.TRACED}), seed=seed, verify=False,
        )  # fmt: skip
        if variant.loss is not None:
            context.loss = objective(**variant.loss)
        start = time.process_time()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            run_pipeline(build(width, variant, settings), module, context)
        seconds = time.process_time() - start
        return {
            **self.score(module), "cpu_seconds": round(seconds, 1), **ratios(self.traced, context),
            "log_affine": sum(s.decided_by == "use-log-affine" for s in context.plan.weights()),
        }  # fmt: skip

    @torch.no_grad()
    def score(self, module: GraphModule) -> Cell:
        """mAP in points."""
        scores = BoxScores(len(CLASSES))
        for inputs, targets in self.samples:
            for found, target in zip(detections(module(**inputs)), targets, strict=True):
                scores.add(found, target)
        return {
            "map": round(100 * scores.mean_average_precision(), 3),
            "resampled": [round(100 * x, 3) for x in resampled(scores, self.settings.draws)],
        }


def resampled(scores: BoxScores, draws: int) -> list[float]:
    """mAP of resamples of the images, the same ones for every network."""
    generator, count = np.random.default_rng(0), len(scores.images)
    return [
        scores.mean_average_precision(generator.integers(0, count, count).tolist())
        for _ in range(draws)
    ]


def ratios(traced: GraphModule, context: Context) -> Cell:
    """Compute in both conventions and storage, float over quantized.

    A weight shared over levels is stored once, as it is. The bound is what every product at the
    width of most would give.
    """
    widths: dict[str, dict[Role, int]] = {}
    names: dict[str, str] = {}
    for site in context.plan:
        widths.setdefault(site.edge.consumer.name, {})[site.role] = site.bits
    for node in traced.graph.nodes:
        if len(node.args) > 1:
            names[node.name] = str(node.args[1])
    ops = [
        OpUse(
            name=name, parameters=size.parameters, macs=size.macs,
            weight_bits=widths.get(name, {}).get(Role.WEIGHT, 32),
            activation_bits=widths.get(name, {}).get(Role.ACTIVATION, 32),
        )
        for name, size in product_sizes(traced).items()
    ]  # fmt: skip
    stored = {names.get(op.name, op.name): op for op in ops}.values()
    small = sum(op.parameters * op.weight_bits for op in stored)
    weight, activation = (min(getattr(op, f"{w}_bits") for op in ops) for w in
                          ("weight", "activation"))  # fmt: skip
    return {
        "bops_ratio": round(compute_ratio(ops, Convention.BOPS), 2),
        "words_ratio": round(compute_ratio(ops, Convention.WORDS_128), 2),
        "words_bound": round(128 / (weight * activation), 2),
        "storage_ratio": round(32 * sum(op.parameters for op in stored) / small, 2),
        "storage_bound": round(32 / weight, 2),
    }


def table(results: dict[str, Cell], value: str = "map") -> str:
    """Markdown: variants by widths, mean over seeds and half their spread."""
    widths = [width for width, _, _ in GRID]
    lines = [f"| {value} | " + " | ".join(widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for variant in VARIANTS:
        row = []
        for width in widths:
            prefix = f"{width} | {variant} | seed"
            found = [c[value] for k, c in results.items() if k.startswith(prefix)]
            spread = f" ± {(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else ""
            row.append(f"{sum(found) / len(found):.2f}{spread}" if found else "")
        if any(row):
            lines.append(f"| {variant} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def recovered(results: dict[str, Cell]) -> str:
    """Markdown: points below float, and the share of the searched ranges' drop that is recovered.

    Means over seeds; 95 % bootstrap over images, the same resamples for all networks.
    """
    lines = ["| | points below float [95 %] | share recovered [95 %] | seeds |", "|---" * 4 + "|"]
    full = _draws([results["float"]])
    for width, _, _ in GRID:
        base = [c for k, c in results.items() if k.startswith(f"{width} | searched |")]
        for variant in VARIANTS:
            own = [c for k, c in results.items() if k.startswith(f"{width} | {variant} |")]
            if not own:
                continue
            found = _draws(own)
            share = intervals.recovered(full, _draws(base[: len(own)]), found)
            beside = "" if variant == "searched" else interval(share, 0, " %")
            lines.append(
                f"| {width} {variant} | {interval(full - found)} | {beside} | {len(own)} |"
            )  # fmt: skip
    return "\n".join(lines)


def _draws(cells: list[Cell]) -> Drawn:
    """The figure first, then its resamples; means over cells."""
    rows = np.asarray([[cell["map"], *cell["resampled"]] for cell in cells], dtype=np.float64)
    return np.asarray(rows.mean(0))


def run(settings: Settings, path: Path, only: str = "*") -> dict[str, Cell]:
    """Measure what is missing in `path`, of the cells whose name matches `only`."""
    results: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    bench = Bench(settings)
    for key, what in bench.cells():
        if key in results or (what is not None and not fnmatch.fnmatchcase(key, only)):
            continue
        results[key] = bench.score(bench.traced) if what is None else bench.measure(*what)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=0))
        print(key, results[key]["map"], flush=True)
        gc.collect()
    return results


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, little data, few steps")
    parser.add_argument("--seeds", type=int, nargs="+", help="calibration seeds")
    parser.add_argument("--only", default="*", help="glob of the cells to measure")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying pytree specs
    settings = QUICK if args.quick else Settings()
    if args.seeds:
        settings = Settings(seeds=tuple(args.seeds))
    path = RESULTS.with_name("det_quick.json") if args.quick else RESULTS
    if args.fresh:
        path.unlink(missing_ok=True)
    results = run(settings, path, args.only)
    for value in ("map", "words_ratio", "bops_ratio", "storage_ratio", "cpu_seconds"):
        print(table(results, value), end="\n\n")
    print(recovered(results))


if __name__ == "__main__":
    main()
