# SPDX-License-Identifier: Apache-2.0
"""Tune one region: learned rounding and activation steps against the float outputs.

The loss has up to three terms, each divided by its value at round-to-nearest: the region's
outputs (block), what the float rest of the network makes of them (global), and values inside the
region (local). What counts in the end is the loss after hardening on held-out samples: unless it
fell, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qgraph.calibration.region_losses import (
    FLOOR,
    counted,
    inside_loss,
    output_loss,
)
from qgraph.calibration.region_problem import Outcome, Problem, Tuning
from qgraph.calibration.rounding import coins, select
from qgraph.calibration.student import Student


class _Terms:
    """Evaluates the loss of a mini-batch, term by term."""

    def __init__(self, problem: Problem, tuning: Tuning) -> None:
        self.problem, self.tuning = problem, tuning
        self.norms: dict[str, float] = {}

    def measure(
        self, bucket: int, picks: Tensor, *, mixed: bool, far: bool, coin: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms of some samples; `mixed` inputs are partly float, `far` adds the suffix."""
        problem, tuning = self.problem, self.tuning
        ports, streams = problem.ports, problem.streams
        rough, exact = streams.inputs(bucket, ports.inputs, picks)
        inputs = (
            [_mix(a, b, tuning.drop, coin) for a, b in zip(rough, exact, strict=True)]
            if mixed
            else rough
        )
        made = list(problem.student.graph(*inputs))
        count = len(ports.outputs)
        wanted = streams.exact_rows(bucket, ports.outputs, picks)
        mask = streams.mask(bucket, picks)
        weights = problem.weights(bucket, picks)
        terms = {"block": output_loss(made[:count], wanted, mask, weights)}
        if tuning.local_weight and len(made) > count:
            with torch.no_grad():
                inner = list(problem.teacher(*exact))[count:]
            terms["local"] = inside_loss(ports, made[count:], inner)
        if far and problem.suffix is not None:
            terms["global"] = problem.far(made, bucket, picks, tuning.temperature)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum, each term by its value at round-to-nearest."""
        weights = {
            "block": 1.0,
            "local": self.tuning.local_weight,
            "global": self.tuning.global_weight,
        }
        parts = [
            weights[name] * term / max(self.norms.get(name, 1.0), FLOOR)
            for name, term in terms.items()
        ]
        return torch.stack(parts).sum()


def _mix(rough: Tensor, exact: Tensor, drop: float, coin: torch.Generator) -> Tensor:
    """Elements of the quantized stream, a share of them replaced by float ones."""
    if drop <= 0 or rough is exact or not rough.is_floating_point():
        return rough
    return select(coins(rough.shape, coin, drop), exact, rough)


@torch.no_grad()
def hard_loss(problem: Problem, picks: list[list[int]], *, batch: int) -> tuple[float, float]:
    """Losses with hard rounding on the quantized stream, over some samples.

    Returns that of the outputs, and the objective's (0 without one).
    """
    problem.student.eval()
    problem.student.set_weights()
    error: dict[str, float] = {}
    energy: dict[str, float] = {}
    judged, count = 0.0, 0
    for bucket, members in enumerate(picks):
        for start in range(0, len(members), batch):
            part = torch.tensor(members[start : start + batch])
            inputs, _ = problem.streams.inputs(bucket, problem.ports.inputs, part)
            made = list(problem.student.graph(*inputs))
            mask = problem.streams.mask(bucket, part)
            wanted = problem.streams.exact_rows(bucket, problem.ports.outputs, part)
            weights = problem.weights(bucket, part) or [torch.ones(())] * len(wanted)
            for name, a, b, w in zip(problem.ports.outputs, made, wanted, weights, strict=False):
                gap, size = counted((a - b) * w.sqrt(), mask), counted(b * w.sqrt(), mask)
                error[name] = error.get(name, 0.0) + float(gap.double().square().sum())
                energy[name] = energy.get(name, 0.0) + float(size.double().square().sum())
            if problem.is_judged:
                judged += float(problem.far(made, bucket, part, 1.0)) * len(part)
                count += len(part)
    shares = [error[name] / max(energy[name], FLOOR) for name in error]
    block = sum(shares) / len(shares) if shares else 0.0
    return block, judged / max(1, count)


def verdict(now: tuple[float, float], nearest: tuple[float, float], weight: float) -> float:
    """One number of both losses, in units of the block loss at round-to-nearest."""
    if nearest[1] <= 0:
        return now[0]
    return now[0] + weight * max(nearest[0], FLOOR) * now[1] / nearest[1]


def tune(
    problem: Problem, tuning: Tuning, *, seed: int,
    start: Callable[[Problem], int] | None = None, tick: Callable[[int], None] | None = None,
) -> Outcome:  # fmt: skip
    """Optimise a region; on return the student is hard and holds the best of what was tried.

    Round-to-nearest, the warm start, and what was learned from round-to-nearest are compared by
    the held-out loss. Learning from the warm start was tried: on the zoo's ViT (W3A3, 80 steps)
    it ended at 13.5 to 14.0 dB, learning from round-to-nearest at 14.5.

    Args:
        problem: the region; its student is changed.
        tuning: see `Tuning`.
        seed: of the mini-batches and masks of this region.
        start: rounds the weights before learning, returns how many.
        tick: called with the number of each finished step.
    """
    student, streams = problem.student, problem.streams
    batch = tuning.batch if streams.exact.batching.dynamic else 1
    guard = streams.guard if any(streams.guard) else streams.train

    def losses() -> tuple[float, float]:
        return hard_loss(problem, guard, batch=4 * batch if batch > 1 else 1)

    nearest, first = student.snapshot(), losses()

    def loss() -> float:
        return verdict(losses(), first, tuning.global_weight)

    before = verdict(first, first, tuning.global_weight)
    best, least, warm = nearest, before, before
    if start is not None and start(problem):
        warm = loss()
        if math.isfinite(warm) and warm < before:
            best, least = student.snapshot(), warm
        student.restore(nearest)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        history = _descend(problem, tuning, generator, batch, tick)
    for rounding in student.unique():
        rounding.freeze(1.0)
    after = loss()
    learned = tuning.steps > 0 and math.isfinite(after)
    learned = learned and after <= least * (1 + tuning.tolerance)
    if not learned:
        student.restore(best)
        after = least
    accepted = learned or best is not nearest
    pairs = zip(nearest.codes, student.snapshot().codes, strict=True)
    flips = sum(int((a != b).sum()) for a, b in pairs)
    weights = sum(r.low.numel() for r in student.unique())
    undecided = history[-1][2] if history else 0.0
    return Outcome(accepted, before, warm, after, learned, flips, weights, undecided, history)


def _descend(
    problem: Problem, tuning: Tuning, generator: torch.Generator, batch: int,
    tick: Callable[[int], None] | None,
) -> list[tuple[int, float, float]]:  # fmt: skip
    student = problem.student
    groups = [{"params": student.variables(), "lr": tuning.lr}]
    if student.steps():
        groups.append({"params": student.steps(), "lr": tuning.step_lr})
    groups = [g for g in groups if g["params"]]
    if not groups or tuning.steps == 0:
        return []
    optimizer = torch.optim.Adam(groups, fused=True)
    learned = [*student.variables(), *student.steps()]
    terms = _Terms(problem, tuning)
    draw = _Drawer(problem.streams.train, batch, generator)
    terms.norms = _norms(terms, student, *draw(), generator)
    student.train(drop=tuning.drop, generator=generator)
    history = []
    for step in range(tuning.steps):
        for group in optimizer.param_groups:
            if group["params"] and group["params"][0].ndim == 0:
                group["lr"] = tuning.step_lr * 0.5 * (1 + math.cos(math.pi * step / tuning.steps))
        pulls = student.soften_weights(_beta(tuning, step))
        far = tuning.global_weight > 0 and step % tuning.global_every == 0
        parts = terms.measure(*draw(), mixed=True, far=far, coin=generator)
        loss = terms.total(parts)
        if pulls:
            loss = loss + tuning.regularizer * torch.stack(pulls).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=learned)
        optimizer.step()
        if tuning.method == "ste":
            for rounding in student.unique():
                rounding.variable.data.clamp_(-0.5, 1.5)
        if step % max(1, tuning.steps // 10) == 0 and step <= _first_hard(tuning):
            history.append((step, float(parts["block"].detach()), _open_share(student)))
        _harden(student, tuning, step)
        if tick is not None:
            tick(step + 1)
    return history


def _open_share(student: Student) -> float:
    """Share of weights whose choice is not made yet."""
    count = sum(r.low.numel() for r in student.unique())
    return sum(r.undecided() * r.low.numel() for r in student.unique()) / max(1, count)


def _first_hard(tuning: Tuning) -> int:
    """The step at which choices start to become final."""
    return round(tuning.steps * (1 - tuning.harden))


def _norms(
    terms: _Terms, student: Student, bucket: int, picks: Tensor, coin: torch.Generator
) -> dict[str, float]:
    """Each term at round-to-nearest on the first mini-batch."""
    student.eval()
    student.set_weights()
    with torch.no_grad():
        found = terms.measure(
            bucket, picks, mixed=False, far=terms.tuning.global_weight > 0, coin=coin
        )
    return {name: float(value) for name, value in found.items()}


def _beta(tuning: Tuning, step: int) -> float | None:
    """The penalty's exponent at a step; None in the warm-up and for the straight-through method."""
    at = step / max(1, tuning.steps)
    if tuning.method == "ste" or at < tuning.warmup or tuning.regularizer == 0:
        return None
    progress = (at - tuning.warmup) / max(1e-9, 1 - tuning.warmup)
    return tuning.beta_start + (tuning.beta_end - tuning.beta_start) * progress


