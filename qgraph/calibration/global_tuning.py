# SPDX-License-Identifier: Apache-2.0
"""Learn activation steps and log-affine tables of the whole network by one objective.

No region, no local loss: the quantized network runs from input to output, the objective compares
it with the float one, and a handful of numbers per quantizer moves (Reg-PTQ, section 3.2 and the
four numbers of equation 9), with the biases and scales that follow rounding. Codes of weights stay
as they are; gradients pass straight through rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.calibration.corrections import (
    Corrections,
    learn_corrections,
    write_corrections,
)
from qgraph.calibration.filtered_loss import Filtering, Kept, Objective
from qgraph.calibration.learnable import write_scale
from qgraph.calibration.log_affine_fit import soft_log_affine
from qgraph.calibration.streams import Bucket, Stream
from qgraph.calibration.student import Student, Trainable, build_student
from qgraph.formats import Encoding, LevelEncoding
from qgraph.formats.log_affine import NAME, log_affine, parameters_of, with_parameters
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.dialect import (
    DEQUANTIZE_LEVELS,
    QUANTIZE_LEVELS,
    encoding_of,
    is_dequantize,
    is_quantize,
)
from qgraph.graph.edges import Edge
from qgraph.graph.extract import by_name, extract, output_names, structured


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the numbers move.

    Attributes:
        steps, batch: Adam steps and samples per step.
        step_lr: rate of the logarithm of activation steps; table_lr: of slopes (in the logarithm)
            and offsets (in codes); bias_lr: of biases, in standard deviations of the product's
            output; scale_lr: of the logarithm of weight scales. All fall to zero along a cosine.
    """

    steps: int = 120
    batch: int = 16
    step_lr: float = 4e-3
    table_lr: float = 1e-2
    bias_lr: float = 0.0
    scale_lr: float = 0.0


class LearnedTable(nn.Module):
    """A weight in the log-affine format whose slope and offset are learned."""

    def __init__(self, weight: Tensor, encoding: LevelEncoding) -> None:
        super().__init__()
        self.start, self.encoding = parameters_of(encoding), encoding
        axis = encoding.axis
        self.axis = axis
        rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().movedim(axis, 0)
        self.shape, self.rows = rows.shape if axis is not None else weight.shape, rows.flatten(1)
        self.log_slope = self.start.slope.log().float().requires_grad_()
        self.offset = self.start.offset.float().requires_grad_()

    def forward(self) -> Tensor:
        """The weight as the numbers of this step decode it, fp32."""
        made = soft_log_affine(
            self.rows, self.log_slope, self.offset, self.start.centre.float(), self.start.count
        ).view(self.shape)
        return made if self.axis is None else made.movedim(0, self.axis)

    def learned(self) -> LevelEncoding:
        """The table to deploy."""
        found = with_parameters(
            self.start, self.log_slope.detach().double().exp(), self.offset.detach().double()
        )
        return log_affine(found, axis=self.axis)


@dataclass(frozen=True, slots=True)
class Learned:
    """A student's numbers that move together.

    Attributes:
        student: activation quantizers.
        tables: log-affine weights by name of their quantize node; tied ones share an object.
        corrections: biases, and scales of settled weights.
    """

    student: Student
    tables: dict[str, LearnedTable]
    corrections: Corrections

    def distinct(self) -> list[LearnedTable]:
        """Tables, tied ones once."""
        return list({id(t): t for t in self.tables.values()}.values())

    def groups(self, schedule: Schedule) -> list[dict[str, Any]]:
        """Variables by rate; what has none is left out."""
        tables = [t for table in self.distinct() for t in (table.log_slope, table.offset)]
        biases, scales = self.corrections.variables()
        rates = (
            (self.student.steps(), schedule.step_lr), (tables, schedule.table_lr),
            (biases, schedule.bias_lr), (scales, schedule.scale_lr),
        )  # fmt: skip
        return [{"params": held, "lr": rate} for held, rate in rates if held and rate > 0]

    def write(self, module: GraphModule) -> int:
        """Give the quantized graph what was learned; return how many steps moved."""
        nodes = by_name(module)
        encodings = {id(table): table.learned() for table in self.distinct()}
        scales = {name: fake.learned() for name, fake in self.student.fakes.items()}
        moved = {name: scale for name, scale in scales.items() if scale is not None}
        for name, scale in moved.items():
            write_scale(module, nodes[name], scale)
        for name, table in self.tables.items():
            write_table(module, nodes[name], encodings[id(table)])
        write_corrections(module, self.corrections)
        module.recompile()
        return len(moved)


