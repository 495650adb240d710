# SPDX-License-Identifier: Apache-2.0
"""Layer by layer: what was decided, and how far each value strays from the float model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.graph.edges import Path
from qgraph.graph.plan import Plan
from qgraph.graph.provenance import module_path, source_line
from qgraph.graph.verify import Sample, Tap
from qgraph.report.distributions import Distribution
from qgraph.report.plain import number, plain


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One quantized operand, or one op of the graph.

    Attributes:
        node, path, line: where (node name, module path, source line).
        op: kind of the consumer.
        role: activation or weight.
        bits: of one code.
        format: the encoding in words.
        decided_by, reason: which pass chose it, and why.
        sqnr: dB of the consumer's output against the float model on the sample; nan if unknown.
        distribution: what the values look like before and after; None if unknown.
    """

    node: str
    path: str
    line: str
    op: str
    role: str
    bits: int
    format: str
    decided_by: str
    reason: str
    sqnr: float
    distribution: Distribution | None = None

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        data = plain(asdict(self))
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerRecord:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        shape = data.get("distribution")
        texts = ("node", "path", "line", "op", "role", "format", "decided_by", "reason")
        return cls(
            **{key: str(data[key]) for key in texts},
            bits=int(data["bits"]),
            sqnr=number(data["sqnr"]),
            distribution=None if shape is None else Distribution.from_dict(shape),
        )


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: ``10 log10(sum ref^2 / sum (ref - other)^2)``."""
    ref, got = reference.to(torch.float64), other.to(torch.float64)
    noise, signal = float(((ref - got) ** 2).sum()), float((ref**2).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def measure(
    reference: GraphModule, quantized: GraphModule, sample: Sample, names: set[str],
    taps: tuple[Tap, Tap] | tuple[None, None] = (None, None),
) -> dict[str, float]:  # fmt: skip
    """SQNR of the nodes of these names that both graphs have, on one sample.

    `taps` see all values of the two graphs in passing.
    """
    found: dict[str, float] = {}
    waiting: dict[str, Tensor] = {}  # of the quantized graph, whose order may differ
    quantized_values = _named(quantized, sample, names, taps[1])
    for name, value in _named(reference, sample, names, taps[0]):
        while name not in waiting:
            ahead = next(quantized_values, None)
            if ahead is None:
                break
            waiting[ahead[0]] = ahead[1]
        other = waiting.pop(name, None)
        if other is not None and value.is_floating_point() and value.shape == other.shape:
            found[name] = sqnr(value, other)
    for _ in quantized_values:  # taps want to see the rest
        pass
    return found


def _named(
    module: GraphModule, sample: Sample, names: set[str], tap: Tap | None
) -> Iterator[tuple[str, Tensor]]:
    """Values of the nodes of these names, while the graph runs."""
    for node, value in _walk(module, sample):
        if isinstance(value, Tensor):
            if tap is not None:
                tap(node, value)
            if node.name in names:
                yield node.name, value


def _walk(module: GraphModule, sample: Sample) -> Iterator[tuple[Node, Any]]:
    """Each node with its value as the graph runs on the sample; values go when they are used up."""
    runner = Interpreter(module)
    runner.args_iter = iter(tree_leaves((sample.args, sample.kwargs)))
    for node in module.graph.nodes:
        with torch.no_grad():
            value = runner.env[node] = runner.run_node(node)
        yield node, value
        for used in runner.user_to_last_uses.get(node, []):
            del runner.env[used]


def layer_records(
    plan: Plan, errors: dict[str, float], shapes: dict[tuple[str, Path], Distribution]
) -> list[LayerRecord]:
    """Records of all sites of the plan, in its order."""
    return [
        LayerRecord(
            node=site.edge.consumer.name,
            path=module_path(site.edge.consumer),
            line=source_line(site.edge.consumer),
            op=site.kind.value,
            role=site.role.value,
            bits=site.encoding.bits,
            format=site.encoding.describe(),
            decided_by=site.decided_by,
            reason=site.reason,
            sqnr=errors.get(site.edge.consumer.name, math.nan),
            distribution=shapes.get((site.edge.consumer.name, site.edge.path)),
        )
        for site in plan
        if site.encoding is not None
    ]


def consumers(plan: Plan) -> set[str]:
    """Names of the nodes whose operands are quantized."""
    return {site.edge.consumer.name for site in plan if isinstance(site.edge.consumer, Node)}
