# SPDX-License-Identifier: Apache-2.0
"""Tune rounding and activation steps region by region against the float network."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.atomic import write_file
from qgraph.calibration.filtered_loss import objective_of
from qgraph.calibration.importances import importances
from qgraph.calibration.learnable import groups, observed_ports, owners, write
from qgraph.calibration.loader import adapter
from qgraph.calibration.out_of_memory import with_smaller_batches
from qgraph.calibration.reconstruction import tune
from qgraph.calibration.region_problem import Outcome, Problem, Streams, Suffix, Tuning
from qgraph.calibration.rounding import Method
from qgraph.calibration.streams import (
    ROW_MASK,
    Batching,
    Bucket,
    Shelf,
    Stream,
    begin,
    last_readers,
    split,
)
from qgraph.calibration.student import (
    Trainable,
    build_student,
    quantized_readers,
    without_quantizers,
)
from qgraph.calibration.warm_start import Warm, warm_start
from qgraph.context import Context
from qgraph.errors import ConfigError, unknown_name
from qgraph.graph.build import shallow_copy
from qgraph.graph.extract import by_name, extract, output_names, slice_between, structured
from qgraph.graph.ops import product
from qgraph.graph.regions import GRANULARITIES, Region, find_regions
from qgraph.graph.verify import checksum, structure, tensors
from qgraph.pipeline import Fact, Pass, Promise

LOGGER = logging.getLogger("qgraph")
LEARNING_RATES: dict[Method, float] = {"adaround": 0.1, "ste": 0.01}
TARGETS = ("features", "logits")


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Learn which way each weight rounds, and how wide activation steps are.

    Regions (see `qgraph.graph.regions`) are tuned in turn: the target is the float network's
    output, the input what the quantized network before gives, elements mixed (QDrop, arXiv
    2203.05740); rounding is AdaRound's (arXiv 2004.10568) over whole blocks (BRECQ, arXiv
    2102.05426). A region is changed only if the loss after hardening fell on samples held out.
    With ``context.cache_dir`` a killed run goes on behind its last finished region.

    Attributes:
        granularity: ``layer``, ``subblock``, ``block``, ``stage`` or ``auto``.
        steps, batch, step_lr, drop, regularizer: see `Tuning`.
        lr: Adam's for rounding; None: 0.1 for ``adaround``, 0.01 for ``ste``, the best of those
            tried at 200 steps.
        rounding: ``adaround`` (rectified sigmoid, annealed) or ``ste`` (straight through).
        global_weight, global_every, global_target: supervision behind the float rest of the
            network, of its ``features`` (input of the last product) or ``logits``.
        objective_weight, objective_every: of a teacher-student ``loss=`` given to compile, behind
            the float rest of the network; it then takes the place of `global_target`.
        importance: whether output errors are weighed by the objective's squared gradients.
        local_weight: supervision of values inside the region.
        learn_steps: whether activation steps are learned.
        max_samples: calibration samples used.
        warm_start, damping: whether weights are first rounded with feedback (`round_compensated`),
            with how much damping.

    Raises:
        ConfigError: an unknown granularity, method or target; negative steps.
        CalibrationError: the loader is unusable. PassError: weights are codes already.
    """

    name: ClassVar[str] = "reconstruct-blocks"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})

    granularity: str = "auto"
    steps: int = 400
    batch: int = 16
    lr: float | None = None
    step_lr: float = 2e-3
    drop: float = 0.5
    regularizer: float = 0.01
    rounding: str = "adaround"
    learn_steps: bool = True
    global_weight: float = 0.0
    global_every: int = 4
    global_target: str = "features"
    objective_weight: float = 1.0
    objective_every: int = 2
    importance: bool = True
    local_weight: float = 0.0
    max_samples: int | None = 1024
    warm_start: bool = True
    damping: float = 0.3

    def __post_init__(self) -> None:
        for what, got, allowed in (
            ("granularity", self.granularity, GRANULARITIES),
            ("rounding method", self.rounding, ("adaround", "ste")),
            ("global target", self.global_target, TARGETS),
        ):
            if got not in allowed:
                raise unknown_name(what, got, allowed)
        if self.steps < 0 or self.batch < 1:
            msg = f"steps is {self.steps}, batch {self.batch}; allowed: steps >= 0, batch >= 1"
            raise ConfigError(msg)

    def tuning(self, *, judged: bool = False) -> Tuning:
        """The options as the optimiser takes them; `judged`: by an objective."""
        method: Method = "ste" if self.rounding == "ste" else "adaround"
        rate = LEARNING_RATES[method] if self.lr is None else self.lr
        return Tuning(
            steps=self.steps, batch=self.batch, lr=rate, step_lr=self.step_lr, drop=self.drop,
            regularizer=self.regularizer, method=method, local_weight=self.local_weight,
            global_weight=self.objective_weight if judged else self.global_weight,
            global_every=self.objective_every if judged else self.global_every,
        )  # fmt: skip

    def start(self) -> Callable[[Problem], int]:
        """The warm start as `tune` takes it."""
        return functools.partial(warm_start, how=Warm(damping=self.damping))

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        work = _Work.of(self, module, context)
        changed = False
        for number in range(len(work.regions)):
            try:
                changed |= work.region(number)
            except KeyboardInterrupt:
                LOGGER.warning("interrupted: regions from %d on stay as they are", number + 1)
                context.record(self.name, work.regions[number].name, "kept", "interrupted")
                break
        return changed


