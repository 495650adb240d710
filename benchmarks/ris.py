# SPDX-License-Identifier: Apache-2.0
"""What each idea of the `ris` pipelines is worth: `python -m benchmarks.ris [--quick]`.

Affine baseline (the same pipeline without the ideas: same ranges searched by what the outputs
see, same layers, same bits), + dual regions, + reordered channel groups, both, channels balanced
instead, and the published variants (regions added, groups of elements), at W8A8, W6A6, W4A8 and
W4A4: mean and pooled IoU of the zoo's referring segmentation with bootstrap intervals, and SQNR of
the real MiniLM's last hidden state over unmasked tokens. Baseline and pipeline run over three
calibration seeds, single ideas over one. Each finished cell is saved; a killed run goes on where it
stopped.
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

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.published_regions import SumRegions
from examples.minilm import calibration_batches, evaluation_batches
from examples.minilm import load_model as load_minilm
from examples.zoo.metrics import MaskScores, bootstrap, paired_bootstrap
from examples.zoo.ris.data import batches as scenes
from examples.zoo.ris.weights import WEIGHTS
from examples.zoo.ris.weights import load_model as load_ris
from qgraph.calibration.loader import adapter
from qgraph.calibration.sample import small_sample
from qgraph.context import Context
from qgraph.graph.build import shallow_copy
from qgraph.graph.trace import trace
from qgraph.passes import BalanceChannels, RaisePrecision, ReorderChannels, UseDualRegions
from qgraph.pipeline import Fact, Pass, Pipeline, run_pipeline
from qgraph.pipelines import pipeline
from qgraph.report.layers import sqnr

RESULTS = Path(__file__).parent / "results" / "ris.json"
WIDTHS = ("int8", "int6", "w4a8", "int4")
VARIANTS: dict[str, tuple[Pass, ...]] = {
    "affine": (),
    "+ dual regions": (UseDualRegions(),),
    "+ channel groups": (ReorderChannels(),),
    "both (ris)": (UseDualRegions(), ReorderChannels()),
    "dual regions + balance": (UseDualRegions(), BalanceChannels()),
    "published: regions added": (SumRegions(),),
    "published: element groups": (ReorderChannels(elements=True),),
}
# Scopes of MiniLM: all linears; these and the attention's products; residual adds and tables too.
SCOPES: dict[str, str | tuple[str, ...]] = {
    "linear": "linear",
    "attention": ("linear", "conv", "matmul"),
    "full": "full",
}
MAIN = ("affine", "both (ris)")
IDEAS = tuple(pass_.name for pass_ in (UseDualRegions, ReorderChannels))
# The pipeline and the baseline without the rule that the weights of convolutions keep 8 bits.
UNIFORM = " | no rule"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds: calibration seeds.
        text_batches: calibration batches of MiniLM, 8 sentences each.
        text_samples: evaluation batches of MiniLM.
        images: calibration images of the zoo model; samples: evaluation images.
        batch: images per forward.
        widths: which of WIDTHS.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    text_batches: int = 16
    text_samples: int = 8
    images: int = 64
    samples: int = 1000
    batch: int = 32
    widths: tuple[str, ...] = WIDTHS


QUICK = Settings(seeds=(0,), text_batches=4, text_samples=2, images=16, samples=64)


def chosen_pipeline(width: str, variant: str, scope: str | tuple[str, ...]) -> Pipeline:
    """The `ris` pipeline of a width with the passes of one variant in place of its own."""
    name = variant.removesuffix(UNIFORM)
    chosen = pipeline(f"ris_{width}", scope=scope).without(*IDEAS)
    if variant.endswith(UNIFORM):
        chosen = chosen.without(RaisePrecision.name)
    for item in VARIANTS[name]:
        chosen = chosen.insert_before("choose-ranges", item)
    return chosen


def single_ideas(width: str) -> tuple[str, ...]:
    """What is measured with one seed; the widths where something is lost get everything."""
    if width == "int8":
        return ()
    others = tuple(name for name in VARIANTS if name not in MAIN)
    rule = tuple(name + UNIFORM for name in MAIN)
    return (*rule, *others) if width == "int4" else (*rule, *others[:2])


def text_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Padding tokens do not count."""
    del args
    mask: Tensor = kwargs["attention_mask"]
    return mask.bool()