def _harden(student: Student, tuning: Tuning, step: int) -> None:
    """Towards the end make more and more choices final, the most decided first."""
    first = _first_hard(tuning)
    every = max(1, round(tuning.steps * tuning.harden / 8))
    if tuning.harden > 0 and step >= first and (step - first) % every == 0:
        fraction = min(1.0, (step - first + every) / max(1, tuning.steps - first))
        for rounding in student.unique():
            rounding.freeze(fraction)


class _Drawer:
    """Mini-batches: shuffled rows of one bucket at a time, every sample once per round."""

    def __init__(self, train: list[list[int]], batch: int, generator: torch.Generator) -> None:
        self.train, self.batch, self.generator = train, batch, generator
        self.queue: list[tuple[int, list[int]]] = []

    def __call__(self) -> tuple[int, Tensor]:
        if not self.queue:
            self._refill()
        bucket, picks = self.queue.pop()
        return bucket, torch.tensor(picks)

    def _refill(self) -> None:
        for bucket, members in enumerate(self.train):
            order = torch.randperm(len(members), generator=self.generator).tolist()
            picks = [members[i] for i in order]
            self.queue += [
                (bucket, picks[i : i + self.batch]) for i in range(0, len(picks), self.batch)
            ]
        mixed = torch.randperm(len(self.queue), generator=self.generator).tolist()
        self.queue = [self.queue[i] for i in mixed]