class _Work:
    """One run of the pass: the float twin, the regions, the streams, the state directory."""

    def __init__(
        self, item: ReconstructBlocks, module: GraphModule, context: Context, folder: Path | None
    ) -> None:
        self.item, self.module, self.context, self.folder = item, module, context, folder
        self.exact = shallow_copy(module)
        without_quantizers(self.exact, by=item.name)
        self.regions = find_regions(self.exact, item.granularity, starts=quantized_readers(module))
        self.owners = owners(module, self.regions)
        self.groups = groups(module, self.owners)
        self.readers = last_readers([region.inputs for region in self.regions])
        self.seconds = 0.0
        self.objective = objective_of(context.loss) if item.objective_weight > 0 else None
        self.tuning = item.tuning(judged=self.objective is not None)
        self.targets = self._targets()
        self.streams: Streams

    @classmethod
    def of(cls, item: ReconstructBlocks, module: GraphModule, context: Context) -> _Work:
        """Collect or restore the streams."""
        folder = None
        if context.cache_dir is not None:
            folder = context.cache_dir / f"reconstruct-{_signature(item, module, context)[:16]}"
        work = cls(item, module, context, folder)
        shelf = Shelf(folder, max_memory=context.max_memory, persistent=folder is not None)
        adapt = context.adapt or adapter(module)
        saved = _load(folder, 0)
        if saved is None:
            exact = begin(
                work.exact, context.batches, adapt, shelf, max_samples=item.max_samples,
                row_masks=context.row_masks,
            )  # fmt: skip
        else:
            exact = Stream("float", shelf, Batching(work.exact), [])
            exact.restore(saved["exact"])
        quantized = Stream(
            "quantized", shelf, exact.batching, [Bucket(list(b.samples)) for b in exact.buckets]
        )
        train, guard = split(exact, context.seed)
        work.streams = Streams(exact, quantized, train, guard)
        if work.targets and saved is None:
            work.final_targets()
        if saved is None:
            work.save(0, {})
        return work

    def final_targets(self) -> None:
        """Run the float network once for the values that global supervision compares with."""
        targets = list(self.targets)
        inputs = [n.name for n in self.exact.graph.nodes if n.op == "placeholder"]
        held = [n for n in inputs if n in self.streams.exact.buckets[0].values]
        self.streams.exact.advance(extract(self.exact, held, targets), held, targets)

    def _targets(self) -> tuple[str, ...]:
        """The values that global supervision looks at; none if there is nothing to supervise."""
        if self.objective is not None:
            return output_names(self.exact)
        supervised = self.item.global_weight > 0
        weights = [w for region in self.regions for w in region.weights if supervised]
        last = by_name(self.exact)[weights[-1]] if weights else None
        what = None if last is None else product(last)
        if last is None or what is None:
            return ()
        value = last if self.item.global_target == "logits" else last.args[what.data]
        return (value.name,) if isinstance(value, Node) else ()

    def region(self, number: int) -> bool:
        """Tune a region, or take it over from the state directory; move both streams on."""
        region = self.regions[number]
        saved = _load(self.folder, number + 1)
        if saved is not None:
            changed = write(self.module, saved["decisions"])
            self.note(region, Outcome(**saved["outcome"]) if saved["outcome"] else None)
            if _load(self.folder, number + 2) is None:
                self.streams.exact.restore(saved["exact"])
                self.streams.quantized.restore(saved["quantized"])
            return changed
        start = time.perf_counter()
        exact = extract(self.exact, region.inputs, region.outputs)
        self.streams.exact.advance(exact, region.inputs, region.outputs)
        outcome, decisions = with_smaller_batches(
            lambda batch: self.tune(number, replace(self.tuning, batch=batch)), self.tuning.batch,
            what=region.name,
            tell=lambda text: self.context.record(self.item.name, region.name, "kept", text),
        )  # fmt: skip
        changed = write(self.module, decisions)
        moving = [name for name in region.outputs if name in region.moving]
        if moving:
            quantized = extract(self.module, region.inputs, moving)
            self.streams.quantized.advance(
                quantized, region.inputs, moving, side=self.streams.exact
            )
        self.note(region, outcome)
        self.save(number + 1, decisions, outcome)
        self.forget(number)
        self.seconds += time.perf_counter() - start
        left = self.seconds / (number + 1) * (len(self.regions) - number - 1)
        LOGGER.info("%s: %s, about %.0f s left", region.name, outcome, left)
        return changed

    def tune(self, number: int, tuning: Tuning) -> tuple[Outcome | None, dict[str, Any]]:
        """Optimise one region; return its outcome and the decisions to write."""
        region, item = self.regions[number], self.item
        weights = {q: key for q, key in self.groups.items() if self.owners[q] == [number]}
        activations = frozenset(
            q for q, where in self.owners.items() if where[0] == number and q not in self.groups
        )
        judged = tuple(name for name in region.outputs if name in region.moving)
        if not weights or not judged:
            return None, {}
        ports = observed_ports(self.exact, region, inside=item.local_weight > 0)
        method: Method = "ste" if item.rounding == "ste" else "adaround"
        what = Trainable(weights, activations, method, item.learn_steps)
        student = build_student(self.module, ports.inputs, ports.observed, what)
        teacher = extract(self.exact, ports.inputs, ports.observed)
        problem = Problem(
            student, self.exact, teacher, ports, self.streams, self.suffix(number, judged)
        )
        if problem.is_judged and item.importance:
            problem.importance = importances(problem, batch=tuning.batch)
        seed = int.from_bytes(
            hashlib.sha256(f"{self.context.seed}/{region.name}/{number}".encode()).digest()[:7],
            "big",
        )
        total = len(self.regions) * max(1, item.steps)

        def tick(step: int) -> None:
            if step % 20 == 0:
                label = f"{item.name} {number + 1}/{len(self.regions)}"
                self.context.progress_step(label, number * item.steps + step, total)

        start = item.start() if item.warm_start else None
        outcome = tune(problem, tuning, seed=seed, start=start, tick=tick)
        if not outcome.accepted:
            return outcome, {}
        decisions: dict[str, Any] = {q: r.codes() for q, r in student.roundings.items()}
        for q, fake in student.fakes.items():
            scale = fake.learned()
            if scale is not None and not torch.equal(scale, fake.encoding.scale):
                decisions[q] = scale
        return outcome, decisions

    def suffix(self, number: int, judged: tuple[str, ...]) -> Suffix | None:
        """The float network behind a region, up to the supervised values."""
        nodes, targets = by_name(self.exact), list(self.targets)
        later = {n for region in self.regions[number + 1 :] for n in region.nodes}
        if not targets or not (self.objective is not None or targets[0] in later):
            return None
        wanted = {name for region in self.regions[number + 1 :] for name in region.inputs}
        wanted |= set(targets)
        passing = [n for n in wanted if n not in later and n not in judged]
        order = {name: i for i, name in enumerate(nodes)}
        passing.sort(key=lambda n: order[n])
        made = tuple(n for n in judged if n in wanted)
        inside, _ = slice_between(self.exact, [*made, *passing], targets)
        read = {i.name for n in inside for i in n.all_input_nodes} | set(targets)
        needed = tuple(n for n in passing if n in read)
        run = extract(self.exact, [*made, *needed], targets)
        if (judge := self.objective) is not None:
            pack = functools.partial(structured, self.exact)  # the model's own output structure
            return Suffix(
                run, made, needed, self.targets, objective=lambda a, b: judge(pack(a), pack(b))
            )
        return Suffix(run, made, needed, self.targets, self.item.global_target == "logits")

    def note(self, region: Region, outcome: Outcome | None) -> None:
        """Put the region into the report."""
        if outcome is None:
            if region.weights:
                self.context.record(self.item.name, region.name, "kept", "nothing to learn")
            return
        numbers = {
            "before": outcome.before, "warm": outcome.warm, "after": outcome.after,
            "learned": float(outcome.learned), "flips": float(outcome.flips),
            "weights": float(outcome.weights), "undecided": outcome.undecided,
        }  # fmt: skip
        reason = f"held-out loss after hardening {'fell' if outcome.accepted else 'did not fall'}"
        result: Literal["applied", "refused"] = "applied" if outcome.accepted else "refused"
        self.context.record(self.item.name, region.name, result, reason, **numbers)

    def forget(self, number: int) -> None:
        """Drop ports that no later region reads."""
        self.streams.exact.drop(self._stale(self.streams.exact, number))
        self.streams.quantized.drop(self._stale(self.streams.quantized, number))

    def _stale(self, stream: Stream, number: int) -> list[str]:
        names = {name for bucket in stream.buckets for name in bucket.values}
        return [
            n
            for n in names
            if self.readers.get(n, -1) <= number and n not in {*self.targets, ROW_MASK}
        ]

    def save(self, number: int, decisions: dict[str, Any], outcome: Outcome | None = None) -> None:
        """Commit the state behind `number` regions, atomically."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "decisions": decisions,
            "outcome": None if outcome is None else asdict(outcome),
            "exact": self.streams.exact.manifest(),
            "quantized": self.streams.quantized.manifest(),
        }  # fmt: skip
        content = io.BytesIO()
        torch.save(state, content)
        write_file(_state_path(self.folder, number), [content.getbuffer()])


def _state_path(folder: Path, number: int) -> Path:
    return folder / f"region_{number:04d}.pt"


def _load(folder: Path | None, number: int) -> dict[str, Any] | None:
    if folder is None or not _state_path(folder, number).exists():
        return None
    state: dict[str, Any] = torch.load(_state_path(folder, number), weights_only=True)
    return state


def _signature(item: ReconstructBlocks, module: GraphModule, context: Context) -> str:
    """Hash of graph, tensors, options, seed and calibration data: what a saved state belongs to."""
    parts = (
        str(item), context.seed, structure(module), re.sub(r" at 0x\w+", "", repr(context.loss)),
        sorted((name, str(checksum(t))) for name, t in tensors(module).items()),
        list(_data(module, context)),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _data(module: GraphModule, context: Context) -> Iterator[str]:
    """A checksum of every tensor that the loader gives, and of its mask of rows."""
    adapt = context.adapt or adapter(module)
    for batch in context.batches:
        args, kwargs = adapt(batch)
        mask = None if context.row_masks is None else context.row_masks(args, kwargs)
        for leaf in (*args, *kwargs.values(), mask):
            if isinstance(leaf, Tensor):
                raw = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                digest = hashlib.sha256(raw.tobytes()).hexdigest()
                yield f"{list(leaf.shape)} {leaf.dtype} {digest}"