def quantize(
    traced: GraphModule, chosen: Pipeline, data: list[dict[str, Tensor]]
) -> tuple[GraphModule, Context, float]:
    """Compile a copy of the traced graph; returns it, the decisions and the CPU seconds taken."""
    module = shallow_copy(traced)
    context = Context(
        sample=small_sample(module, (), data[0], dynamic=True), batches=data,
        adapt=adapter(module), facts=frozenset({Fact.TRACED}), row_masks=text_mask, verify=False,
    )  # fmt: skip
    start = time.process_time()
    with torch.no_grad():
        run_pipeline(chosen, module, context)
    return module, context, time.process_time() - start


def decided_by(context: Context) -> dict[str, int]:
    """How many activation edges each pass decided."""
    counts: dict[str, int] = {}
    for site in context.plan.activations():
        counts[site.decided_by] = counts.get(site.decided_by, 0) + 1
    return counts


def weight_bits(context: Context) -> float:
    """Mean bits of a planned weight."""
    sizes = [(site.value.meta["val"].numel(), site.bits) for site in context.plan.weights()]
    return float(sum(n * bits for n, bits in sizes) / max(1, sum(n for n, _ in sizes)))


class Text:
    """SQNR of MiniLM's last hidden state over unmasked tokens."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        model = load_minilm()
        self.samples = evaluation_batches(settings.text_samples)
        self.traced = trace(model, **self.samples[0])
        with torch.no_grad():
            self.reference = [model(**batch).last_hidden_state for batch in self.samples]

    def cells(self) -> Iterator[tuple[str, Callable[[], Cell]]]:
        """(key, work) of every cell."""
        for seed in self.settings.seeds:
            for width in self.settings.widths:
                for scope in SCOPES:
                    others = tuple(VARIANTS)[2:] if seed == 0 and scope == "linear" else ()
                    for variant in dict.fromkeys((*MAIN, *others)):
                        key = f"minilm {scope} | {width} | {variant} | seed {seed}"
                        yield key, lambda a=(width, variant, scope, seed): self.measure(*a)  # type: ignore[misc]

    @torch.no_grad()
    def measure(self, width: str, variant: str, scope: str, seed: int) -> Cell:
        """Quantize and compare."""
        data = calibration_batches(self.settings.text_batches, seed=seed)
        chosen = chosen_pipeline(width, variant, SCOPES[scope])
        module, context, seconds = quantize(self.traced, chosen, data)
        kept = [batch["attention_mask"].bool() for batch in self.samples]
        outputs = [module(**batch).last_hidden_state for batch in self.samples]
        first = torch.cat([r[k] for r, k in zip(self.reference, kept, strict=True)])
        second = torch.cat([o[k] for o, k in zip(outputs, kept, strict=True)])
        return {
            "sqnr": round(sqnr(first, second), 3), "seconds": round(seconds, 1),
            "edges": decided_by(context),
        }  # fmt: skip


class Images:
    """IoU of the zoo's referring segmentation."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        model = load_ris()
        self.samples = list(scenes("evaluation", settings.samples, settings.batch))
        self.traced = trace(model, **self.samples[0][0])

    def cells(self) -> Iterator[tuple[str, Callable[[], Cell]]]:
        """(key, work) of every cell."""
        yield "ris | float", lambda: self.score(self.traced)
        wanted = [
            (s, w, v) for s in self.settings.seeds for w in self.settings.widths for v in MAIN
        ]
        wanted += [(0, w, v) for w in self.settings.widths[::-1] for v in single_ideas(w)]
        for seed, width, variant in wanted:
            key = f"ris | {width} | {variant} | seed {seed}"
            yield key, lambda a=(width, variant, seed): self.measure(*a)  # type: ignore[misc]

    def measure(self, width: str, variant: str, seed: int) -> Cell:
        """Quantize and score."""
        count, batch = self.settings.images, self.settings.batch
        data = [inputs for inputs, _ in scenes("calibration", count, batch, seed=seed)]
        chosen = chosen_pipeline(width, variant, "full")
        module, context, seconds = quantize(self.traced, chosen, data)
        return self.score(module) | {
            "seconds": round(seconds, 1), "edges": decided_by(context),
            "weight_bits": round(weight_bits(context), 3),
        }  # fmt: skip

    @torch.no_grad()
    def score(self, module: GraphModule) -> Cell:
        """Mean and pooled IoU in percent, and every sample's."""
        scores = MaskScores.empty()
        for inputs, masks in self.samples:
            scores.add(module(**inputs) > 0, masks)
        interval = bootstrap(scores.per_sample)
        return {
            "miou": round(100 * scores.miou, 3), "oiou": round(100 * scores.oiou, 3),
            "miou_95": [round(100 * interval.low, 2), round(100 * interval.high, 2)],
            "per_sample": [round(value, 4) for value in scores.per_sample],
        }  # fmt: skip


