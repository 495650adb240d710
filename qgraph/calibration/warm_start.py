# SPDX-License-Identifier: Apache-2.0
"""Warm start of a region: its weights are rounded one product after the other, with feedback.

Each product sees the inputs that the products rounded before it make, and aims at the float
network's output; where it ends in a residual sum, at the sum's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qgraph.calibration.gram_rounding import InputSums, round_compensated
from qgraph.calibration.region_problem import Problem
from qgraph.calibration.rounding import Rounding
from qgraph.errors import ConfigError
from qgraph.graph.extract import by_name, extract
from qgraph.graph.ops import OpKind, argument, kind, product
from qgraph.graph.seen_through import is_normalised_after

aten = torch.ops.aten
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Warm:
    """How a region is started.

    Attributes:
        damping, ridge, rounds: see `round_compensated`.
        relative: power of each row's own output energy that its error is divided by, as for
            ranges (`calibration/output_ranges.py`), in linears and before a norm; the positions
            of other convolutions count alike.
        beside: whether a product that ends in a residual sum makes up for the sum's error.
    """

    damping: float = 0.3
    ridge: float = 1.0
    rounds: int = 2
    relative: float = 1.5
    beside: bool = True


class Unfolding:
    """Views inputs and outputs of a linear or a 2-D convolution as rows of groups."""

    def __init__(self, call: Node, weight: Tensor) -> None:
        self.kernel = tuple(weight.shape[2:])
        self.options = tuple(cast(list[int], argument(call, i)) for i in (3, 4, 5))
        self.groups = int(cast(int, argument(call, 6))) if self.kernel else 1
        self.weight = weight.detach().float().reshape(self.groups, -1, weight.shape[1:].numel())

    @staticmethod
    def takes(call: Node) -> bool:
        """Whether the op has rows."""
        if kind(call) is OpKind.LINEAR:
            return True
        return call.target is aten.conv2d.default and not isinstance(argument(call, 4), str)

    def inputs(self, value: Tensor) -> Tensor:
        """[G, N, K] of the data operand."""
        if not self.kernel:
            return value.flatten(0, -2)[None]
        stride, padding, dilation = (tuple(option) for option in self.options)
        columns = F.unfold(value, self.kernel, dilation, padding, stride)  # [B, C k, L]
        return self._by_group(columns)

    def outputs(self, value: Tensor) -> Tensor:
        """[G, N, O] of a value with the output's shape."""
        if not self.kernel:
            return value.flatten(0, -2)[None]
        return self._by_group(value.flatten(2))

    def _by_group(self, columns: Tensor) -> Tensor:
        """[G, N, C] of [B, G C, L]."""
        split: Tensor = columns.unflatten(1, (self.groups, -1))
        return split.permute(1, 0, 3, 2).flatten(1, 2)

    def made(self, rows: Tensor) -> Tensor:
        """[G, N, O] outputs of the float weight, without bias."""
        return rows @ self.weight.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Place:
    """A product to round: what it reads, and what is summed with its output, in both graphs."""

    name: str
    rounding: Rounding
    rows: Unfolding
    read: tuple[str, str]
    beside: tuple[str, str] | None
    power: float


def warm_start(problem: Problem, how: Warm, *, batch: int = 32) -> int:
    """Round the weights of a region with feedback; return how many.

    The student's roundings start over from the codes found. A weight that several products read
    is rounded once, for the sum of their errors. Weights that ops without rows read stay as they
    are.
    """
    student = problem.student
    student.eval()
    student.set_weights()
    done = 0
    for together in _places(problem, how):
        for place, gram in _sums(problem, together, batch):
            try:
                found = round_compensated(
                    place.rounding.source, place.rounding.encoding, gram,
                    damping=how.damping, ridge=how.ridge, rounds=how.rounds,
                )  # fmt: skip
            except ConfigError:
                continue
            place.rounding.restart(found.codes, found.target)
            done += 1
        student.set_weights()
    return done


def _places(problem: Problem, how: Warm) -> list[list[_Place]]:
    """Products to round together: those that read the same rows, or that share a weight."""
    exact = by_name(problem.exact)
    uses: dict[int, list[_Place]] = {}
    readers: dict[int, int] = {}
    for source, rounding in _sources(problem):
        key = id(rounding)
        readers[key] = readers.get(key, 0) + len(source.users)
        for node in source.users:
            what = product(node)
            if what is not None and node.args[what.weight] is source and Unfolding.takes(node):
                place = _place(node, rounding, exact[node.name], how)
                uses.setdefault(key, []).append(place)
    order = {node.name: i for i, node in enumerate(problem.student.graph.graph.nodes)}
    found: dict[tuple[object, ...], list[_Place]] = {}
    for key, places in sorted(uses.items(), key=lambda item: min(order[p.name] for p in item[1])):
        if len(places) == readers[key]:
            # A shortcut may read a value with another kernel or stride than the main path does.
            rows = places[0].rows
            same = (places[0].read[0], rows.kernel, str(rows.options), rows.groups)
            found.setdefault(same if len(places) == 1 else (key,), []).extend(places)
    return list(found.values())


