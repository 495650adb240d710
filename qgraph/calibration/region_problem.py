# SPDX-License-Identifier: Apache-2.0
"""What tuning a region needs and gives: options, streams, the float suffix, the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule

from qgraph.calibration.region_losses import Ports, final_loss
from qgraph.calibration.rounding import Method
from qgraph.calibration.streams import ROW_MASK, Stream, read
from qgraph.calibration.student import Student


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a region is tuned.

    Attributes:
        steps, batch: optimiser steps and samples per step.
        lr: Adam's, of the rounding variables; step_lr: of the logarithm of activation steps.
        drop: share of elements that stay float, in inputs and in quantizers (QDrop).
        regularizer: weight of the pull to 0 and 1, off for the first `warmup` of the steps, its
            exponent falling from `beta_start` to `beta_end`.
        harden: share of steps at the end during which choices become final one after the other.
        global_weight, global_every: weight of the term behind the float suffix, and every how
            many steps it counts.
        local_weight: weight of the term inside the region.
        temperature: of the KL divergence between logits.
        tolerance: relative rise of the held-out loss that is still accepted.
    """

    steps: int = 400
    batch: int = 16
    lr: float = 1e-2
    step_lr: float = 2e-3
    drop: float = 0.5
    regularizer: float = 0.01
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    harden: float = 0.2
    method: Method = "adaround"
    global_weight: float = 0.0
    global_every: int = 4
    local_weight: float = 0.0
    temperature: float = 4.0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Suffix:
    """The frozen float rest of the network.

    Attributes:
        run: (region outputs, passing values) -> the final value.
        made: ports taken from the region; passing: ports taken from the float stream.
        targets: ports of the float network's final values.
        logits: whether that is class logits (else features).
        objective: judges all of them together instead: (made, wanted) -> scalar; passing values
            are then those of the quantized network, as far as it has got.
    """

    run: Callable[..., tuple[Tensor, ...]]
    made: tuple[str, ...]
    passing: tuple[str, ...]
    targets: tuple[str, ...]
    logits: bool = False
    objective: Callable[[list[Tensor], list[Tensor]], Tensor] | None = None


@dataclass
class Streams:
    """Float and quantized inputs, float targets, and who is held out.

    Attributes:
        exact: the float stream; it holds side inputs too, and the targets.
        quantized: the quantized network's stream.
        train, guard: positions of samples, by bucket.
    """

    exact: Stream
    quantized: Stream
    train: list[list[int]]
    guard: list[list[int]]

    def inputs(
        self, bucket: int, ports: tuple[str, ...], picks: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Quantized and float rows of ports."""
        flt, qnt = self.exact.buckets[bucket], self.quantized.buckets[bucket]
        return (
            [read(qnt, flt, name, picks) for name in ports],
            [flt.rows(name, picks) for name in ports],
        )  # fmt: skip

    def mask(self, bucket: int, picks: Tensor) -> Tensor | None:
        """Which rows [B, T] count; None for all."""
        held = self.exact.buckets[bucket]
        return held.rows(ROW_MASK, picks) if ROW_MASK in held.values else None

    def exact_rows(self, bucket: int, ports: tuple[str, ...], picks: Tensor) -> list[Tensor]:
        """Float rows of ports."""
        return [self.exact.buckets[bucket].rows(name, picks) for name in ports]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of tuning a region.

    Attributes:
        accepted: whether the held-out hard loss fell.
        before, warm, after: that loss at round-to-nearest, at the warm start, and of what is kept.
        learned: whether what is kept was learned (else it is the warm start).
        flips: weights whose code changed; weights: of so many.
        undecided: share of h that was neither 0 nor 1 shortly before the end forced it.
        history: (step, block loss, undecided share) now and then.
    """

    accepted: bool
    before: float
    warm: float
    after: float
    learned: bool
    flips: int
    weights: int
    undecided: float
    history: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass
class Problem:
    """A region together with all that tuning it needs.

    Attributes:
        student: the region as it learns.
        teacher: the float region: same inputs, same observed values.
        exact: the whole float graph.
        ports, streams, suffix: see their classes.
        importance: per bucket and judged output the weight of each element's error, sample-major.
    """

    student: Student
    exact: GraphModule
    teacher: Callable[..., tuple[Tensor, ...]]
    ports: Ports
    streams: Streams
    suffix: Suffix | None = None
    importance: list[dict[str, Tensor]] | None = None

    @property
    def is_judged(self) -> bool:
        """Whether an objective looks at the network's outputs."""
        return self.suffix is not None and self.suffix.objective is not None

    def weights(self, bucket: int, picks: Tensor) -> list[Tensor] | None:
        """Importance of the elements of the judged outputs for some samples."""
        if self.importance is None:
            return None
        held = self.importance[bucket]
        return [held[name][picks].flatten(0, 1) for name in self.ports.outputs]

    def far(self, made: list[Tensor], bucket: int, picks: Tensor, softness: float) -> Tensor:
        """What the float rest of the network makes of a region's outputs, against its targets."""
        suffix = self.suffix
        assert suffix is not None
        given = dict(zip(self.ports.outputs, made, strict=False))
        rough, exact = self.streams.inputs(bucket, suffix.passing, picks)
        passing = exact if suffix.objective is None else rough
        ends = suffix.run(*(given[name] for name in suffix.made), *passing)
        wanted = self.streams.exact_rows(bucket, suffix.targets, picks)
        if suffix.objective is not None:
            return suffix.objective(list(ends), wanted)
        return final_loss(ends[0], wanted[0], softness if suffix.logits else None)
