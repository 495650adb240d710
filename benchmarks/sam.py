# SPDX-License-Identifier: Apache-2.0
"""What each idea of the `sam` pipelines is worth: `python -m benchmarks.sam [--quick]`.

The small promptable-segmentation model of the zoo, and the same with key biases planted on two
sides (the failure that PTQ4SAM describes; the float function is unchanged), at W8A8, W6A6, W4A4:
affine baseline, sign folding, key centring, power-of-two softmax by force and by choice, all
together. Mean IoU under box and point prompts, what of it is lost and what of the baseline's loss
comes back (with paired bootstrap intervals), and the error of mask logits. Baseline and pipeline
run over three calibration seeds, single ideas over one. Each finished row is saved; a killed run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qgraph
from benchmarks.sam_intervals import drop, packed, recovered
from examples.zoo.metrics import MaskScores
from examples.zoo.sam import batches, load_model
from examples.zoo.sam.data import Prompt
from examples.zoo.sam.model import best_mask
from qgraph.graph.trace import trace
from qgraph.passes import FoldKeySigns, SearchSoftmaxBase
from qgraph.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results" / "sam.json"
WIDTHS = (8, 6, 4)
IDEAS = ("center-keys", "fold-key-signs", "search-softmax-base")
PROMPTS: tuple[Prompt, ...] = ("box", "point")
MAIN = ("affine", "all")  # measured over all seeds
PLANTED = 8.0  # distance of the two modes from zero, in standard deviations of the keys

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        calibration: images of the calibration split.
        samples: images of the evaluation split, per kind of prompt.
        batch: images per forward.
        seeds: of the calibration images.
        widths: bits of weights and activations.
    """

    calibration: int = 64
    samples: int = 1000
    batch: int = 25
    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = WIDTHS


QUICK = Settings(calibration=25, samples=50, seeds=(0,), widths=WIDTHS[1:])


def without_ideas(pipeline: Pipeline, *kept: str) -> Pipeline:
    """The pipeline without the passes that the ablation is about, except for `kept`."""
    return pipeline.without(*(name for name in IDEAS if name not in kept))


VARIANTS: dict[str, Callable[[Pipeline], Pipeline]] = {
    "affine": without_ideas,
    "+ signs": lambda p: without_ideas(p, "fold-key-signs"),
    "+ signs, forced": lambda p: without_ideas(p, "fold-key-signs").replace(
        "fold-key-signs", FoldKeySigns(force_signs=True)
    ),
    "+ centring": lambda p: without_ideas(p, "center-keys"),
    "+ base, forced": lambda p: without_ideas(p, "search-softmax-base").replace(
        "search-softmax-base", SearchSoftmaxBase(formats=("power_of_two",))
    ),
    "+ base, chosen": lambda p: without_ideas(p, "search-softmax-base"),
    "all": lambda p: p,
    "all, base per head": lambda p: p.replace(
        "search-softmax-base", SearchSoftmaxBase(per_head=True)
    ),
}


@torch.no_grad()
def plant_two_modes(model: nn.Module, sample: dict[str, Tensor]) -> nn.Module:
    """Move the key biases of the decoder to both sides of zero; softmax does not see it."""
    spread: dict[nn.Linear, float] = {}
    found = [
        m
        for name, m in model.get_submodule("decoder").named_modules()
        if isinstance(m, nn.Linear) and name.endswith("key")
    ]

    def watch(module: nn.Linear, _: Any, output: Tensor) -> None:
        spread[module] = float((output - output.mean((0, 1))).std())

    hooks = [module.register_forward_hook(watch) for module in found]
    model(**sample)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    for module in found:
        sides = torch.randint(0, 2, module.bias.shape, generator=generator) * 2 - 1
        module.bias.add_(PLANTED * spread[module] * sides)
    return model


def models(settings: Settings) -> Iterator[tuple[str, nn.Module]]:
    """The zoo model, plain and with planted modes."""
    yield "zoo", load_model()
    inputs, _ = next(iter(batches("calibration", settings.batch, settings.batch)))
    yield "planted", plant_two_modes(load_model(), inputs)


@cache
def scenes(prompt: Prompt, count: int, batch: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Images of the evaluation split, made once."""
    return list(batches("evaluation", count, batch, prompt=prompt))


@torch.no_grad()
def score(model: Callable[..., Any], settings: Settings) -> Row:
    """Mean IoU in percent under both prompts, and every sample's."""
    row: Row = {}
    for prompt in PROMPTS:
        scores = MaskScores.empty()
        for inputs, masks in scenes(prompt, settings.samples, settings.batch):
            scores.add(best_mask(*model(**inputs)), masks)
        row[f"{prompt}_miou"] = 100 * scores.miou
        row[f"{prompt}_samples"] = packed(scores.per_sample)
    return row


@torch.no_grad()
def mask_error(model: Callable[..., Any], reference: nn.Module, settings: Settings) -> float:
    """Signal-to-noise ratio of mask logits in dB, on images that nothing was decided on."""
    signal = noise = 0.0
    for inputs, _ in batches("evaluation", 2 * settings.batch, settings.batch):
        expected, got = reference(**inputs)[0], model(**inputs)[0]
        signal += float(expected.double().square().sum())
        noise += float((got - expected).double().square().sum())
    return 10.0 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30))))


