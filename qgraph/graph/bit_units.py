# SPDX-License-Identifier: Apache-2.0
"""What must share bit widths, and what each width costs, read from a plan.

A unit is a product, or several that read one value: that value is stored once, so its width is one
choice. Carriers (concatenations, max pooling, interpolation) follow those who read behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from qgraph.graph.edges import Edge
from qgraph.graph.encoder_decoder import Side, Structure
from qgraph.graph.ops import OpKind, kind, product
from qgraph.graph.plan import Plan, Role, Site
from qgraph.graph.product_sizes import ProductSize, product_sizes
from qgraph.graph.provenance import module_path
from qgraph.graph.storage import leaf_edges, stored_tensors

CARRIERS = frozenset({OpKind.CAT, OpKind.MAX_POOL, OpKind.RESIZE})
FLOAT_BITS = 32
_KEEP_HIGH = frozenset({Side.STEM, Side.HEAD, Side.GATE})
Bits = tuple[int, int]


@dataclass(eq=False, slots=True, kw_only=True)
class Unit:
    """Products that share their bits.

    Attributes:
        name: unique: module path of the first product, or its node name.
        index: place of that product in the graph.
        block, level, side: of that product; see `Structure`.
        products: nodes in graph order.
        weights, activations: their sites.
        pinned: bits that it keeps whatever a budget asks, or None.
        sizes: counts of each product.
        stored: activations charged to this unit, with the bits that others ask at least.
    """

    name: str
    index: int
    block: str
    level: int | None
    side: Side
    products: tuple[Node, ...]
    weights: tuple[Site, ...]
    activations: tuple[Site, ...]
    pinned: Bits | None = None
    sizes: tuple[ProductSize, ...] = ()
    stored: list[tuple[int, int]] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Elements of all quantized weights."""
        return sum(size.parameters for size in self.sizes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(size.macs for size in self.sizes)

    @property
    def elements(self) -> int:
        """Stored activation elements charged to this unit."""
        return sum(elements for elements, _ in self.stored)

    def costs(self, bits: Bits) -> dict[str, float]:
        """Bytes of weights, bit operations, bytes of activations at (weight, activation) bits."""
        weight, activation = bits
        operations = sum(
            size.macs * activation * (weight if size.parameters else activation)
            for size in self.sizes
        )
        stored = sum(elements * max(least, activation) for elements, least in self.stored)
        return {
            "size": self.parameters * weight / 8,
            "bops": float(operations),
            "activations": stored / 8,
        }

    def assign(self, bits: Bits) -> None:
        """Set the widths of all its sites."""
        for site in self.weights:
            site.bits = bits[0]
        for site in self.activations:
            site.bits = bits[1]


@dataclass(frozen=True, slots=True)
class Units:
    """All units of a plan, and what no unit decides.

    Attributes:
        units: in graph order.
        rest: costs of everything else: products and activations in float or at fixed bits.
        floats: costs of the float network: what shares of a budget are shares of.
    """

    units: tuple[Unit, ...]
    rest: dict[str, float]
    floats: dict[str, float]


def find_units(module: GraphModule, plan: Plan, structure: Structure, base: Bits) -> Units:
    """Group the products of a plan.

    Args:
        module: a canonical float graph, or its copy with quantizers still on the plan only.
        plan: filled by plan-sites.
        structure: where each product lies.
        base: bits asked for in general; a site with more was raised on purpose and keeps them.
    """
    sizes = product_sizes(module)
    members = _by_shared_value(plan)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    found = [_unit(nodes, plan, structure, base=base, order=order) for nodes in members]
    names = [unit.name for unit in found]
    for unit in found:
        if names.count(unit.name) > 1:
            unit.name = unit.products[0].name
        unit.sizes = tuple(sizes[node.name] for node in unit.products)
    units = tuple(sorted(found, key=lambda u: u.index))
    rest = _rest(module, plan, units, sizes)
    return Units(units, rest, _floats(module, sizes))


def _by_shared_value(plan: Plan) -> list[list[Node]]:
    """Products of the plan, those that read one quantized value together."""
    owner: dict[Node, list[Node]] = {}
    by_value: dict[Node, Node] = {}
    for site in plan:
        node = site.edge.consumer
        if product(node) is None:
            continue
        group = owner.setdefault(node, [node])
        if site.role is Role.ACTIVATION:
            first = by_value.setdefault(site.value, node)
            if owner[first] is not group:
                owner[first].extend(group)
                for member in group:
                    owner[member] = owner[first]
    unique = {id(group): group for group in owner.values()}
    return list(unique.values())


def _unit(
    nodes: list[Node], plan: Plan, structure: Structure, *, base: Bits, order: dict[Node, int]
) -> Unit:
    nodes = sorted(nodes, key=lambda n: order[n])
    inside = set(nodes)
    sites = [site for site in plan if site.edge.consumer in inside]
    weights = tuple(s for s in sites if s.role is Role.WEIGHT)
    activations = tuple(s for s in sites if s.role is Role.ACTIVATION)
    place = structure.placements.get(nodes[0].name)
    sides = {structure.placements[n.name].side for n in nodes if n.name in structure.placements}
    widest = (
        max((s.bits for s in weights), default=base[0]),
        max((s.bits for s in activations), default=base[1]),
    )
    is_raised = widest[0] > base[0] or widest[1] > base[1]
    is_kept = bool(sides & _KEEP_HIGH)
    pinned = (max(widest[0], 8), max(widest[1], 8)) if is_raised or is_kept else None
    return Unit(
        name=module_path(nodes[0]) or nodes[0].name,
        index=order[nodes[0]],
        block=nodes[0].name if place is None else place.block,
        level=None if place is None else place.level,
        side=Side.FLAT if place is None else place.side,
        products=tuple(nodes),
        weights=weights,
        activations=activations,
        pinned=pinned,
    )


def followers(edge: Edge, owner: Mapping[Node, Unit]) -> list[Unit]:
    """The units whose widths an edge follows: its own, or those that read behind a carrier."""
    found: dict[int, Unit] = {}
    pending, seen = [edge.consumer], {edge.consumer}
    while pending:
        reader = pending.pop()
        if reader in owner:
            found[owner[reader].index] = owner[reader]
        elif kind(reader) in CARRIERS:
            behind = [e.consumer for e in leaf_edges(reader, _no_width)]
            pending.extend(node for node in behind if node not in seen)
            seen.update(behind)
    return [found[index] for index in sorted(found)]


def owners(units: tuple[Unit, ...]) -> dict[Node, Unit]:
    """The unit of each product."""
    return {node: unit for unit in units for node in unit.products}


def carriers(plan: Plan, units: tuple[Unit, ...]) -> dict[Node, tuple[list[Site], list[Unit]]]:
    """Carrier sites by the value they store, with the units whose widths that value follows."""
    owner = owners(units)
    found: dict[Node, tuple[list[Site], list[Unit]]] = {}
    for site in plan.activations():
        if site.kind in CARRIERS:
            sites, readers = found.setdefault(site.value, ([], []))
            sites.append(site)
            readers.extend(u for u in followers(site.edge, owner) if u not in readers)
    return found


def _no_width(edge: Edge) -> None:
    del edge


def stored_bytes(module: GraphModule, plan: Plan) -> float:
    """Bytes of all stored activations at the widths that stand on the plan."""
    site_of = {site.edge: site for site in plan.activations()}
    stored = stored_tensors(module, lambda e: site_of[e].bits if e in site_of else None)
    return sum(i.elements * (FLOAT_BITS if i.bits is None else i.bits) for i in stored) / 8


def _charge(module: GraphModule, plan: Plan, units: tuple[Unit, ...]) -> float:
    """Charge each stored activation to its shallowest reader; bits of what no unit decides."""
    owner, site_of = owners(units), {site.edge: site for site in plan.activations()}
    rest = 0
    for item in stored_tensors(module, lambda e: site_of[e].bits if e in site_of else None):
        readers = [unit for edge in item.leaves for unit in followers(edge, owner)]
        fixed = [site_of[e].bits for e in item.leaves if e in site_of and not followers(e, owner)]
        if item.bits is None or not readers:
            rest += item.elements * (FLOAT_BITS if item.bits is None else item.bits)
            continue
        depth = [math.inf if u.level is None else u.level for u in readers]
        first = min(range(len(readers)), key=lambda i: (depth[i], readers[i].index))
        readers[first].stored.append((item.elements, max(fixed, default=0)))
    return rest


def _rest(
    module: GraphModule, plan: Plan, units: tuple[Unit, ...], sizes: Mapping[str, ProductSize]
) -> dict[str, float]:
    """Costs of products in no unit, and of activations that follow no unit."""
    inside = {node.name for node in owners(units)}
    others = [size for name, size in sizes.items() if name not in inside]
    return {
        "size": sum(s.parameters for s in others) * FLOAT_BITS / 8,
        "bops": float(sum(s.macs for s in others) * FLOAT_BITS**2),
        "activations": _charge(module, plan, units) / 8,
    }


def _floats(module: GraphModule, sizes: Mapping[str, ProductSize]) -> dict[str, float]:
    elements = sum(item.elements for item in stored_tensors(module, _no_width))
    return {
        "size": sum(s.parameters for s in sizes.values()) * FLOAT_BITS / 8,
        "bops": float(sum(s.macs for s in sizes.values()) * FLOAT_BITS**2),
        "activations": elements * FLOAT_BITS / 8,
    }
