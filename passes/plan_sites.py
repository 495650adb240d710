# SPDX-License-Identifier: Apache-2.0
"""Decide which edges are quantized, and to how many bits; formats come later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.errors import ConfigError, unknown_name
from qgraph.formats import check_bits
from qgraph.graph.bit_units import CARRIERS
from qgraph.graph.edges import Edge, in_edges
from qgraph.graph.ops import OpKind, constants, is_float, kind, product
from qgraph.graph.plan import Plan, Role, Site
from qgraph.pipeline import Fact, Pass, Promise

LINEAR_SCOPE = ("linear", "conv", "conv_transpose")
FULL_SCOPE = (*LINEAR_SCOPE, "matmul", "add", "embedding")
STORED_SCOPE = (*FULL_SCOPE, "cat", "max_pool", "resize")
_SCOPES = {"linear": LINEAR_SCOPE, "full": FULL_SCOPE, "stored": STORED_SCOPE}


@dataclass(frozen=True)
class PlanSites(Pass):
    """Put weights and inputs of the heavy ops on the plan.

    A residual add counts when both operands depend on the input and have the same shape, so
    masks, biases and position tables are left alone.

    Attributes:
        weight_bits, activation_bits: widths.
        ends_bits: at least this many bits for the first and the last products of the graph.
        embedding_bits: width of embedding tables; default: that of weights, but at least 8. They
            are most of a text model's bytes: 4 bits (with a scale per row) halve the file.
        scope: ``"full"``, ``"linear"`` (weights and inputs of linears and convolutions only),
            ``"stored"`` (full, and the inputs of concatenation, max pooling and interpolation, so
            that skips are stored as codes), or a tuple of op kinds.

    Raises:
        ConfigError: bits outside 2..16, or an unknown op kind.
    """

    name: ClassVar[str] = "plan-sites"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    weight_bits: int = 8
    activation_bits: int = 8
    ends_bits: int = 8
    embedding_bits: int | None = None
    scope: str | tuple[str, ...] = "full"

    def __post_init__(self) -> None:
        widths = (self.weight_bits, self.activation_bits, self.ends_bits, self.table_bits)
        for bits in widths:
            check_bits(bits)
        allowed = {item.value for item in OpKind}
        for item in self.kinds:
            if item not in allowed:
                raise unknown_name("op kind", item, allowed)

    @property
    def table_bits(self) -> int:
        """Width of embedding tables."""
        return max(self.weight_bits, 8) if self.embedding_bits is None else self.embedding_bits

    @property
    def kinds(self) -> tuple[str, ...]:
        """Op kinds in scope."""
        if isinstance(self.scope, str):
            if self.scope not in _SCOPES:
                raise unknown_name("scope", self.scope, _SCOPES)
            return _SCOPES[self.scope]
        return self.scope

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        context.ignore.check(module)
        nodes = list(module.graph.nodes)
        fixed, ends = constants(nodes), end_products(nodes)
        context.plan = Plan()
        for node in nodes:
            if kind(node).value not in self.kinds:
                continue
            sites = list(self._sites(node, fixed, node in ends))
            if sites and context.ignore.matches(node):
                context.record(self.name, node, "kept", "ignored on request: stays in float")
                continue
            context.plan.sites.extend(sites)
        if not context.plan.sites:
            msg = f"nothing to quantize: the graph has no {', '.join(self.kinds)} outside ignore"
            raise ConfigError(msg)
        return False

    def _sites(self, node: Node, fixed: set[Node], is_end: bool) -> list[Site]:
        weight_bits, activation_bits = self.weight_bits, self.activation_bits
        if is_end:
            weight_bits = max(weight_bits, self.ends_bits)
            activation_bits = max(activation_bits, self.ends_bits)
        item, what = kind(node), product(node)
        if item is OpKind.EMBEDDING:
            by_row = self.table_bits < 8
            table = _weight(node, 0, item, self.table_bits, axis=0 if by_row else -1)
            return [table] if _stored(node, 0) else []
        if item in CARRIERS:
            edges = [e for e in in_edges(node) if e.source not in fixed and is_float(e.source)]
            bits = self.activation_bits
            return [Site(edge=e, role=Role.ACTIVATION, kind=item, bits=bits) for e in edges]
        if what is None:
            return self._add_sites(node, fixed, item)
        sites = [_activation(node, what.data, item, activation_bits, what.data_axis)]
        if node.args[what.weight] not in fixed:
            sites.append(_activation(node, what.weight, item, activation_bits, -2))
        elif _stored(node, what.weight):
            axis: int | None = what.weight_axis
            if item is OpKind.MATMUL and _rank(node, what.weight) > 2:
                axis = None  # runtimes take one scale for a stack of matrices
            sites.append(_weight(node, what.weight, item, weight_bits, axis))
        if node.args[what.data] in fixed:  # constant times value: the constant is the weight
            sites[0] = _weight(node, what.data, item, weight_bits, axis=None)
        return [s for s in sites if is_float(s.value)]

    def _add_sites(self, node: Node, fixed: set[Node], item: OpKind) -> list[Site]:
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(operands) != 2 or any(o in fixed or not is_float(o) for o in operands):
            return []
        first, second = (o.meta["val"].shape for o in operands)
        if (
            len(first) < 2
            or len(first) != len(second)
            or any(a != b for a, b in zip(first, second, strict=True))
        ):
            return []
        bits = max(self.activation_bits, 8)
        return [
            Site(edge=Edge(node, (p,)), role=Role.ACTIVATION, kind=item, bits=bits) for p in (0, 1)
        ]


def _activation(node: Node, position: int, item: OpKind, bits: int, axis: int) -> Site:
    edge = Edge(node, (position,))
    return Site(edge=edge, role=Role.ACTIVATION, kind=item, bits=bits, axis=axis)


def _weight(node: Node, position: int, item: OpKind, bits: int, axis: int | None) -> Site:
    edge = Edge(node, (position,))
    return Site(edge=edge, role=Role.WEIGHT, kind=item, bits=bits, axis=axis)


def _stored(node: Node, position: int) -> bool:
    source = node.args[position]
    return isinstance(source, Node) and source.op == "get_attr"


def _rank(node: Node, position: int) -> int:
    source = node.args[position]
    assert isinstance(source, Node)
    return int(source.meta["val"].ndim)


def end_products(nodes: list[Node]) -> set[Node]:
    """Products with no product before them on any path, and those with none behind."""
    before: dict[Node, bool] = {}
    for node in nodes:
        before[node] = any(before[i] or product(i) is not None for i in node.all_input_nodes)
    behind: dict[Node, bool] = {}
    for node in reversed(nodes):
        behind[node] = any(behind[u] or product(u) is not None for u in node.users)
    heavy = [
        n for n in nodes if product(n) is not None and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    return {n for n in heavy if not before[n] or not behind[n]}