class WholeNetwork:
    """A quantized graph that learns, its float twin, and the samples both see.

    Attributes:
        targets: float outputs of every sample, sample-major, by bucket.
    """

    def __init__(
        self, module: GraphModule, exact: GraphModule, stream: Stream, objective: Objective
    ) -> None:
        self.module, self.exact, self.stream, self.objective = module, exact, stream, objective
        held = stream.buckets[0].values
        self.inputs = [
            n.name for n in exact.graph.nodes if n.op == "placeholder" and n.name in held
        ]
        self.outputs = list(output_names(exact))
        self.made = list(output_names(module))
        run = extract(exact, self.inputs, self.outputs)
        stream.advance(run, self.inputs, self.outputs)

    def loss(self, run: Callable[..., tuple[Tensor, ...]], bucket: Bucket, picks: Tensor) -> Tensor:
        """The objective of some samples."""
        made, wanted = self._outputs(run, bucket, picks)
        return self.objective(made, wanted)

    def _outputs(
        self, run: Callable[..., tuple[Tensor, ...]], bucket: Bucket, picks: Tensor
    ) -> tuple[Any, Any]:
        made = run(*(bucket.rows(name, picks) for name in self.inputs))
        wanted = [bucket.rows(name, picks) for name in self.outputs]
        return structured(self.module, list(made)), structured(self.exact, wanted)

    @torch.no_grad()
    def mean_loss(
        self, run: Callable[..., tuple[Tensor, ...]], members: list[list[int]], batch: int
    ) -> float:
        """The objective over samples, by bucket."""
        total, count = 0.0, 0
        for bucket, places in zip(self.stream.buckets, members, strict=True):
            for start in range(0, len(places), batch):
                picks = torch.tensor(places[start : start + batch])
                total += float(self.loss(run, bucket, picks)) * len(picks)
                count += len(picks)
        return total / max(1, count)

    @torch.no_grad()
    def kept(self, batch: int = 32) -> Kept | None:
        """What the objective's filter keeps of all samples; None if it has no filter."""
        if not isinstance(self.objective, Filtering):
            return None
        run = extract(self.module, self.inputs, self.made)
        total = Kept()
        for bucket in self.stream.buckets:
            for start in range(0, len(bucket.samples), batch):
                stop = min(start + batch, len(bucket.samples))
                pair = self._outputs(run, bucket, torch.arange(start, stop))
                total = total + self.objective.statistics(*pair)
        return total

    def learned(self, train: list[list[int]], size: int) -> Learned:
        """The graph with quantizers, tables and corrections that learn."""
        activations = frozenset(
            n.name for n in self.module.graph.nodes
            if is_quantize(n) and isinstance(n.args[0], Node) and n.args[0].op != "get_attr"
        )  # fmt: skip
        student = build_student(self.module, self.inputs, self.made, Trainable({}, activations))
        tables = learn_tables(student.graph)
        corrections = learn_corrections(student.graph, self._batch(train, size))
        return Learned(student, tables, corrections)

    def _batch(self, members: list[list[int]], size: int) -> tuple[Tensor, ...]:
        """Inputs of the first samples of the first bucket that has any."""
        number = next(number for number, held in enumerate(members) if held)
        picks = torch.tensor(members[number][:size])
        return tuple(self.stream.buckets[number].rows(name, picks) for name in self.inputs)


def learn_tables(graph: GraphModule) -> dict[str, LearnedTable]:
    """Replace every log-affine weight by a module that learns; tied ones share it."""
    tables: dict[str, LearnedTable] = {}
    shared: dict[tuple[str, int], LearnedTable] = {}
    for node in list(graph.graph.nodes):
        quantize = node.args[0] if is_dequantize(node) else None
        source = quantize.args[0] if is_quantize(quantize) else None  # type: ignore[union-attr]
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        assert isinstance(quantize, Node)
        encoding: Encoding = encoding_of(graph, quantize)
        if not isinstance(encoding, LevelEncoding) or encoding.name != NAME:
            continue
        key = (str(source.target), encoding.scale.data_ptr())
        if key not in shared:
            shared[key] = LearnedTable(attribute(graph, str(source.target)), encoding)
        tables[quantize.name] = shared[key]
        name = f"table_{quantize.name}"
        graph.add_submodule(name, shared[key])
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(name, ())
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tables


def descend(
    network: WholeNetwork, learned: Learned, schedule: Schedule, train: list[list[int]], *,
    seed: int, tick: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Move the numbers; the student keeps them."""
    student, groups = learned.student, learned.groups(schedule)
    moving = [held for group in groups for held in group["params"]]
    places = [(b, i) for b, members in enumerate(train) for i in members]
    if not groups or not places or schedule.steps == 0:
        return
    starts = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    for step in range(schedule.steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = float(start) * fall
        bucket = places[int(torch.randint(len(places), (), generator=generator))][0]
        members = train[bucket]
        order = torch.randperm(len(members), generator=generator)[: schedule.batch]
        picks = torch.tensor(members)[order]
        with torch.enable_grad():
            loss = network.loss(student.graph, network.stream.buckets[bucket], picks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=moving)
        optimizer.step()
        if tick is not None:
            tick(step + 1)


def write_table(module: GraphModule, node: Node, encoding: LevelEncoding) -> None:
    """Let a quantize node of a table format, and its inverse, read another table."""
    pair = [node, *(u for u in node.users if u.target is DEQUANTIZE_LEVELS)]
    parts = {1: encoding.scale, 2: encoding.levels, 3: encoding.thresholds}
    for position, value in parts.items():
        stored = insert_buffer(module, f"{node.name}_{position}", value, before=node)
        for each in pair:
            if each.target in {QUANTIZE_LEVELS, DEQUANTIZE_LEVELS}:
                Edge(each, (position,)).redirect(stored)
