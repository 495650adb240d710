# SPDX-License-Identifier: Apache-2.0
"""What regions of a quantized graph may learn, and how it is written back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration.region_losses import Ports
from qgraph.graph.build import insert_buffer
from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE, encoding_of, is_quantize
from qgraph.graph.edges import Edge
from qgraph.graph.extract import by_name, slice_between
from qgraph.graph.ops import OpKind, kind, product
from qgraph.graph.regions import Region
from qgraph.graph.tensors import weight_keys


def owners(module: GraphModule, regions: list[Region]) -> dict[str, list[int]]:
    """Per quantize node the regions whose slice contains it."""
    owners: dict[str, list[int]] = {}
    for number, region in enumerate(regions):
        moving = [name for name in region.outputs if name in region.moving]
        inside, _ = slice_between(module, region.inputs, moving)
        for node in inside:
            if is_quantize(node):
                owners.setdefault(node.name, []).append(number)
    return owners


def groups(module: GraphModule, owners: dict[str, list[int]]) -> dict[str, str]:
    """Quantize nodes of weights -> key of their tied group; groups of several regions are out."""
    keys = weight_keys(module)
    nodes = by_name(module)
    found: dict[str, str] = {}
    where: dict[str, set[int]] = {}
    for name, numbers in owners.items():
        source = nodes[name].args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            scale = encoding_of(module, nodes[name]).scale
            key = f"{keys.get(str(source.target), source.target)}/{scale.data_ptr()}"
            found[name] = key
            where.setdefault(key, set()).update(numbers)
    return {name: key for name, key in found.items() if len(where[key]) == 1}


def moving(region: Region, nodes: dict[str, Node]) -> set[str]:
    """Calls of a region that follow from its moving inputs or its weights."""
    found = set(region.moving) & set(region.inputs)
    for name in region.nodes:
        if name in region.weights or any(i.name in found for i in nodes[name].all_input_nodes):
            found.add(name)
    return found


def observed_ports(exact: GraphModule, region: Region, *, inside: bool) -> Ports:
    """What a region reads and is judged by; `inside` adds its products and probabilities."""
    judged = tuple(name for name in region.outputs if name in region.moving)
    if not inside:
        return Ports(region.inputs, judged)
    nodes = by_name(exact)
    moves = moving(region, nodes)
    inner = [n for n in region.nodes if n in moves and n not in judged]
    products = tuple(n for n in inner if product(nodes[n]) is not None)
    rows = tuple(n for n in inner if kind(nodes[n]) is OpKind.SOFTMAX)
    return Ports(region.inputs, judged, products, rows)


def write_codes(module: GraphModule, node: Node, codes: Tensor) -> None:
    """Replace a quantize node of a weight by stored codes."""
    source = node.args[0]
    assert isinstance(source, Node)
    packed = insert_buffer(module, f"{source.target}_codes", codes, before=node)
    node.replace_all_uses_with(packed)
    module.graph.erase_node(node)


def write_scale(module: GraphModule, node: Node, scale: Tensor) -> None:
    """Let a quantize node of an activation, and its inverse, read another scale."""
    stored = insert_buffer(module, f"{node.name}_scale", scale, before=node)
    pair = [node, *(u for u in node.users if u.target is DEQUANTIZE)]
    for each in pair:
        if each.target in {QUANTIZE, DEQUANTIZE}:
            Edge(each, (1,)).redirect(stored)


def write(module: GraphModule, decisions: dict[str, Any]) -> bool:
    """Write codes of weights and steps of activations, by name of the quantize node."""
    nodes = by_name(module)
    for name, value in decisions.items():
        node = nodes[name]
        source = node.args[0]
        is_weight = isinstance(source, Node) and source.op == "get_attr"
        (write_codes if is_weight else write_scale)(module, node, value)
    if decisions:
        module.graph.lint()
        module.recompile()
    return bool(decisions)