def drops(results: dict[str, Cell]) -> None:
    """Add each cell's paired drop in mean IoU from float, with its bootstrap interval."""
    reference = results.get("ris | float")
    if reference is None:
        return
    for key, cell in results.items():
        if key.startswith("ris | ") and "drop" not in cell and cell is not reference:
            found = paired_bootstrap(reference["per_sample"], cell["per_sample"])
            cell["drop"] = round(100 * found.mean, 3)
            cell["drop_95"] = [round(100 * found.low, 2), round(100 * found.high, 2)]
            cell["oiou_drop"] = round(reference["oiou"] - cell["oiou"], 3)


def table(results: dict[str, Cell], start: str, value: str) -> str:
    """Markdown: variants by widths, each the mean over seeds of `value`."""
    lines = [f"| {start}: {value} | " + " | ".join(WIDTHS) + " |", "|---" * 5 + "|"]
    for variant in (*VARIANTS, *(name + UNIFORM for name in MAIN)):
        row = []
        for width in WIDTHS:
            prefix = f"{start} | {width} | {variant} | seed"
            found = [c[value] for k, c in results.items() if k.startswith(prefix) and value in c]
            spread = f" ± {(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else ""
            row.append(f"{sum(found) / len(found):.2f}{spread}" if found else "")
        if any(row):
            lines.append(f"| {variant.replace(' | ', ', ')} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def mean_drops(results: dict[str, Cell]) -> str:
    """Markdown: drops averaged over seeds, sample by sample, with their bootstrap intervals."""
    reference = results.get("ris | float", {}).get("per_sample")
    lines = ["| mean drop in mIoU, points | " + " | ".join(WIDTHS) + " |", "|---" * 5 + "|"]
    for variant in MAIN:
        row = []
        for width in WIDTHS:
            prefix = f"ris | {width} | {variant} | seed"
            found = [c["per_sample"] for k, c in results.items() if k.startswith(prefix)]
            if not found or reference is None:
                row.append("")
                continue
            middle = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
            drop = paired_bootstrap(reference, middle)
            row.append(f"{100 * drop.mean:.2f} ({100 * drop.low:.2f} to {100 * drop.high:.2f})")
        lines.append(f"| {variant} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def run(settings: Settings, path: Path, parts: tuple[str, ...]) -> dict[str, Cell]:
    """Measure what is missing in `path`."""
    results: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        if part == "ris" and not WEIGHTS.exists():
            print(f"ris: skipped, {WEIGHTS} does not exist; train it with examples.zoo.ris.train")
            continue
        bench = Text(settings) if part == "minilm" else Images(settings)
        for key, work in bench.cells():
            if key in results:
                continue
            cell = work()
            results[key] = cell
            drops(results)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=0))
            shown = {k: v for k, v in cell.items() if k != "per_sample"}
            print(key, shown, flush=True)
            gc.collect()
    return results


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, little data")
    parser.add_argument("--only", choices=("minilm", "ris"), help="one of the two models")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying pytree specs
    path = RESULTS.with_name("ris_quick.json") if args.quick else RESULTS
    if args.fresh:
        path.unlink(missing_ok=True)
    parts = (args.only,) if args.only else ("ris", "minilm")
    settings = replace(QUICK if args.quick else Settings(), widths=tuple(args.widths))
    results = run(settings, path, parts)
    for start in (f"minilm {scope}" for scope in SCOPES):
        print(table(results, start, "sqnr"), end="\n\n")
    print(mean_drops(results), end="\n\n")
    for value in ("drop", "oiou_drop", "miou"):
        print(table(results, "ris", value), end="\n\n")


if __name__ == "__main__":
    main()
