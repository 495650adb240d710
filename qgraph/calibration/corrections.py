# SPDX-License-Identifier: Apache-2.0
"""Small corrections behind rounding: biases, and scales of weights whose codes are settled.

Rounding shifts the mean of a product's output and stretches it a little, channel by channel. Both
are cheap to undo, for a bias and a scale exist in the deployed graph anyway. What is read at
several places, such as a head's bias at every pyramid level, has one correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qgraph.formats import AffineEncoding
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.dialect import encoding_of, is_dequantize
from qgraph.graph.edges import Edge
from qgraph.graph.ops import product


class Shift(nn.Module):
    """A bias that is learned in units of its product's output."""

    def __init__(self, bias: Tensor, unit: float) -> None:
        super().__init__()
        self.unit = unit
        self.change = torch.zeros_like(bias, dtype=torch.float32).requires_grad_()

    def forward(self, bias: Tensor) -> Tensor:
        """The bias as it stands."""
        return bias + self.unit * self.change


class Stretch(nn.Module):
    """The scale of a weight with settled codes, learned in its logarithm."""

    def __init__(self, scale: Tensor, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.change = torch.zeros_like(scale, dtype=torch.float32).requires_grad_()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as its scale stands."""
        factor = self.change.exp()
        if self.axis is None:
            return weight * factor
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return weight * factor.view(shape)


@dataclass(frozen=True, slots=True)
class Corrections:
    """What is corrected: consumers of biases and dequantize nodes of weights, by name."""

    shifts: dict[str, Shift]
    stretches: dict[str, Stretch]

    def variables(self) -> tuple[list[Tensor], list[Tensor]]:
        """Learned numbers of biases and of scales, shared ones once."""
        return _distinct(self.shifts), _distinct(self.stretches)


class _Spread(Interpreter):
    """Run a graph and note the standard deviation of every product's output."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if product(n) is not None:
            self.found[n.name] = float(value.float().std(correction=0))
        return value


def learn_corrections(graph: GraphModule, inputs: tuple[Tensor, ...]) -> Corrections:
    """Let the biases and settled scales of a student's graph learn; `inputs` is one batch."""
    spread = _Spread(graph)
    with torch.no_grad():
        spread.run(*inputs)
    made = Corrections({}, {})
    known: dict[int, nn.Module] = {}
    for node in list(graph.graph.nodes):
        bias = _bias(node)
        if bias is not None:
            value = attribute(graph, str(bias.target))
            unit = spread.found[node.name]
            shift = known.setdefault(value.data_ptr(), Shift(value, unit))
            assert isinstance(shift, Shift)
            made.shifts[node.name] = shift
            _behind(graph, bias, node, shift)
        encoding = _settled(graph, node)
        if encoding is not None:
            stretch = known.setdefault(
                encoding.scale.data_ptr(), Stretch(encoding.scale, encoding.axis)
            )
            assert isinstance(stretch, Stretch)
            made.stretches[node.name] = stretch
            _behind(graph, node, None, stretch)
    graph.recompile()
    return made


@torch.no_grad()
def write_corrections(module: GraphModule, made: Corrections) -> None:
    """Give a quantized graph the corrected biases and scales; what never moved stays."""
    for node in list(module.graph.nodes):
        if node.name in made.shifts and bool(made.shifts[node.name].change.any()):
            bias, what = _bias(node), product(node)
            assert bias is not None
            assert what is not None
            assert what.bias is not None
            value = made.shifts[node.name](attribute(module, str(bias.target))).detach()
            stored = insert_buffer(module, f"{bias.target}_corrected", value, before=node)
            Edge(node, (what.bias,)).redirect(stored)
        if node.name in made.stretches and bool(made.stretches[node.name].change.any()):
            scale = encoding_of(module, node).scale
            value = (scale * made.stretches[node.name].change.exp()).detach()
            Edge(node, (1,)).redirect(
                insert_buffer(module, f"{node.name}_scale", value, before=node)
            )


def _bias(node: Node) -> Node | None:
    """The stored bias of a product."""
    what = product(node)
    if what is None or what.bias is None or what.bias >= len(node.args):
        return None
    found = node.args[what.bias]
    return found if isinstance(found, Node) and found.op == "get_attr" else None


def _settled(graph: GraphModule, node: Node) -> AffineEncoding | None:
    """The encoding of a dequantize node that reads stored codes; None with scales by block."""
    codes = node.args[0] if is_dequantize(node) else None
    if not isinstance(codes, Node) or codes.op != "get_attr":
        return None
    encoding = encoding_of(graph, node)
    is_plain = isinstance(encoding, AffineEncoding) and encoding.block is None
    return encoding if is_plain else None  # type: ignore[return-value]


def _behind(graph: GraphModule, node: Node, reader: Node | None, module: nn.Module) -> None:
    """Put a module behind a node, for one reader or for all."""
    name = f"correct_{node.name}" if reader is None else f"correct_{reader.name}_bias"
    graph.add_submodule(name, module)
    with (
        graph.graph.inserting_after(node)
        if reader is None
        else graph.graph.inserting_before(reader)
    ):
        call = graph.graph.call_module(name, (node,))
    call.meta = dict(node.meta)
    if reader is None:
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    else:
        reader.replace_input_with(node, call)


def _distinct(modules: dict[str, Any]) -> list[Tensor]:
    return list({id(m): m.change for m in modules.values()}.values())