def measure(model: GraphModule, pipeline: Pipeline, settings: Settings, seed: int) -> Row:
    """Compile a traced model, decide, score."""
    data = batches("calibration", settings.calibration, settings.batch, seed)
    loader = [inputs for inputs, _ in data]
    start = time.process_time()
    quantized = qgraph.compile(model, loader, pipeline, progress=False, seed=seed)
    row: Row = {"compile_s": round(time.process_time() - start, 1)}
    run = quantized.lower("integer")  # the reference's codes in a quarter of its time
    row |= score(run, settings)
    row["mask_db"] = round(mask_error(run, model, settings), 2)
    for name in IDEAS:
        decisions = [d for d in quantized.report.decisions if d.by == name]
        row[name] = sum(d.outcome == "applied" for d in decisions)
    return row


def key_of(model: str, width: int, variant: str, settings: Settings, seed: int = 0) -> str:
    """Where a row is kept: other settings are other rows."""
    amount = f"{settings.calibration}/{settings.samples}"
    return f"{model}/W{width}A{width}/{variant}/{amount}/seed {seed}"


def load(path: Path) -> dict[str, Row]:
    """Rows of earlier runs."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, rows: dict[str, Row]) -> None:
    """Write all rows; a kill in the middle leaves the old file."""
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(rows, indent=1) + "\n")
    fresh.replace(path)


def line(name: str, variant: str, rows: list[Row], plain: Row, baseline: list[Row]) -> str:
    """One line of the table: means over seeds, points lost, share of the baseline's loss back."""
    count = len(rows)
    text = f"{name:14s} {variant:19s} {count} seed{'s' if count > 1 else ' '} "
    for prompt in PROMPTS:
        text += f" {prompt} {sum(r[f'{prompt}_miou'] for r in rows) / count:6.2f}"
        text += f" lost {drop(plain, rows, prompt)}"
        if rows is not baseline:
            text += f" back {recovered(plain, baseline[:count], rows, prompt)}"
    applied = "/".join(str(rows[0][idea]) for idea in IDEAS)
    return f"{text}  masks {sum(r['mask_db'] for r in rows) / count:5.1f} dB  applied {applied}"


class Table:
    """Rows of earlier runs, and those that are still to be measured."""

    def __init__(self, path: Path, settings: Settings, variants: tuple[str, ...]) -> None:
        self.path, self.settings, self.variants = path, settings, variants
        self.rows = load(path)

    def row(self, key: str, measured: Callable[[], Row]) -> Row:
        """The row of a key; measured and saved if it is new."""
        if key not in self.rows:
            self.rows[key] = measured()
            save(self.path, self.rows)
        return self.rows[key]

    def seeds(self, name: str, model: GraphModule, width: int, variant: str) -> list[Row]:
        """One row per seed."""
        pipeline = VARIANTS[variant](qgraph.pipeline(f"sam_int{width}"))
        seeds = self.settings.seeds if variant in MAIN else self.settings.seeds[:1]
        found = []
        for seed in seeds:
            key = key_of(name, width, variant, self.settings, seed)
            found.append(
                self.row(key, lambda s=seed: measure(model, pipeline, self.settings, s))  # type: ignore[misc]
            )
        return found

    def fill(self, name: str, model: GraphModule) -> None:
        """Measure and print all rows of a model."""
        key = key_of(name, 32, "float", self.settings)
        plain = self.row(key, lambda: score(model, self.settings))
        print(f"{name:14s} float  box {plain['box_miou']:.2f}  point {plain['point_miou']:.2f}")
        for width in self.settings.widths:
            baseline = self.seeds(name, model, width, "affine")
            for variant in self.variants:
                rows = baseline
                if variant != "affine":
                    rows = self.seeds(name, model, width, variant)
                print(line(f"{name} W{width}A{width}", variant, rows, plain, baseline), flush=True)


def main() -> None:
    """Fill and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, W6A6 and W4A4 only")
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, help="only these")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    if args.widths:
        settings = replace(settings, widths=tuple(args.widths))
    table = Table(args.results, settings, tuple(args.variants))
    for name, plain in models(settings):
        inputs, _ = next(iter(batches("calibration", 2, 2)))
        table.fill(name, trace(plain, **inputs))


if __name__ == "__main__":
    main()
