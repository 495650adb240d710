# SPDX-License-Identifier: Apache-2.0
"""Let biases take back the mean shift that quantization gives a product's outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration.output_ranges import row_importance
from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.dialect import encoding_of, quantizer_of
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind, argument, kind, product
from qgraph.graph.plan import Role, Site
from qgraph.graph.requests import Request
from qgraph.passes.compensate_rounding import input_rows, row_request
from qgraph.pipeline import Fact, Pass, Promise

HELD_OUT = 2  # one row of so many judges
KINDS = (OpKind.LINEAR, OpKind.CONV)


@dataclass(frozen=True)
class CorrectBiases(Pass):
    """Add ``E[W x] - E[W^ x^]`` to the bias (Nagel et al., ICCV 2019, section 4.2), by data.

    Rounding errors of a weight do not cancel where its input has a mean, and clipping moves the
    input's mean. Both means come from rows of the one sweep, each layer for itself. A row counts
    by its own output energy, else the few tokens with massive activations decide the mean. A
    kernel is summed over its positions: neighbours are taken to have the same mean. A layer keeps
    its bias unless the error falls on rows held out.

    Attributes:
        rows: sampled rows per value. per_sample: of them from one sample at most.
        relative: power of each row's own output energy that its error is divided by.

    Raises:
        ConfigError: fewer than 4 rows.
    """

    name: ClassVar[str] = "correct-biases"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED, Fact.STATISTICS})

    rows: int = 1024
    per_sample: int = 32
    relative: float = 1.5

    def __post_init__(self) -> None:
        if self.rows < 2 * HELD_OUT:
            msg = f"rows is {self.rows}; allowed: at least {2 * HELD_OUT}"
            raise ConfigError(msg)

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        del module
        asked: dict[Node, Request] = {}
        for site in context.plan:
            if site.role is Role.ACTIVATION and site.kind in KINDS:
                axis = _axis(site)
                asked[site.value] = row_request(site.value, axis, self.rows, self.per_sample)
        yield from asked.values()

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        axes = {s.edge.consumer: _axis(s) for s in context.plan if s.role is Role.ACTIVATION}
        changed = False
        for node in list(module.graph.nodes):
            what = product(node)
            if node in axes and what is not None and what.bias is not None and kind(node) in KINDS:
                changed |= self._treat(module, context, node, axes[node])
        if changed:
            module.recompile()
        return changed

    def _treat(self, module: GraphModule, context: Context, node: Node, axis: int) -> bool:
        what = product(node)
        assert what is not None
        assert what.bias is not None
        data, weight = quantizer_of(node.args[what.data]), quantizer_of(node.args[what.weight])
        bias = node.args[what.bias] if what.bias < len(node.args) else None
        reason = _obstacle(node, data, weight, bias)
        rows = input_rows(context, data, axis, rows=self.rows, least=2 * HELD_OUT)
        if reason or rows is None:
            context.record(self.name, node, "kept", reason or "no rows of its input were sampled")
            return False
        assert data is not None
        assert weight is not None
        assert isinstance(bias, Node)
        exact = attribute(module, str(weight.args[0].target)).detach().float()  # type: ignore[union-attr]
        rough = encoding_of(module, weight).fake(exact)
        whole, rounded = (w.flatten(2).sum(2) if w.ndim > 2 else w for w in (exact, rough))
        lost = rows @ whole.T - encoding_of(module, data).fake(rows) @ rounded.T
        power = row_importance(rows, whole, self.relative)[:, None]
        held = torch.arange(rows.shape[0]) % HELD_OUT == 0
        shift = _mean(lost[~held], power[~held])
        before = float((lost[held].square() * power[held]).sum())
        after = float(((lost[held] - shift).square() * power[held]).sum())
        numbers = {"before": before, "after": after, "rows": float(rows.shape[0])}
        if not after < before:
            context.record(self.name, node, "refused", "the held-out error did not fall", **numbers)
            return False
        value = attribute(module, str(bias.target)).detach() + _mean(lost, power)
        stored = insert_buffer(module, f"{bias.target}_corrected", value, before=node)
        Edge(node, (what.bias,)).redirect(stored)
        context.record(self.name, node, "applied", "the held-out error fell", **numbers)
        return True


def _mean(lost: Tensor, power: Tensor) -> Tensor:
    """Weighted mean over rows [N, O], fp32 [O]."""
    return (lost * power).sum(0) / power.sum()


def _axis(site: Site) -> int:
    return -1 if site.axis is None else site.axis


def _obstacle(node: Node, data: Node | None, weight: Node | None, bias: object) -> str:
    """Why a product is left alone; '' if nothing stands in the way."""
    if not isinstance(bias, Node) or bias.op != "get_attr":
        return "it has no stored bias"
    if data is None or weight is None:
        return "its weight is settled, or an operand is in float"
    source = weight.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        return "its weight is computed"
    if kind(node) is OpKind.CONV and argument(node, 6) != 1:
        return "it is a grouped convolution"
    return ""
