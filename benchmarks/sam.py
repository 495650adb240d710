# SPDX-License-Identifier: Apache-2.0
"""What each idea of the `sam` pipelines is worth: `python -m benchmarks.sam [--quick]`.

The small promptable-segmentation model of the zoo, and the same with key biases planted on two
sides (the failure that PTQ4SAM describes; the float function is unchanged), at W8A8, W6A6, W4A4:
affine baseline, sign folding, key centring, power-of-two softmax by force and by choice, all
together. Mean IoU under box and point prompts and the error of mask logits. Each finished row is
saved; a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qgraph
from examples.zoo.sam import batches, evaluate, load_model
from qgraph.graph.trace import trace
from qgraph.passes import FoldKeySigns, SearchSoftmaxBase
from qgraph.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results" / "sam.json"
WIDTHS = (8, 6, 4)
IDEAS = ("center-keys", "fold-key-signs", "search-softmax-base")
PLANTED = 8.0  # distance of the two modes from zero, in standard deviations of the keys

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        calibration: images of the calibration split.
        samples: images of the evaluation split, per kind of prompt.
        batch: images per forward.
    """

    calibration: int = 64
    samples: int = 500
    batch: int = 25


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


@torch.no_grad()
def score(model: Callable[..., Any], settings: Settings) -> Row:
    """Mean IoU in percent under both prompts."""
    return {
        f"{prompt}_miou": 100 * evaluate(
            model, "evaluation", settings.samples, batch_size=settings.batch, prompt=prompt
        )["miou"]
        for prompt in ("box", "point")
    }  # fmt: skip


@torch.no_grad()
def mask_error(model: Callable[..., Any], reference: nn.Module, settings: Settings) -> float:
    """Signal-to-noise ratio of mask logits in dB, on images that nothing was decided on."""
    signal = noise = 0.0
    for inputs, _ in batches("evaluation", 2 * settings.batch, settings.batch):
        expected, got = reference(**inputs)[0], model(**inputs)[0]
        signal += float(expected.double().square().sum())
        noise += float((got - expected).double().square().sum())
    return 10.0 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30))))


def measure(model: GraphModule, pipeline: Pipeline, settings: Settings) -> Row:
    """Compile a traced model, decide, score."""
    loader = [inputs for inputs, _ in batches("calibration", settings.calibration, settings.batch)]
    start = time.perf_counter()
    quantized = qgraph.compile(model, loader, pipeline, progress=False)
    row: Row = {"compile_s": round(time.perf_counter() - start, 1)}
    run = quantized.lower("integer")  # the reference's codes in a quarter of its time
    row |= score(run, settings)
    row["mask_db"] = mask_error(run, model, settings)
    for name in IDEAS:
        decisions = [d for d in quantized.report.decisions if d.by == name]
        row[name] = sum(d.outcome == "applied" for d in decisions)
    return row


def key_of(model: str, width: int, variant: str, settings: Settings) -> str:
    """Where a row is kept: other settings are other rows."""
    return f"{model}/W{width}A{width}/{variant}/{settings.calibration}/{settings.samples}"


def load(path: Path) -> dict[str, Row]:
    """Rows of earlier runs."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, rows: dict[str, Row]) -> None:
    """Write all rows; a kill in the middle leaves the old file."""
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(rows, indent=1) + "\n")
    fresh.replace(path)


def line(name: str, variant: str, row: Row) -> str:
    """One line of the table."""
    applied = "/".join(str(row.get(idea, "-")) for idea in IDEAS)
    return (
        f"{name:14s} {variant:16s} box {row['box_miou']:6.2f}  point {row['point_miou']:6.2f}  "
        f"masks {row.get('mask_db', float('inf')):6.2f} dB  applied {applied}"
    )


def main() -> None:
    """Fill and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, W6A6 and W4A4 only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = Settings(calibration=25, samples=50) if args.quick else Settings()
    rows = load(args.results)
    for name, plain in models(settings):
        inputs, _ = next(iter(batches("calibration", 2, 2)))
        model = trace(plain, **inputs)
        key = key_of(name, 32, "float", settings)
        if key not in rows:
            rows[key] = score(model, settings)
            save(args.results, rows)
        print(line(name, "float", rows[key]), flush=True)
        for width in WIDTHS[1:] if args.quick else WIDTHS:
            for variant, edit in VARIANTS.items():
                key = key_of(name, width, variant, settings)
                if key not in rows:
                    pipeline = edit(qgraph.pipeline(f"sam_int{width}"))
                    rows[key] = measure(model, pipeline, settings)
                    save(args.results, rows)
                print(line(f"{name} W{width}A{width}", variant, rows[key]), flush=True)


if __name__ == "__main__":
    main()