def _sources(problem: Problem) -> Iterator[tuple[Node, Rounding]]:
    """The nodes that give rounded weights."""
    graph = problem.student.graph
    names = {id(module): name for name, module in problem.student.held.items()}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = names.get(id(graph.get_submodule(str(node.target))))
            if name in problem.student.roundings:
                yield node, problem.student.roundings[name]


def _place(node: Node, rounding: Rounding, twin: Node, how: Warm) -> _Place:
    what = product(node)
    assert what is not None
    read = (cast(Node, call.args[what.data]).name for call in (node, twin))
    beside = _residual(node, twin) if how.beside else None
    weighed = kind(node) is OpKind.LINEAR or is_normalised_after(twin)
    power = how.relative if weighed else 0.0
    rows = Unfolding(node, rounding.source)
    return _Place(node.name, rounding, rows, (next(read), next(read)), beside, power)


def _residual(node: Node, twin: Node) -> tuple[str, str] | None:
    """The other operand of the sum that alone reads a product, in both graphs."""
    first, second = _summand(node), _summand(twin)
    return None if first is None or second is None else (first, second)


def _summand(call: Node) -> str | None:
    add = next(iter(call.users))
    if len(call.users) != 1 or add.target is not aten.add.Tensor or add.kwargs:
        return None
    other = add.args[1] if add.args[0] is call else add.args[0]
    if not isinstance(other, Node) or other is call:
        return None
    same = str(other.meta["val"].shape) == str(call.meta["val"].shape)
    return other.name if same else None


def _sums(
    problem: Problem, together: list[_Place], batch: int
) -> Iterator[tuple[_Place, InputSums]]:
    """The places to round and their sums; uses of one weight become one."""
    if len(together) > 1 and together[0].rounding is together[1].rounding:
        total, *others = (_grams(problem, [place], batch)[0] for place in together)
        for other in others:
            total.merge(other)
        yield together[0], total
        return
    yield from zip(together, _grams(problem, together, batch), strict=True)


def _grams(problem: Problem, together: Sequence[_Place], batch: int) -> list[InputSums]:
    """Sums for products that read one value, over the training samples."""
    grams: list[InputSums] = []
    middles: list[Tensor] = []
    for mine, theirs, mask in _values(problem, together, batch):
        first = together[0].rows
        rough, exact = first.inputs(mine[0]), first.inputs(theirs[0])
        counted = _counted(mask, mine[0], exact)
        at = 0
        for i, place in enumerate(together):
            output, beside = place.rows.made(exact), None
            if place.beside is not None:
                at += 1
                sides = place.rows.outputs(mine[at]), place.rows.outputs(theirs[at])
                output, beside = output + sides[1], sides[1] - sides[0]
            energy = output.square().sum((0, 2))
            if i == len(grams):
                grams.append(InputSums(rough.shape[0], output.shape[2], rough.shape[2]))
                middles.append(energy[counted].median().clamp_min(TINY))
            share = (middles[i] / (energy + middles[i])) ** place.power
            grams[i].add(rough, exact, share * counted, beside)
    return grams


def _counted(mask: Tensor | None, value: Tensor, rows: Tensor) -> Tensor:
    """Which rows [N] count: all, or those of tokens that the mask [B, T] keeps."""
    if mask is not None and mask.numel() == rows.shape[1] and value.shape[:2] == mask.shape:
        return mask.flatten()
    return torch.ones(rows.shape[1], dtype=torch.bool)


def _values(
    problem: Problem, together: Sequence[_Place], batch: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]]:
    """What the products read and what is summed with them, in both graphs, batch by batch."""
    streams, inputs = problem.streams, problem.ports.inputs
    sides = [place.beside for place in together if place.beside is not None]
    pairs = [together[0].read, *sides]
    rough = extract(problem.student.graph, inputs, [pair[0] for pair in pairs])
    exact = extract(problem.exact, inputs, [pair[1] for pair in pairs])
    size = batch if streams.exact.batching.dynamic else 1
    for bucket, members in enumerate(streams.train):
        for start in range(0, len(members), size):
            picks = torch.tensor(members[start : start + size])
            mine, theirs = streams.inputs(bucket, inputs, picks)
            yield rough(*mine), exact(*theirs), streams.mask(bucket, picks)
