# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.steps`: CPU time of one reconstruction step against a plain one.

The plain step is what papers' code does: weights are rounded by composed, differentiable calls,
activation quantizers likewise (straight-through rounding, a scale that learns), masks come from
`torch.rand`, the pull on rounding is summed in every step. Both read the same stored inputs and
targets, so what is compared is the step alone. Times are CPU times: a busy machine matters little.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from examples.minilm import calibration_batches, load_model
from examples.zoo.vit import batches
from examples.zoo.vit import load_model as load_vit
from qgraph.calibration import reconstruction
from qgraph.calibration.loader import adapter
from qgraph.calibration.region_problem import Outcome, Problem, Tuning
from qgraph.calibration.rounding import STRETCH_HIGH, STRETCH_LOW
from qgraph.calibration.sample import small_sample
from qgraph.calibration.student import Fake, Held
from qgraph.context import Context
from qgraph.formats import AffineEncoding
from qgraph.graph.trace import trace
from qgraph.passes import ReconstructBlocks, reconstruct_blocks
from qgraph.pipeline import run_pipeline
from qgraph.pipelines import pipeline

RESULT = Path("benchmarks/results/steps.json")
LIMIT = 0.6
BLOCK = 4  # learned weights that make a region a block


def _round(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


class PlainFake(nn.Module):
    """Straight-through rounding out of single calls, half of the elements left in float."""

    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fake, self.scale = fake, nn.Parameter(fake.encoding.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        form = self.fake.encoding
        if not isinstance(form, AffineEncoding):
            made = x + (form.fake(x) - x).detach()
        else:
            codes = torch.clamp(_round(x / self.scale) + form.zero_point, form.qmin, form.qmax)
            made = (codes - form.zero_point) * self.scale
        return torch.where(torch.rand_like(x) < 0.5, x, made)


class PlainWeight(nn.Module):
    """A weight whose rounding is learned, computed anew in each call."""

    def __init__(self, rounding: Any) -> None:
        super().__init__()
        self.low, self.gap, self.scale = rounding.low, rounding.gap, rounding.scale
        self.variable = nn.Parameter(rounding.variable.detach().clone())

    def share(self) -> Tensor:
        """The rectified sigmoid."""
        wide = torch.sigmoid(self.variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
        clipped: Tensor = torch.clamp(wide, 0, 1)
        return clipped

    def forward(self) -> Tensor:
        """The weight."""
        weight: Tensor = (self.low + self.share() * self.gap) * self.scale
        return weight


def plain(problem: Problem) -> tuple[GraphModule, list[PlainWeight], list[Tensor]]:
    """The student's graph with plain quantizers."""
    graph = problem.student.graph
    names = {id(held): name for name, held in problem.student.held.items()}
    weights: list[PlainWeight] = []
    scales: list[Tensor] = []
    for path, module in list(graph.named_modules()):
        if isinstance(module, Held):
            made = PlainWeight(problem.student.roundings[names[id(module)]])
            setattr(graph, path, made)
            weights.append(made)
        elif isinstance(module, Fake):
            setattr(graph, path, fake := PlainFake(module))
            scales.append(fake.scale)
    return graph, weights, scales


def plain_seconds(problem: Problem, tuning: Tuning, picks: Tensor) -> float:
    """CPU seconds of a plain step."""
    graph, weights, scales = plain(problem)
    rough, exact = problem.streams.inputs(0, problem.ports.inputs, picks)
    targets = problem.streams.exact_rows(0, problem.ports.outputs, picks)
    groups: list[dict[str, Any]] = [
        {"params": [w.variable for w in weights], "lr": 1e-2},
        {"params": scales},
    ]
    optimizer = torch.optim.Adam(groups, lr=4e-5)

    def step() -> None:
        inputs = [
            torch.where(torch.rand_like(a) < tuning.drop, b, a) if a.is_floating_point() else a
            for a, b in zip(rough, exact, strict=True)
        ]
        made = graph(*inputs)
        loss = torch.stack(
            [(a - b).square().mean() for a, b in zip(made, targets, strict=False)]
        ).sum()
        for weight in weights:
            pull = 1 - (2 * weight.share() - 1).abs().pow(5.0)
            loss = loss + tuning.regularizer * pull.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return _seconds(step)


def own_seconds(problem: Problem, tuning: Tuning) -> float:
    """CPU seconds of a step of `tune`, from runs of two lengths, so that set-up cancels."""
    ends = []
    for steps in (5, 25):
        start = time.process_time()
        options = {name: getattr(tuning, name) for name in ("batch", "lr", "step_lr", "drop")}
        short = Tuning(steps=steps, **options)
        generator = torch.Generator().manual_seed(0)
        reconstruction._descend(problem, short, generator, tuning.batch, None)
        ends.append(time.process_time() - start)
    return (ends[1] - ends[0]) / 20


def _seconds(call: Callable[[], Any], count: int = 10) -> float:
    call()
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def figures(model: nn.Module, data: list[Any], name: str, **options: Any) -> dict[str, float]:
    """Forward, own and plain step of the first block, in milliseconds of CPU time, and ratios."""
    module = trace(model, **data[0])
    chosen = pipeline(name, **options)
    if ReconstructBlocks.name in [item.name for item in chosen]:
        chosen = chosen.without(ReconstructBlocks.name)
    item = ReconstructBlocks(granularity="block", warm_start=False)
    chosen = chosen.insert_after("insert-quantizers", item)
    context = Context(
        sample=small_sample(module, (), data[0], dynamic=True), batches=data,
        adapt=adapter(module), facts=frozenset({"traced"}), verify=False,
    )  # fmt: skip
    found: dict[str, float] = {}
    measuring = functools.partial(_measure, found)
    with mock.patch.object(reconstruct_blocks, "tune", measuring), torch.no_grad():
        run_pipeline(chosen, module, context)
    row = {f"{what}_ms": 1000 * seconds for what, seconds in found.items()}
    row["plain_forwards"] = found["plain"] / found["forward"]
    row["own_forwards"] = found["own"] / found["forward"]
    row["own_over_plain"] = found["own"] / found["plain"]
    return row


def _measure(found: dict[str, float], problem: Problem, tuning: Tuning, **_: Any) -> Outcome:
    """Stands in for `tune`: measures the first whole block and leaves every region as it is."""
    if not found and len(problem.student.roundings) >= BLOCK:
        picks = torch.tensor(problem.streams.train[0][: tuning.batch])
        inputs = problem.streams.exact_rows(0, problem.ports.inputs, picks)
        found["forward"] = _seconds(lambda: problem.teacher(*inputs))
        with torch.enable_grad():
            found["own"] = own_seconds(problem, tuning)
            found["plain"] = plain_seconds(problem, tuning, picks)
    return Outcome(False, 0.0, 0.0, 0.0, False, 0, 0, 0.0)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("minilm", "vit"), nargs="+", default=["vit", "minilm"])
    args = parser.parse_args()
    rows = {}
    if "vit" in args.only:
        images = [inputs for inputs, _ in batches("calibration", 32, 16)]
        rows["vit"] = figures(load_vit("vit"), images, "vit_int4")
    if "minilm" in args.only:
        rows["minilm"] = figures(load_model(), calibration_batches(4), "w4a8", scope="linear")
    for name, row in rows.items():
        print(name, {key: round(value, 2) for key, value in row.items()})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"limit": LIMIT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
