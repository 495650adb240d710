# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on the zoo's small-target networks: `python -m benchmarks.sirst [--quick]`.

Per network: the float scores; the drop in IoU with one block quantized at a time, by width (the
claim of Li et al., TGRS 2024: shallow and encoder blocks suffer more); uniform widths against
`spmix` and `free` at equal size and equal bit operations; the paper's ratios; and the same after
block reconstruction. IoU with bootstrap intervals over images, paired against float. Each finished
cell is saved; a killed run goes on where it stopped. Pictures and tables come from the saved cells.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qgraph
from examples.zoo import sirst
from examples.zoo.sirst.metrics import SegmentationCounts
from qgraph.calibration.loader import adapter
from qgraph.calibration.perturb import PerturbSweep
from qgraph.calibration.unit_sweep import Probing
from qgraph.graph.bit_units import Unit, find_units
from qgraph.graph.encoder_decoder import find_structure
from qgraph.pipeline import Pipeline
from qgraph.report.heatmap import curves, heat_map
from qgraph.sensitivity import observe, ranges_of, unpinned

RESULTS = Path(__file__).parent / "results" / "sirst.json"
WIDTHS = (2, 3, 4, 8)
PAPER = {"size": 2.42 / 32, "bops": 1 / 29, "activations": 1 / 4.6}
SENSITIVE = {"weight": (2, 3, 4), "activation": (2, 3, 4)}
COSTS = "W bits | weights | activations | BOPs"
Cell = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        images: evaluation images; alone: images for one block at a time (development split).
        calibration: images. batch: images per forward.
        steps: of reconstruction per region; 0 leaves it out.
        models: which networks. tuned: those that are reconstructed as well.
    """

    images: int = 300
    alone: int = 64
    calibration: int = 64
    batch: int = 16
    steps: int = 150
    models: tuple[str, ...] = ("resunet", "nested")
    tuned: tuple[str, ...] = ("resunet",)


QUICK = Settings(images=48, alone=16, calibration=16, steps=0, models=("resunet",))


class Study:
    """All cells of one network."""

    def __init__(self, name: str, settings: Settings, results: dict[str, Cell]) -> None:
        self.name, self.settings, self.results = name, settings, results
        self.model = sirst.load_model(name)
        size = settings.batch
        self.data = [x for x, _ in sirst.batches("calibration", settings.calibration, size)]

    def cells(self) -> Iterator[tuple[str, Callable[[], Cell]]]:
        """(key, work) of every cell; equal budgets follow from the uniform cells before them."""
        yield "float", lambda: self.score(self.model)
        for bits in WIDTHS:
            yield f"uniform {bits}/{bits}", lambda b=bits: self.quantize(f"sirst_w{b}a{b}")  # type: ignore[misc]
        yield "uniform 2/8", lambda: self.quantize("sirst_w2a8")
        for mode in ("spmix", "free"):
            yield f"paper's ratios: {mode}", lambda m=mode: self.mixed(PAPER, m)  # type: ignore[misc]
        yield "one block at a time", self.alone
        for bits in WIDTHS[1:3]:  # at the cost of 2/2 only 2/2 is left
            for mode in ("spmix", "free"):
                yield f"as uniform {bits}/{bits}: {mode}", lambda b=bits, m=mode: self.like(b, m)  # type: ignore[misc]
        for mode in ("spmix_delta", "greedy"):
            yield f"paper's ratios: {mode}", lambda m=mode: self.mixed(PAPER, m)  # type: ignore[misc]
        if self.settings.steps and self.name in self.settings.tuned:
            yield from self.tuned()

    def tuned(self) -> Iterator[tuple[str, Callable[[], Cell]]]:
        """Cells with block reconstruction."""
        yield (
            "paper's ratios: spmix + reconstruction",
            lambda: self.mixed(PAPER, "spmix", is_tuned=True),
        )
        yield "uniform 2/8 + reconstruction", lambda: self.quantize("sirst_w2a8_recon")

    def quantize(self, name: str) -> Cell:
        """A uniform pipeline."""
        is_tuned = name.endswith("_recon")
        options: dict[str, object] = {"steps": self.settings.steps} if is_tuned else {}
        return self.compiled(qgraph.pipeline(name, None, **options))

    def mixed(self, budget: dict[str, float], mode: str, *, is_tuned: bool = False) -> Cell:
        """Mixed precision within a budget."""
        name = "sirst_mixed_recon" if is_tuned else "sirst_mixed"
        options: dict[str, object] = {"steps": self.settings.steps} if is_tuned else {}
        choices = (2, 3, 4, 5, 6, 8)
        chosen = qgraph.pipeline(name, budget, mode=mode, activation_choices=choices, **options)
        return self.compiled(chosen)

    def like(self, bits: int, mode: str) -> Cell:
        """Mixed precision at the size and the bit operations of a uniform width."""
        cost = self.results[f"{self.name} | uniform {bits}/{bits}"]["cost"]
        budget = {
            "size": 1 / cost["weight_ratio"] + 1e-9,
            "bops": 1 / cost["bit_operations_ratio"] + 1e-9,
        }
        return self.mixed(budget, mode)

    def compiled(self, chosen: Pipeline) -> Cell:
        """Compile and score; the integer backend equals the reference bit for bit."""
        start = time.process_time()
        cache = RESULTS.parent / f"state_{self.name}"
        quantized = qgraph.compile(self.model, self.data, chosen, verify=False, cache_dir=cache)
        seconds = time.process_time() - start
        cell = self.score(quantized)
        told = [d for d in quantized.report.decisions if d.by == "assign-bits"]
        assert quantized.report.cost is not None
        return cell | {
            "cost": quantized.report.cost.to_json(),
            "blocks": dict(sorted({d.reason.split(" (")[0]: d.site for d in told}.items())),
            "omega": next((d.numbers["omega"] for d in told if d.site == "network"), None),
            "cpu_seconds": round(seconds, 1),
        }

    def score(self, model: Callable[[Tensor], Tensor]) -> Cell:
        """Metrics on the evaluation split, and the counts of each image."""
        found = scored(model, self.settings.images, self.settings.batch)
        return found | {"iou_95": interval(found["intersection"], found["union"])}

    @torch.no_grad()
    def alone(self) -> Cell:
        """IoU with one block quantized: full ranges, weights clipped by squared error."""
        module, context = observe(self.model, self.data, bits=(8, 8))
        found = unpinned(find_units(module, context.plan, find_structure(module), (8, 8)))
        units, blocks = found.units, dict[str, list[Unit]]()
        for unit in units:
            blocks.setdefault(unit.block, []).append(unit)
        ranges = ranges_of(found, context)
        sweep = PerturbSweep(module, units, ranges, ((), ()), Probing(method="output"))
        jobs: list[tuple[str, list[Unit], dict[str, int]]] = [("float", [], {})]
        jobs += [
            (f"{block} {kind[0].upper()}{bits}", members, {kind: bits})
            for block, members in blocks.items()
            for kind, widths in SENSITIVE.items()
            for bits in widths
        ]
        counts = {name: SegmentationCounts.empty() for name, _, _ in jobs}
        adapt = adapter(module)
        for images, masks in sirst.batches("development", self.settings.alone, 16):
            env = sweep.values(images, adapt)
            truth = list(masks.squeeze(1).bool().numpy())
            for name, members, bits in jobs:
                logits = sweep.replay(env, members, **bits)
                counts[name].update(list((logits > 0).squeeze(1).numpy()), truth)
        return {
            "iou": {name: count.result()["iou"] for name, count in counts.items()},
            "levels": {unit.block: unit.level for unit in units},
        }


def scored(model: Callable[[Tensor], Tensor], images: int, batch: int, *, scenes: int = 0) -> Cell:
    """Metrics on evaluation scenes of a seed, and the counts of each image."""
    found = sirst.evaluate(model, "evaluation", images, batch, seed=scenes)
    counts = found["per_image"]
    return {
        "iou": found["iou"], "niou": found["niou"], "pd": found["pd"], "fa": found["fa"],
        "intersection": counts["intersection"].tolist(), "union": counts["union"].tolist(),
    }  # fmt: skip


def interval(both: Any, either: Any, *, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of pooled IoU over images."""
    first, second = np.asarray(both), np.asarray(either)
    picks = np.random.default_rng(0).integers(0, len(first), (draws, len(first)))
    ratios = first[picks].sum(1) / np.maximum(second[picks].sum(1), 1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def paired(cell: Cell, other: Cell, *, draws: int = 2000) -> tuple[float, float, float]:
    """Points of IoU that `cell` lies above `other`, with the interval over the same images."""
    size = len(cell["union"])
    picks = np.random.default_rng(0).integers(0, size, (draws, size))
    found = []
    for each in (cell, other):
        both, either = np.asarray(each["intersection"]), np.asarray(each["union"])
        found.append(both[picks].sum(1) / np.maximum(either[picks].sum(1), 1))
    low, high = np.quantile(found[0] - found[1], (0.025, 0.975))
    return 100 * (cell["iou"] - other["iou"]), 100 * float(low), 100 * float(high)


def tables(results: dict[str, Cell], model: str) -> str:
    """Markdown of one network's cells."""
    own = {k.split(" | ")[1]: c for k, c in results.items() if k.startswith(f"{model} | ")}
    lines = [
        f"| {model} | IoU [95 %] | against float [95 %] | nIoU | Pd | Fa 1e-6 | {COSTS} |",
        "|---" * 10 + "|",
    ]
    for name, cell in own.items():
        if "union" not in cell:
            continue
        gap = paired(cell, own["float"])
        cost = cell.get("cost")
        bought = (
            f"{cost['mean_weight_bits']:.2f} | 1/{cost['weight_ratio']:.2f} | "
            f"1/{cost['activation_ratio']:.2f} | 1/{cost['bit_operations_ratio']:.1f}"
            if cost
            else "32 | 1 | 1 | 1"
        )
        lines.append(
            f"| {name} | {100 * cell['iou']:.1f} [{100 * cell['iou_95'][0]:.1f}, "
            f"{100 * cell['iou_95'][1]:.1f}] | {gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}] | "
            f"{100 * cell['niou']:.1f} | {100 * cell['pd']:.1f} | {1e6 * cell['fa']:.0f} | "
            f"{bought} |"
        )
    return "\n".join(lines)


def heat(cell: Cell) -> dict[str, dict[str, float]]:
    """Points of IoU lost by block and width."""
    found: dict[str, dict[str, float]] = {}
    for name, value in cell["iou"].items():
        if name != "float":
            block, width = name.rsplit(" ", 1)
            found.setdefault(block, {})[width] = 100 * (cell["iou"]["float"] - value)
    return found


def pictures(results: dict[str, Cell], model: str, path: Path) -> None:
    """Write the heat map and the curve of IoU against bits."""
    alone = results.get(f"{model} | one block at a time")
    if alone is not None:
        title = f"{model}: points of IoU lost, one block quantized"
        text = heat_map(heat(alone), title=title, is_logarithmic=False)
        path.with_name(f"{path.stem}_{model}_blocks.svg").write_text(text)
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, cell in results.items():
        name = key.split(" | ")[1]
        if not key.startswith(f"{model} | ") or "cost" not in cell or "8" in name:
            continue
        kind = "uniform" if name.startswith("uniform") else name.split(": ")[1]
        point = (cell["cost"]["mean_weight_bits"], 100 * cell["iou"])
        lines.setdefault(kind, []).append(point)
    if lines:
        ordered = {kind: sorted(points) for kind, points in lines.items()}
        axes = ("weight bits, mean over parameters", "IoU, percent")
        text = curves(ordered, title=f"{model}: accuracy against size", axes=axes)
        path.with_name(f"{path.stem}_{model}_front.svg").write_text(text)


def run(settings: Settings, path: Path, *, most: int | None = None) -> dict[str, Cell]:
    """Measure what is missing in `path`, at most so many cells."""
    done = 0
    results: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for model in settings.models:
        study = Study(model, settings, results)
        for name, work in study.cells():
            key = f"{model} | {name}"
            if key in results or done == most:
                continue
            done += 1
            results[key] = work()
            path.write_text(json.dumps(results, indent=0))
            shown = results[key]["iou"] if "union" in results[key] else "done"
            print(key, shown, results[key].get("cpu_seconds", ""), flush=True)
            gc.collect()
    return results


def main() -> None:
    """Run, draw, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one network, little data")
    parser.add_argument("--models", nargs="+", choices=sorted(sirst.MODELS))
    parser.add_argument("--cells", type=int, help="stop after so many; the next run goes on")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying pytree specs
    path = RESULTS.with_name("sirst_quick.json") if args.quick else RESULTS
    if args.fresh:
        path.unlink(missing_ok=True)
    settings = QUICK if args.quick else Settings()
    if args.models:
        settings = replace(settings, models=tuple(args.models))
    results = run(settings, path, most=args.cells)
    for model in settings.models:
        pictures(results, model, path)
        print(tables(results, model), end="\n\n")


if __name__ == "__main__":
    main()
