# SPDX-License-Identifier: Apache-2.0
"""Round weights so that each column makes up for the errors of the columns before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import Reservoir
from qgraph.calibration.gram_rounding import InputSums, round_compensated
from qgraph.calibration.learnable import write_codes
from qgraph.calibration.output_ranges import row_importance
from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.formats import Encoding
from qgraph.graph.build import attribute
from qgraph.graph.dialect import encoding_of, quantizer_of
from qgraph.graph.ops import OpKind, product
from qgraph.graph.plan import Role
from qgraph.graph.requests import Request
from qgraph.pipeline import Fact, Pass, Promise

HELD_OUT = 8  # one row of so many judges


@dataclass(frozen=True)
class CompensateRounding(Pass):
    """Second-order rounding (GPTQ, arXiv 2210.17323) of linears from rows of the one sweep.

    Every layer is rounded for itself: its inputs are float rows, quantized as the graph will do.
    A layer keeps rounding to nearest unless the output error falls on rows held out.
    `ReconstructBlocks` does the same layer after layer, each for the inputs that those before it
    make, which is better and needs two passes over the data.

    Attributes:
        rows: sampled rows per value; a few times the number of input channels is enough.
        per_sample: of them from one sample at most.
        damping, ridge, rounds: see `round_compensated`.
        relative: power of each row's own output energy that its error is divided by.
    """

    name: ClassVar[str] = "compensate-rounding"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED, Fact.STATISTICS})

    rows: int = 2048
    per_sample: int = 32
    damping: float = 0.3
    ridge: float = 1.0
    rounds: int = 2
    relative: float = 1.5

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        del module
        linears = {
            s.edge.consumer for s in context.plan.weights() if s.kind is OpKind.LINEAR
        }  # fmt: skip
        asked: dict[Node, Request] = {}
        for site in context.plan:
            if site.role is Role.ACTIVATION and site.edge.consumer in linears:
                asked[site.value] = row_request(site.value, -1, self.rows, self.per_sample)
        yield from asked.values()

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        changed = False
        for node in list(module.graph.nodes):
            what = product(node)
            if what is None or node.target is not torch.ops.aten.linear.default:
                continue
            weight, data = quantizer_of(node.args[what.weight]), quantizer_of(node.args[what.data])
            source = None if weight is None else weight.args[0]
            if not isinstance(source, Node) or source.op != "get_attr" or weight is None:
                continue
            if len(weight.users) > 1 or len(next(iter(weight.users)).users) > 1:
                context.record(self.name, node, "kept", "the weight serves others too")
                continue
            changed |= self._treat(module, context, (node, weight, data))
        return changed

    def _treat(
        self, module: GraphModule, context: Context, place: tuple[Node, Node, Node | None]
    ) -> bool:
        node, quantize, data = place
        rows = input_rows(context, data, -1, rows=self.rows, least=2 * HELD_OUT)
        if rows is None or data is None:
            context.record(self.name, node, "kept", "no rows of its input were sampled")
            return False
        target = str(quantize.args[0].target)  # type: ignore[union-attr]
        weight, encoding = attribute(module, target).detach().float(), encoding_of(module, quantize)
        exact, rough = rows, encoding_of(module, data).fake(rows)
        power = row_importance(rows, weight, self.relative)
        held = torch.arange(rows.shape[0]) % HELD_OUT == 0
        gram = InputSums(1, *weight.shape)
        gram.add(rough[None, ~held], exact[None, ~held], power[~held])
        try:
            found = round_compensated(
                weight, encoding, gram,
                damping=self.damping, ridge=self.ridge, rounds=self.rounds,
            )  # fmt: skip
        except ConfigError as error:
            context.record(self.name, node, "kept", str(error))
            return False
        nearest = encoding.encode(weight)
        codes = found.codes.to(nearest.dtype)
        judged = rough[held], exact[held] @ weight.T, power[held]
        before = _error(encoding, nearest, *judged)
        after = _error(encoding, codes, *judged)
        numbers = {"before": before, "after": after, "rows": float(rows.shape[0])}
        if not after < before:
            context.record(self.name, node, "refused", "the held-out error did not fall", **numbers)
            return False
        write_codes(module, quantize, codes)
        module.recompile()
        context.record(self.name, node, "applied", "the held-out error fell", **numbers)
        return True


def row_request(value: Node, axis: int, rows: int, per_sample: int) -> Request:
    """Ask the sweep for rows of a product's input."""
    return Request(
        value, "Reservoir", (("axis", axis), ("rows", rows), ("per_sample", per_sample))
    )  # fmt: skip


def input_rows(
    context: Context, quantize: Node | None, axis: int, *, rows: int, least: int
) -> Tensor | None:
    """The rows that `row_request` asked for, fp32 [N, C]; None if fewer than `least` came."""
    value = None if quantize is None else quantize.args[0]
    seen = context.statistics.get(value) if isinstance(value, Node) else None
    found = None if seen is None else seen.find(Reservoir, axis=axis, rows=rows)
    sampled = None if found is None else found.sampled()
    return None if sampled is None or sampled.shape[0] < least else sampled


def _error(
    encoding: Encoding, codes: Tensor, rough: Tensor, wanted: Tensor, importance: Tensor
) -> float:
    """Weighted squared error of the outputs relative to their weighted energy."""
    error = (rough @ encoding.decode(codes).T - wanted).square().sum(1) @ importance
    return float(error / (wanted.square().sum(1) @ importance).clamp_min(1e-30))
