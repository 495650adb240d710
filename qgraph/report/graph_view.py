# SPDX-License-Identifier: Apache-2.0
"""The quantized graph as a reader wants to see it: ops that compute, their bits and their errors.

Constants, quantizers and moves are left out; edges run through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.dialect import encoding_of, is_dequantize, is_quantize
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind, constants, kind
from qgraph.graph.product_sizes import product_sizes
from qgraph.graph.provenance import module_path
from qgraph.graph.storage import stored_tensors
from qgraph.report.accounting import FLOAT_BITS, Cost, OpUse, TensorUse, account
from qgraph.report.plain import number, plain


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One op that computes something.

    Attributes:
        name, op, path: node name, kind, module path.
        inputs: places of the ops whose results it reads.
        weight_bits, activation_bits: widths of its operands; None where it has none.
        macs, parameters: for one sample; 0 for what is no product.
        sqnr: dB of its output against the float model; nan where unknown.
    """

    name: str
    op: str
    path: str
    inputs: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    macs: int
    parameters: int
    sqnr: float

    @property
    def bits(self) -> int:
        """The narrowest operand, 32 for an op in float."""
        found = [b for b in (self.weight_bits, self.activation_bits) if b is not None]
        return min(found, default=FLOAT_BITS)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        data = plain(asdict(self))
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphNode:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        return cls(
            name=str(data["name"]),
            op=str(data["op"]),
            path=str(data["path"]),
            inputs=tuple(int(i) for i in data["inputs"]),
            weight_bits=_optional(data["weight_bits"]),
            activation_bits=_optional(data["activation_bits"]),
            macs=int(data["macs"]),
            parameters=int(data["parameters"]),
            sqnr=number(data["sqnr"]),
        )


def _optional(value: Any) -> int | None:
    return None if value is None else int(value)


class _Reader:
    """Widths and sources of values, seen through quantizers and moves."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.sizes = product_sizes(module)
        self.nodes = list(module.graph.nodes)
        self.fixed = constants(self.nodes)
        self.kept = [n for n in self.nodes if self._computes(n)]
        self.place = {node: i for i, node in enumerate(self.kept)}
        self.bits: dict[Node, int] = {}
        self.sources: dict[Node, tuple[int, ...]] = {}
        for node in self.nodes:
            self._read(node)

    def _computes(self, node: Node) -> bool:
        value = node.meta.get("val")
        if node.op != "call_function" or node in self.fixed or not isinstance(value, Tensor):
            return False
        if is_quantize(node) or is_dequantize(node) or kind(node) is OpKind.MOVE:
            return False
        return value.is_floating_point()

    def _read(self, node: Node) -> None:
        if is_dequantize(node):
            self.bits[node] = encoding_of(self.module, node).bits
        elif node.op == "call_function" and node not in self.place:
            first = next((n for n in node.all_input_nodes if n in self.bits), None)
            if first is not None and not is_quantize(node):
                self.bits[node] = self.bits[first]
        if node in self.place:
            self.sources[node] = (self.place[node],)
        else:
            found = (i for n in node.all_input_nodes for i in self.sources.get(n, ()))
            self.sources[node] = tuple(dict.fromkeys(found))

    def operand_bits(self, node: Node, *, constant: bool) -> int | None:
        """Fewest bits among the constant, or the other, quantized operands."""
        found = [
            self.bits[n]
            for n in node.all_input_nodes
            if n in self.bits and (n in self.fixed) is constant and not self._is_bias(n)
        ]
        return min(found, default=None)

    def _is_bias(self, node: Node) -> bool:
        return node in self.fixed and self.bits[node] > 16


def graph_view(
    module: GraphModule, errors: Mapping[str, float], reader: _Reader | None = None
) -> tuple[GraphNode, ...]:
    """The ops of a quantized graph, in its order; `errors` has dB by node name."""
    reader = reader or _Reader(module)
    sizes = reader.sizes
    shown = []
    for node in reader.kept:
        size = sizes.get(node.name)
        reads = [i for n in node.all_input_nodes for i in reader.sources[n]]
        shown.append(
            GraphNode(
                name=node.name,
                op=kind(node).value,
                path=module_path(node),
                inputs=tuple(dict.fromkeys(reads)),
                weight_bits=reader.operand_bits(node, constant=True),
                activation_bits=reader.operand_bits(node, constant=False),
                macs=0 if size is None else size.macs,
                parameters=0 if size is None else size.parameters,
                sqnr=errors.get(node.name, math.nan),
            )
        )
    return tuple(shown)


def cost_of(module: GraphModule) -> Cost:
    """What the widths of a quantized graph buy, counted on the graph itself."""
    return account(op_uses(module), _tensors(module))


def view_and_cost(
    module: GraphModule, errors: Mapping[str, float]
) -> tuple[tuple[GraphNode, ...], Cost]:
    """`graph_view` and `cost_of` from one reading of the graph."""
    reader = _Reader(module)
    cost = account(op_uses(module, reader), _tensors(module))
    return graph_view(module, errors, reader), cost


def op_uses(module: GraphModule, reader: _Reader | None = None) -> list[OpUse]:
    """The products of a quantized graph with their widths, for `compute_ratio` and the like."""
    reader = reader or _Reader(module)
    sizes = reader.sizes
    ops = []
    for node in reader.kept:
        size = sizes.get(node.name)
        if size is None:
            continue
        data = reader.operand_bits(node, constant=False) or FLOAT_BITS
        weight = reader.operand_bits(node, constant=True) if size.parameters else data
        is_quantized = size.parameters and weight
        ops.append(
            OpUse(
                name=node.name,
                parameters=size.parameters,
                macs=size.macs,
                weight_bits=weight or FLOAT_BITS,
                activation_bits=data,
                scales=size.channels if is_quantized else 0,
                biases=size.biases,
            )
        )
    return ops


def _tensors(module: GraphModule) -> list[TensorUse]:
    def width(edge: Edge) -> int | None:
        reader = edge.consumer
        return encoding_of(module, reader).bits if is_quantize(reader) else None

    return [
        TensorUse(
            name=item.node.name,
            elements=item.elements,
            bits=FLOAT_BITS if item.bits is None else item.bits,
            born=item.born,
            last_read=item.last_read,
        )
        for item in stored_tensors(module, width)
    ]
