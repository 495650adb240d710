# SPDX-License-Identifier: Apache-2.0
"""Write the plan into the graph: a quantize and a dequantize node on every decided edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.context import Context
from qgraph.errors import PassError
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.graph.build import insert_buffer, insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.plan import Role, Site
from qgraph.pipeline import Fact, Pass, Promise


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Insert ``quantize -> dequantize`` on each edge of the plan.

    Consumers of one value that were given the same encoding object share one pair of nodes.

    Raises:
        PassError: a site is still undecided.
    """

    name: ClassVar[str] = "insert-quantizers"
    promise: ClassVar[Promise] = Promise.QUANTIZING
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.RANGES})
    establishes: ClassVar[frozenset[str]] = frozenset({Fact.QUANTIZED})

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        shared: dict[tuple[Node, int], Node] = {}
        for site in sorted(context.plan, key=lambda s: order[s.edge.consumer]):
            if site.encoding is None:
                msg = f"{site.edge}: no pass decided a format ({site.bits} bits, {site.role})"
                raise PassError(msg, pass_name=self.name, node=site.edge.consumer.name)
            key = (site.value, id(site.encoding))
            if key not in shared:
                shared[key] = insert_pair(module, site, site.encoding)
            site.edge.redirect(shared[key])
        return len(context.plan) > 0


def insert_pair(module: GraphModule, site: Site, encoding: Encoding) -> Node:
    """Insert the two nodes behind the site's value; return the dequantize node."""
    value = site.value
    anchor = site.edge.consumer if site.role is Role.WEIGHT else _after(value)
    parameters = parameter_nodes(module, value.name, encoding, before=anchor)
    affine = isinstance(encoding, AffineEncoding)
    quantize = insert_call(
        module, QUANTIZE if affine else QUANTIZE_LEVELS, value, *parameters,
        like=value if site.role is Role.ACTIVATION else site.edge.consumer, before=anchor,
    )  # fmt: skip
    return insert_call(
        module, DEQUANTIZE if affine else DEQUANTIZE_LEVELS, quantize, *parameters,
        like=quantize, before=anchor,
    )  # fmt: skip


def parameter_nodes(
    module: GraphModule, hint: str, encoding: Encoding, *, before: Node
) -> tuple[object, ...]:
    """Buffers and literals of an encoding, in the order of the dialect's schema."""
    if isinstance(encoding, AffineEncoding):
        scale = insert_buffer(module, f"{hint}_scale", encoding.scale, before=before)
        zero = insert_buffer(module, f"{hint}_zero_point", encoding.zero_point, before=before)
        tail: tuple[object, ...] = (encoding.qmin, encoding.qmax)
        if encoding.axis is not None:
            tail += (encoding.axis,) if encoding.block is None else (encoding.axis, encoding.block)
        return (scale, zero, *tail)
    if isinstance(encoding, LevelEncoding):
        scale = insert_buffer(module, f"{hint}_scale", encoding.scale, before=before)
        levels = insert_buffer(module, f"{hint}_levels", encoding.levels, before=before)
        cuts = insert_buffer(module, f"{hint}_thresholds", encoding.thresholds, before=before)
        axis = () if encoding.axis is None else (encoding.axis,)
        return (scale, levels, cuts, encoding.name, encoding.storage_bits, *axis)
    msg = f"{hint}: no dialect op for {type(encoding).__name__}"
    raise PassError(msg)


def _after(value: Node) -> Node:
    following = value.next
    while following.op in {"placeholder"} or (
        value.op == "placeholder" and following.op == "get_attr"
    ):
        following = following.next
    return following
